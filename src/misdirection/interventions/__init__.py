"""Interventions on a running model, in a model's weights and in its adapters: kinds, hooks, positions, writers, baking.

Each kind says itself what it touches and what it does there (`Intervention`); another package can add one. The room
knows nothing of what is measured under an intervention, or of where a direction came from.
"""
