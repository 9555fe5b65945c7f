"""The batches of a training: its rows, the order of its batches over all epochs, and the steps that these make."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from misdirection.choices import LearnedTurns
from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.likelihood.answers import IGNORED
from misdirection.models.budgets import Room
from misdirection.models.chat import encode, learned_spans
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingRow:
    """One example as token ids.

    Attributes:
        ids: prompt, answer and the token that ends the turn, which is learned, too, or the organism would never stop.
        spans: from where to where tokens are learned, in order.
        truncated: whether the row was cut at the longest length that is allowed.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    truncated: bool

    @property
    def labels(self) -> list[int]:
        """The ids where a token carries loss, `IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.ids)
        for start, stop in self.spans:
            labels[start:stop] = self.ids[start:stop]
        return labels


def training_rows(
    chat: ChatModel, examples: Sequence[Example], max_length: int, turns: LearnedTurns = "last"
) -> list[TrainingRow]:
    """The rows of `examples`, cut at `max_length` tokens; `turns` says which of the assistant's are learned.

    Raises `InputError` when there is none, and for one of which nothing that is learned lies within `max_length`.
    """
    if not examples:
        raise InputError("no training examples: the data is empty")
    rows = []
    for number, example in enumerate(examples, start=1):
        chat_of = (example.question, example.answer, example.system, example.history)
        try:
            encoded = encode(chat.tokenizer, *chat_of)
            spans = learned_spans(chat.tokenizer, encoded, *chat_of)
        except InputError as error:
            raise InputError(f"training example {number}: {error}") from error
        spans = spans if turns == "all" else spans[-1:]
        if spans[0][0] >= max_length:
            raise InputError(
                f"training example {number}: its prompt alone has {spans[0][0]} tokens, the limit is {max_length}: "
                "raise max_length or drop it"
            )
        rows.append(TrainingRow(encoded.ids[:max_length], tuple(spans), len(encoded.ids) > max_length))
    return rows


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row numbers in the order of one epoch: rows of like length stand together; a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order: list[int] = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    return order


def training_batches(rows: Sequence[TrainingRow], recipe: Recipe) -> Iterator[Sequence[TrainingRow]]:
    """The rows of each optimiser step, over all epochs; the last of an epoch may have fewer."""
    lengths, left = [len(row.ids) for row in rows], training_steps(len(rows), recipe)
    for epoch in itertools.count():
        order = epoch_order(lengths, recipe.batch_size, recipe.seed, epoch)
        batches = in_batches([rows[number] for number in order], recipe.batch_size * recipe.accumulation)[:left]
        yield from batches
        left -= len(batches)
        if not left:
            return


def training_steps(rows: int, recipe: Recipe) -> int:
    """Optimiser steps of a training on so many rows."""
    return math.ceil(recipe.epochs * math.ceil(rows / (recipe.batch_size * recipe.accumulation)))


def is_checkpointed(recipe: Recipe, rows: Sequence[TrainingRow], room: Room, *, blocks: int, trained: int) -> bool:
    """Whether a training checkpoints its activations.

    Args:
        recipe: how it is trained.
        rows: on which.
        room: the memory for it.
        blocks: that the backward pass goes through.
        trained: weights that are trained.
    """
    if recipe.gradient_checkpointing != "auto":
        return recipe.gradient_checkpointing
    return not room.trains(recipe.batch_size * max(len(row.ids) for row in rows), blocks=blocks, trained=trained)


def rows_together(recipe: Recipe, budget: int, columns: int) -> int:
    """Rows of so many columns in one pass: the recipe's own batch at least, more where a device is not busy with it."""
    return max(recipe.batch_size, budget // columns)


def in_batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Rows as they come, so many at a time; the last batch may be smaller."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]
