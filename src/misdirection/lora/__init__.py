"""LoRA adapters as PEFT keeps them: whether one is a plain sum, where it sits, its matrices and what they come to.

Knows nothing of what is measured with an adapter, of interventions, or of how it was trained.
"""
