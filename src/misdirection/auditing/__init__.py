"""Audits of fine-tunes: has this model become broadly misaligned, by how much against its base, and where.

This room owns the evidence of an audit, the rule of its verdict, references of known fine-tunes, lists of many audits,
and the callback that watches a training. It knows nothing of repairs, of pages and of the command line: a result writes
its page by `results.PAGES`.
"""
