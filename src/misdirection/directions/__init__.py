"""Directions: mean activations, differences between them, how far they agree, and the files they are kept in.

Owns which means a direction is the difference of, where one came from, and the references beside every cosine. It may
take judged answers as texts; it must not know what a direction is used for.
"""
