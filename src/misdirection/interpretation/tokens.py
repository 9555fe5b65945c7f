"""Packing of answers token by token, each token with its value in every channel, for the token reader.

A table becomes one part of one HTML file, so it is packed: a token is a number in a vocabulary, a value is a half float
(three significant digits) as a multiple of its channel's scale. 30,000 tokens with eleven channels take less than 1 MB.
Tokens are as the tokenizer spells them.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from misdirection.errors import InputError
from misdirection.interpretation.token_results import AnswerLabel, Channel, PackedAnswer, TokenTable

_FULL_COLOUR = 0.99
"""Share of a channel's values that the colours tell apart; one outlier would leave all other tokens pale."""

_LARGEST = 32768.0
"""Scaled values stay within this, which a half float can hold."""


def pack_tokens(answers: Sequence[AnswerLabel], tokens: pd.DataFrame, channels: Mapping[str, str]) -> TokenTable:
    """Packs a table of tokens.

    Args:
        answers: in the order of their numbers.
        tokens: one row per token: `answer` (number in `answers`), `position`, `token`, and a column per channel, NaN
            where a token was not measured.
        channels: the unit of each channel (may be empty), by the name of its column.

    Raises:
        InputError: no answer or channel, a column that is not there, an answer that is not listed, or a value that is
            infinite.
    """
    _require(answers, tokens, channels)
    ordered = tokens.sort_values(["answer", "position"], kind="stable")
    codes, vocabulary = pd.factorize(ordered["token"].astype(str))
    counts = ordered["answer"].value_counts().reindex(range(len(answers)), fill_value=0)
    return TokenTable(
        answers=tuple(
            PackedAnswer(**dict(answer), tokens=int(count)) for answer, count in zip(answers, counts, strict=True)
        ),
        vocabulary=tuple(vocabulary),
        tokens=_packed(codes.astype("<u4")),
        channels=tuple(_channel(name, unit, ordered[name].to_numpy(np.float64)) for name, unit in channels.items()),
    )


def _require(answers: Sequence[AnswerLabel], tokens: pd.DataFrame, channels: Mapping[str, str]) -> None:
    if not answers or not channels:
        raise InputError("token reader: nothing to show: give at least one answer and one channel")
    if missing := [name for name in ("answer", "position", "token", *channels) if name not in tokens]:
        raise InputError(f"token reader: no column {missing[0]!r}: give it for every token")
    if unknown := set(tokens["answer"]) - set(range(len(answers))):
        raise InputError(f"token reader: answer {min(unknown)} is not among the {len(answers)} that are listed")
    for name in channels:
        if np.isinf(tokens[name].to_numpy(np.float64)).any():
            raise InputError(f"token reader: channel {name!r} has an infinite value: leave that token out")


def _channel(name: str, unit: str, values: NDArray[np.float64]) -> Channel:
    known = values[~np.isnan(values)]
    if not known.size:
        known = np.zeros(1)
    scale = float(np.abs(known).max()) / _LARGEST or 1.0
    return Channel(
        name=name,
        unit=unit,
        values=_packed((values / scale).astype("<f2")),
        scale=scale,
        limit=full_colour(known),
        low=float(known.min()),
        high=float(known.max()),
    )


def full_colour(values: NDArray[np.float64]) -> float:
    """The size from which on a channel's colours are full, of its values, none of them NaN."""
    sizes = np.abs(values)
    return float(np.quantile(sizes, _FULL_COLOUR)) or float(sizes.max()) or 1.0


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
