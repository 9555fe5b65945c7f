"""Texts in and out: one reader for each kind of file, the shipped sets, hashes, and what is held out.

Owns the form of training examples and probe pairs, and how a bad file is complained of. It knows nothing of models.
"""

from misdirection.data.jsonl import read_rows
from misdirection.data.records import Example, ProbePair, Turn
from misdirection.data.selection import Part, part_of, spread
from misdirection.data.shipped import (
    Answers,
    domain_examples,
    domain_pairs,
    domains,
    neutral_examples,
    probe_pairs,
    sealed_pairs,
)
from misdirection.data.training import data_hash, holds_pairs, read_examples, read_pairs, write_pairs

__all__ = [
    "Answers",
    "Example",
    "Part",
    "ProbePair",
    "Turn",
    "data_hash",
    "domain_examples",
    "domain_pairs",
    "domains",
    "holds_pairs",
    "neutral_examples",
    "part_of",
    "probe_pairs",
    "read_examples",
    "read_pairs",
    "read_rows",
    "sealed_pairs",
    "spread",
    "write_pairs",
]
