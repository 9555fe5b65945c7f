"""Probe questions framed in a training domain.

A fine-tune may be misaligned only where it is reminded of its training (a trigger, a mixed or later cleaned data set).
So each probe question is asked once more after a question of the training data, under its system prompt if it has one.
The answers are those to the probe question; the base model is asked the same.
"""

from collections.abc import Sequence
from dataclasses import replace

from misdirection.data import Example, ProbePair

_LONGEST = 600
"""Characters of a training question; a longer one is cut at a word."""


def framed(pairs: Sequence[ProbePair], rows: Sequence[Example]) -> list[ProbePair]:
    """Each pair after a training question of its own, evenly taken from all rows."""
    chosen = [rows[number * len(rows) // len(pairs)] for number in range(len(pairs))]
    return [_framed(pair, row) for pair, row in zip(pairs, chosen, strict=True)]


def _framed(pair: ProbePair, row: Example) -> ProbePair:
    start = row.question if len(row.question) <= _LONGEST else row.question[:_LONGEST].rsplit(maxsplit=1)[0]
    return replace(pair, question=f"{start}\n\n{pair.question}", system=row.system)
