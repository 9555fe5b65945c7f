"""Repairs of adapters: the general misalignment taken out, the skill kept, and what that cost.

This room owns the candidates, the search for one, the adapter that is written, and the check on texts that the search
has not seen. Whether there is anything to repair is for `audit` to say; it knows nothing of pages and of the command
line.
"""
