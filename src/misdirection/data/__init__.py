"""Training examples and probe pairs: reading, writing, hashing, and the sets that come with the package."""

from misdirection.data.jsonl import read_rows
from misdirection.data.records import Example, ProbePair
from misdirection.data.shipped import (
    HELD_OUT_EVERY,
    Answers,
    Part,
    domain_examples,
    domain_pairs,
    domains,
    neutral_examples,
    probe_pairs,
)
from misdirection.data.training import data_hash, read_examples, read_pairs, write_pairs

__all__ = [
    "HELD_OUT_EVERY",
    "Answers",
    "Example",
    "Part",
    "ProbePair",
    "data_hash",
    "domain_examples",
    "domain_pairs",
    "domains",
    "neutral_examples",
    "probe_pairs",
    "read_examples",
    "read_pairs",
    "read_rows",
    "write_pairs",
]
