"""Organisms: recipes for fine-tunes, their training, and their folders.

Knows nothing of what is measured on an organism.
"""
