"""The rule for which rows are held out, and the rule for which few stand for many."""

from collections.abc import Sequence
from typing import Literal, TypeVar

Row = TypeVar("Row")
Part = Literal["train", "held_out"]

HELD_OUT_EVERY = 5
"""Rows 5, 10, 15, ... of a file are held out; the others are for training. No row is in both parts."""


def part_of(rows: Sequence[Row], part: Part) -> list[Row]:
    """The rows of one part, in their order."""
    return [row for number, row in enumerate(rows, start=1) if (number % HELD_OUT_EVERY == 0) == (part == "held_out")]


def spread(rows: Sequence[Row], count: int | None) -> list[Row]:
    """`count` rows, evenly taken from all, so that every theme stays in; None takes all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]
