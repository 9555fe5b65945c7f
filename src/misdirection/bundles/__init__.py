"""Bundles: one archive with all that a result was computed from, and the check that recomputes its figures from that.

Owns what goes into an archive and what is taken out of it, how it is written and read, and how figures are compared.
"""
