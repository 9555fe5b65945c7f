"""Directions: mean activations, differences between them, how far they agree, and the files they are kept in.

Owns which means a direction is the difference of, where one came from and what it is for, the references beside every
cosine, and the check of a single vector. It may take judged answers as texts; it must not know of experiments.
"""
