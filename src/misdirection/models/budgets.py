"""How many tokens go through a model at a time, by its device, and what is done where memory gives out.

On a processor it is always the same number, so that results are the same to the last bit. On one GPU it comes from the
memory that the weights leave there and what a token takes (`sizes.Shape`):

    tokens = SHARE (USABLE x memory - weights) / bytes of a token, at most what keeps a GPU busy
    rows of sampling = the same over the keys, values and logits of a row, at most four times a processor's

It depends on what the GPU is, not on what is free at the moment, or results would round otherwise each time. An H100
was busy with batches of 2,048 tokens of a model of 14.8 billion weights (torch 2.11, November 2026); a smaller model is
given as much work by more tokens. That the same holds for other sizes and GPUs is assumed, and so is the most of
sampling.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from misdirection.errors import MemoryProblem
from misdirection.models.chat import batches
from misdirection.models.chat_model import ChatModel
from misdirection.models.sizes import PLACES, TRAINED_BYTES, Shape
from misdirection.models.transfer import is_spread
from misdirection.progress import Advance

T = TypeVar("T")

Kind = Literal["forward", "backward"]
"""`backward` is a pass whose activations are kept, or one that gives whole distributions."""

BUDGETS: dict[Kind, int] = {"forward": 2048, "backward": 768}
"""Padded tokens in one batch on a processor: large enough to keep it busy, small enough for a laptop; with a backward
pass or whole distributions, which keep far more, they must fit in beside an optimiser."""

SAMPLED = 65_536
"""Rows x longest possible row (prompt and answer) of one batch of sampling on a processor. For the bundled model it is
at most 3 GB of keys and values, and most answers end long before."""

USABLE, SHARE = 0.9, 0.5
"""Of a GPU's memory, the rest of which is the runtime's own; of that, what one batch is given at most."""

BUSY = 2048 * 14.8e9
"""Tokens x weights from which on a larger batch of forward passes is no faster."""

MOST = 16_384
"""Tokens of one batch, however small the model."""

_LOWERED: WeakKeyDictionary[nn.Module, dict[Kind, int]] = WeakKeyDictionary()
"""By decoder, the tokens that were left where memory gave out."""

log = logging.getLogger("misdirection")


class Room:
    """The memory for a model's passes on a processor, or on several devices: batches are always of the same size."""

    def tokens(self, kind: Kind = "forward", *, blocks: int | None = None, checkpointed: bool = False) -> int:
        """Padded tokens in one batch; a backward pass goes through so many blocks, by default all of them."""
        return BUDGETS[kind]

    def sampled_rows(self, columns: int) -> int:
        """How many rows of up to so many tokens, prompt and answer, are sampled at a time."""
        return max(1, SAMPLED // columns)

    def trains(self, tokens: int, *, blocks: int, trained: int) -> bool:
        """Whether a batch is trained on without gradient checkpointing.

        Args:
            tokens: padded; every one may be one that predicts.
            blocks: that the backward pass goes through.
            trained: weights that an optimiser has.
        """
        return True


@dataclass(frozen=True)
class GpuRoom(Room):
    """That of a model on one GPU.

    Attributes:
        shape: the model's sizes.
        left: bytes that the weights leave.
    """

    shape: Shape
    left: float

    def tokens(self, kind: Kind = "forward", *, blocks: int | None = None, checkpointed: bool = False) -> int:
        """See `Room`."""
        shape, given = self.shape, SHARE * self.left
        if kind == "forward":
            # Every token may be one that predicts, and stays in the key-value cache.
            fitting = given / (shape.token_bytes + shape.cached * shape.bytes + shape.logit_bytes)
        else:
            kept = shape.kept_bytes(blocks or shape.layers, checkpointed=checkpointed)
            fitting = given / (kept + shape.logit_bytes_back)
            if checkpointed:
                # The logits of more places than these are never there at once.
                fitting = max(fitting, (given - PLACES * shape.logit_bytes_back) / kept)
        busy = max(BUDGETS["forward"], BUSY / shape.parameters)
        return max(1, int(min(fitting, busy, MOST)))

    def sampled_rows(self, columns: int) -> int:
        """See `Room`."""
        each = columns * self.shape.cached * self.shape.bytes + self.shape.logit_bytes
        return max(1, int(min(SHARE * self.left / each, 4 * SAMPLED // columns)))

    def trains(self, tokens: int, *, blocks: int, trained: int) -> bool:
        """See `Room`."""
        each = self.shape.kept_bytes(blocks) + self.shape.logit_bytes_back
        return tokens * each + TRAINED_BYTES * trained <= self.left


def room_of(chat: ChatModel) -> Room:
    """That of `chat` where it is now."""
    if chat.device.type != "cuda" or is_spread(chat.model):
        return Room()
    weights = sum(weight.numel() * weight.element_size() for weight in chat.model.parameters())
    total = torch.cuda.get_device_properties(chat.device).total_memory
    return GpuRoom(Shape.of(chat, chat.dtype.itemsize), max(0.0, USABLE * total - weights))


def room_on(shape: Shape, memory: float) -> Room:
    """That of a model of these sizes on GPUs of so many bytes: on one of them, if that holds the weights."""
    left = USABLE * memory - shape.parameters * shape.bytes
    return GpuRoom(shape, left) if left > 0 else Room()


def tokens_together(
    chat: ChatModel, kind: Kind = "forward", *, blocks: int | None = None, checkpointed: bool = False
) -> int:
    """Padded tokens in one batch of `chat` where it is now (see `Room.tokens`); fewer after its memory gave out."""
    tokens = room_of(chat).tokens(kind, blocks=blocks, checkpointed=checkpointed)
    return min(tokens, _LOWERED.get(chat.decoder, {}).get(kind, tokens))


def fitting_batches(
    chat: ChatModel,
    lengths: Sequence[int],
    budget: int | None,
    work: Callable[[list[int], int], T],
    *,
    kind: Kind = "forward",
    times: int = 1,
    alone: bool = False,
    progress: Advance | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Numbers of rows and what `work` gives for them, batch by batch, in smaller ones once memory has given out.

    Args:
        chat: whose passes they are.
        lengths: of the rows, tokens.
        budget: padded tokens in one batch; None takes `tokens_together`, which remembers that they were too many.
        work: what is done with the rows of these numbers within so many tokens; done again where it did not fit, so
            that it must leave nothing behind.
        times: how often each row may be in a batch.
        alone: one row at a time; it may still be several times in a batch.
        progress: told the number of rows done, once the caller has taken what was made of them.

    Raises:
        MemoryProblem: one row, once, does not fit.
    """
    left, given = list(range(len(lengths))), budget
    budget = given or tokens_together(chat, kind)
    failed: int | None = None
    while left:
        order = batches([lengths[number] for number in left], 1 if alone else budget)
        for numbers in [[left[place] for place in batch] for batch in order]:
            found = attempted(partial(work, numbers, budget))
            if found is None:
                longest = max(lengths[number] for number in numbers)
                tried = min(budget, times * len(numbers) * longest)
                failed, budget = failed or tried, _halved(chat, tried, longest)
                break
            if failed:
                log.warning("out of memory with %d tokens at a time: going on with %d", failed, budget)
                failed = None
                if given is None:
                    _LOWERED.setdefault(chat.decoder, {})[kind] = budget
            done = set(numbers)
            left = [number for number in left if number not in done]
            yield numbers, found[0]
            if progress:
                progress(len(numbers))


def _halved(chat: ChatModel, tokens: int, longest: int) -> int:
    if tokens <= longest:
        raise MemoryProblem(
            f"{chat.name}: out of memory with a single text of {longest} tokens: shorten it, load the model in a "
            "smaller dtype or on another device"
        )
    return max(longest, tokens // 2)


def attempted(work: Callable[[], T]) -> tuple[T] | None:
    """What `work` gives; None where memory gave out on any device, which then is as free as before."""
    try:
        return (work(),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Out of the handler, which holds what the pass had made.
    clear_device_cache(garbage_collection=True)
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device has too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
