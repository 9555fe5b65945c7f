"""Owns what a repository on the Hugging Face Hub holds of each kind of thing, its card, and the way there and back.

Knows nothing of how a thing is made: it reads the typed record that the thing keeps of itself.
"""
