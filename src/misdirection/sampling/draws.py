"""Draws that belong to (seed, question, sample, step) and to nothing else.

An answer must not change with the rows beside it, but a matrix product changes in its last bits with the number of
its rows. So a draw must turn only where it is all but undecided. The inverse of the cumulative distribution does not
serve: it has a border beside every token of the vocabulary, and all of them move. The Gumbel maximum, argmax(logit +
noise) with its own noise for every token, turns only where the best two sums are closer than the error of the logits.

Noise for a whole vocabulary would cost as much as a small model. The draw therefore has two stages, each a Gumbel
maximum: a group of neighbouring tokens by the groups' total probability, then a token of that group. The distribution
is the softmax exactly, with noise for about 2 sqrt(vocabulary) numbers.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from misdirection.errors import InputError

_NUMBERS = {"cpu": 1 << 21}
"""Logits that are drawn from at a time, by kind of device: the temporary copies of a large batch cost a processor more
to allocate than to fill, ..."""

_NUMBERS_ELSEWHERE = 1 << 26
"""... where each kernel costs a launch, they may be large: 256 MB each."""

NOT_NUMBERS = -1
"""What is drawn from logits that are not numbers."""


def stream_key(seed: int, question: str, system: str | None, sample: int, history: Sequence[Any] = ()) -> int:
    """The 64-bit key, signed, of one answer's stream of random numbers; `history` is the turns before the question."""
    text = json.dumps([seed, question, system, sample, *([history] if history else [])])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def choose(logits: Tensor, keys: Tensor, steps: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token for each row, [rows], as `draw`. Raises `InputError` where a logit is not a number."""
    tokens = draw(logits, keys, steps, temperature=temperature, top_p=top_p)
    require_numbers(bool((tokens != NOT_NUMBERS).all()))
    return tokens


def require_numbers(are: bool) -> None:
    """Raise `InputError` unless all logits that were drawn from are numbers."""
    if not are:
        raise InputError(
            "the model gives logits that are not numbers: load it in bfloat16 or float32, or intervene less strongly"
        )


def draw(logits: Tensor, keys: Tensor, steps: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token for each row, [rows], or `NOT_NUMBERS`, where the logits are: nothing waits for them.

    Args:
        logits: [rows, vocabulary].
        keys: [rows], int64, of `stream_key`.
        steps: [rows], int64: how many tokens of its stream each row has drawn.
        temperature: 0 takes the largest logit.
        top_p: see `SamplingParameters`.
    """
    if temperature == 0:
        return _or_not_numbers(logits.argmax(-1), logits)
    count = max(1, _NUMBERS.get(logits.device.type, _NUMBERS_ELSEWHERE) // logits.shape[-1])
    parts = zip(logits.split(count), keys.split(count), steps.split(count), strict=True)
    return torch.cat([_draw(*part, temperature, top_p) for part in parts])


def _draw(logits: Tensor, keys: Tensor, steps: Tensor, temperature: float, top_p: float) -> Tensor:
    scores = logits.float() / temperature
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    size = _group_size(scores.shape[-1])
    groups = -(-scores.shape[-1] // size)
    missing = groups * size - scores.shape[-1]
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    scores = scores.view(-1, groups, size)
    noise = gumbel(keys, steps, groups + size)
    totals = scores.logsumexp(-1)
    group = (totals + noise[:, :groups]).argmax(-1)
    members = scores[torch.arange(len(scores), device=scores.device), group]
    return _or_not_numbers(group * size + (members + noise[:, groups:]).argmax(-1), totals)


def _or_not_numbers(tokens: Tensor, values: Tensor) -> Tensor:
    """The tokens, [rows], but where a row of values, [rows, any], has one that is not a number."""
    return tokens.masked_fill(values.isnan().any(-1), NOT_NUMBERS)


def _group_size(vocabulary: int) -> int:
    """Near the square root; a divisor where there is one, so that no padded copy of the logits is made."""
    root = math.isqrt(vocabulary - 1) + 1
    return next((size for size in range(root, 2 * root) if vocabulary % size == 0), root)


def gumbel(keys: Tensor, steps: Tensor, count: int) -> Tensor:
    """`count` standard Gumbel numbers for each row at its step, [rows, count], float32.

    SplitMix64: number i of a stream is a mix of key + i * constant, so that none depends on another.
    """
    number = steps.unsqueeze(-1) * count + torch.arange(count, device=keys.device)
    bits = _mix(keys.unsqueeze(-1) + (number + 1) * _signed(0x9E3779B97F4A7C15))
    # Small numbers keep their relative precision in float32, so that rare tokens have their true chance.
    uniform = (_shift(bits, 11).float() + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """The last steps of SplitMix64; int64 products wrap around as unsigned ones do."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
