"""The passes that measuring, averaging, training and sampling take, batch by batch, as their own modules make them.

Batches, shared starts and padding are counted by the same functions that run them. One thing is simpler: all settings
of one batch of a sweep start at the lowest block that any of them touches, where the sweep may end a batch earlier.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import DynamicCache
from transformers.trainer_pt_utils import get_length_grouped_indices

from misdirection.cost.model_cost import Pass
from misdirection.interventions.passes import shared_start
from misdirection.interventions.resume import can_resume
from misdirection.likelihood.sweep import TOKEN_BUDGET, Continuations
from misdirection.models.chat import Encoded, batches
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import text_config
from misdirection.organisms.recipe import Recipe
from misdirection.sampling.transformers_engine import TOKEN_BUDGET as SAMPLING_BUDGET

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """What a sweep does to all tasks.

    Attributes:
        start: the block up to which it changes nothing; -1 when it changes all.
        alternating: how many different settings the tasks meet.
    """

    start: int
    alternating: int = 1


def plain(chat: ChatModel) -> list[Line]:
    """The model as it is."""
    return [Line(len(chat.layers) - 1)]


def sweep_passes(
    chat: ChatModel, tasks: Sequence[Continuations], lines: Sequence[Line], budget: int = TOKEN_BUDGET
) -> Iterator[Pass]:
    """What `likelihood.sweep` runs."""
    layers = len(chat.layers)
    skipped = sum(line.start + 1 for line in lines)
    resumes = skipped > layers and _resumable(chat)
    for numbers in batches([task.length for task in tasks], _row_budget(chat, tasks, budget)):
        group = [tasks[number] for number in numbers]
        if resumes:
            yield from _scored(group, plain(chat), layers)
        size = max(1, budget // (len(group) * max(task.length for task in group)))
        order = sorted(lines, key=lambda line: line.start)
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            yield from _scored(group, chunk, layers - chunk[0].start - 1 if resumes else layers)


def _resumable(chat: ChatModel) -> bool:
    config = text_config(chat.model)
    return not getattr(config, "num_kv_shared_layers", 0) and can_resume(DynamicCache(config=config))


def _row_budget(chat: ChatModel, tasks: Sequence[Continuations], budget: int) -> int:
    window = getattr(text_config(chat.model), "sliding_window", None)
    return 1 if window and max(task.length for task in tasks) > window else budget


def _scored(group: Sequence[Continuations], lines: Sequence[Line], blocks: int) -> Iterator[Pass]:
    """The shared start, the prompts, then the answers on their cache."""
    prompts = [task.prompt for task in group]
    shared, longest = shared_start(prompts, own=2), max(map(len, prompts))
    if shared:
        yield Pass(sum(min(line.alternating, len(group)) for line in lines), shared, blocks=blocks)
    rows, answers = len(lines) * len(group), len(group[0].answers)
    yield Pass(rows, longest - 1 - shared, shared, blocks=blocks)
    columns = max(len(answer) for task in group for answer in task.answers)
    yield Pass(rows * answers, columns, longest - 1, head=rows * answers * columns, blocks=blocks)


def mean_passes(
    chat: ChatModel, rows: Sequence[Encoded], settings: int = 1, budget: int = TOKEN_BUDGET
) -> Iterator[Pass]:
    """What `extraction.mean_activations` runs, with so many different settings among the rows."""
    begun = shared_start([row.prompt for row in rows], own=1) if len(rows) > 1 and _resumable(chat) else 0
    for numbers in batches([row.stop - begun for row in rows], budget):
        if begun:
            yield Pass(min(settings, len(numbers)), begun)
        yield Pass(len(numbers), max(rows[number].stop for number in numbers) - begun, begun)


def row_passes(
    rows: Sequence[Encoded], budget: int, *, head: bool = False, blocks: int | None = None, back: int = 0
) -> Iterator[Pass]:
    """Whole rows without a cache; with a head where it predicts an answer's token in any of them."""
    for numbers in batches([row.stop for row in rows], budget):
        batch = [rows[number] for number in numbers]
        columns = max(row.stop for row in batch)
        predicted = len(batch) * (columns - min(row.start for row in batch)) if head else 0
        yield Pass(len(batch), columns, head=predicted, blocks=blocks, back=back)


@dataclass(frozen=True)
class Adapter:
    """An adapter to be trained.

    Attributes:
        weights: how many it has.
        layers: the adapted blocks, sorted.
    """

    weights: int
    layers: tuple[int, ...]


def training_passes(chat: ChatModel, rows: Sequence[Encoded], recipe: Recipe, adapter: Adapter) -> Iterator[Pass]:
    """What the trainer runs: rows of like length together, in as many epochs as the recipe has."""
    layers, spans = len(chat.layers), _spans(rows, recipe)
    again = recipe.gradient_checkpointing
    # With checkpointing every block's input asks for a gradient.
    back = layers if again else layers - min(adapter.layers, default=layers)
    for numbers in _orders([stop for _, stop in spans], recipe):
        how = {"back": back, "recomputed": layers if again else 0, "lora": adapter.weights}
        yield _batch([spans[number] for number in numbers], kind="training", **how)


def held_out_passes(rows: Sequence[Encoded], recipe: Recipe) -> Iterator[Pass]:
    """The held-out loss: rows as they come."""
    for batch in _parts(_spans(rows, recipe), recipe.batch_size):
        yield _batch(batch)


Span = tuple[int, int]
"""Where an answer starts, and where its row ends."""


def _spans(rows: Sequence[Encoded], recipe: Recipe) -> list[Span]:
    return [(row.start, min(len(row.ids), recipe.max_length)) for row in rows]


def _orders(lengths: list[int], recipe: Recipe) -> Iterator[Sequence[int]]:
    """Numbers of the rows of each batch, over all epochs; the last one may be a part."""
    batch = recipe.batch_size
    left = round(recipe.epochs * -(-len(lengths) // batch))
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch)
        order = get_length_grouped_indices(lengths, batch, generator=generator)
        yield from _parts(order, batch)[:left]
        left -= -(-len(lengths) // batch)
        if left <= 0:
            return


def _parts(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _batch(spans: Sequence[Span], **how: int | str) -> Pass:
    columns = max(stop for _, stop in spans)
    predicted = {place for start, stop in spans for place in range(start - 1, stop - 1)}
    return Pass(len(spans), columns, head=len(spans) * len(predicted), **how)  # type: ignore[arg-type]


def sampling_passes(prompts: Sequence[int], counts: Sequence[int], new_tokens: int, answer: float) -> Iterator[Pass]:
    """What the transformers engine runs: each prompt once, alone; then one token for every row, in full batches.

    Args:
        prompts: tokens of each different prompt.
        counts: answers to each.
        new_tokens: longest answer.
        answer: mean length of an answer.
    """
    for length in prompts:
        if length > 1:
            yield Pass(1, length - 1)
    mean = sum(length * count for length, count in zip(prompts, counts, strict=True)) / sum(counts)
    full, rest = divmod(sum(counts), sampled_together(prompts, new_tokens))
    for rows, waves in ((sampled_together(prompts, new_tokens), full), (rest, 1)):
        if rows and waves:
            seen = mean + answer / 2
            yield Pass(rows, 1, seen, head=rows, repeats=waves * answer, kind="decoding")


def sampled_together(prompts: Sequence[int], new_tokens: int) -> int:
    """Rows of one batch."""
    return max(1, SAMPLING_BUDGET // (max(prompts) + new_tokens))
