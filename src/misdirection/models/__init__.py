"""Chat models: loading them, adapters on them, chats as token ids, their layers, the bundled ones, weightless ones.

Knows nothing of what is measured on a model, of interventions, or of what the text is about.
"""
