"""Defences: what keeps a fine-tune from becoming broadly misaligned while it is trained.

Owns what a defence may do to a trainer of transformers (its rows, its loss, its steps), that all of it is undone when
the training ends, and the registry of defences. It knows nothing of recipes, nor of what is measured afterwards.
"""
