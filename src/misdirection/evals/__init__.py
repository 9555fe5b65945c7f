"""Inspect AI: the paper's questions as its tasks, rubrics as a scorer, our models as a provider, our tables as logs.

Owns what Inspect finds by the entry point `inspect_ai`, and the way from a table to a log. It defines no figure: rates
and intervals are asked of their owners. Nobody below may know of Inspect but the reader of logs (`sampling.logs`).
"""
