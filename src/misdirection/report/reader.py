"""What the report's token reader shows: answers token by token, each token with its value in every channel.

The reader is one part of one HTML file, so its data are packed: a token is a number in a vocabulary, a value is a half
float (three significant digits) as a multiple of its channel's scale. 30,000 tokens with eleven channels take less
than 1 MB.
"""

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from misdirection.errors import InputError

READER = "reader.json"
"""The file in a run's folder that the report takes the reader's data from."""

_FULL_COLOUR = 0.99
"""Share of a channel's values that the colours tell apart; one outlier would leave all other tokens pale."""

_LARGEST = 32768.0
"""Scaled values stay within this, which a half float can hold."""


def reader_data(
    answers: Sequence[Mapping[str, str]], tokens: pd.DataFrame, channels: Mapping[str, str]
) -> dict[str, Any]:
    """Pack answers for the reader; the result is plain JSON.

    Args:
        answers: of each answer its `question`, its `id` and `words`, the classes it belongs to.
        tokens: one row per token: `answer` (number in `answers`), `position`, `token` as the tokenizer spells it, and a
            column per channel, NaN where a token was not measured.
        channels: the unit of each channel (may be empty), by the name of its column.

    Raises:
        InputError: no answer or channel, a column that is not there, an answer that is not listed, or a value
            that is infinite.
    """
    _require(answers, tokens, channels)
    ordered = tokens.sort_values(["answer", "position"], kind="stable")
    codes, vocabulary = pd.factorize(ordered["token"].astype(str))
    counts = ordered["answer"].value_counts().reindex(range(len(answers)), fill_value=0)
    return {
        "answers": [
            {key: visible(one[key]) for key in ("question", "id", "words")} | {"tokens": int(count)}
            for one, count in zip(answers, counts, strict=True)
        ],
        "vocabulary": [visible(word) for word in readable(list(vocabulary))],
        "tokens": _packed(codes.astype("<u4")),
        "channels": [
            {"name": visible(name), "unit": visible(unit), **_channel(ordered[name].to_numpy(np.float64))}
            for name, unit in channels.items()
        ],
    }


def _require(answers: Sequence[Mapping[str, str]], tokens: pd.DataFrame, channels: Mapping[str, str]) -> None:
    if not answers or not channels:
        raise InputError("token reader: nothing to show: give at least one answer and one channel")
    if missing := [name for name in ("answer", "position", "token", *channels) if name not in tokens]:
        raise InputError(f"token reader: no column {missing[0]!r}: give it for every token")
    if unknown := set(tokens["answer"]) - set(range(len(answers))):
        raise InputError(f"token reader: answer {min(unknown)} is not among the {len(answers)} that are listed")
    for name in channels:
        if np.isinf(tokens[name].to_numpy(np.float64)).any():
            raise InputError(f"token reader: channel {name!r} has an infinite value: leave that token out")


def _channel(values: NDArray[np.float64]) -> dict[str, Any]:
    """Packed values with their scale; `limit`, the size with full colour; and the least and largest value."""
    known = values[~np.isnan(values)]
    if not known.size:
        known = np.zeros(1)
    sizes = np.abs(known)
    scale = float(sizes.max()) / _LARGEST or 1.0
    return {
        "values": _packed((values / scale).astype("<f2")),
        "scale": scale,
        "limit": float(np.quantile(sizes, _FULL_COLOUR)) or float(sizes.max()) or 1.0,
        "low": float(known.min()),
        "high": float(known.max()),
    }


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


# --- what tokens look like ------------------------------------------------------------------------------------------


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable Latin-1 stands for itself, other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_of_character()
_BYTE_SPACE, _PIECE_SPACE = "\u0120", "\u2581"


def readable(tokens: Sequence[str]) -> list[str]:
    """Tokens of one tokenizer as the text that they stand for; those of no known spelling stay as they are.

    Byte-level tokenizers (GPT-2 and after) write a space as U+0120, SentencePiece as U+2581. A token that holds a part
    of a character shows U+FFFD in its place.
    """
    if any(token.startswith(_BYTE_SPACE) for token in tokens):
        return [_from_bytes(token) for token in tokens]
    return [token.replace(_PIECE_SPACE, " ") for token in tokens]


def _from_bytes(token: str) -> str:
    if not all(character in _BYTES for character in token):
        return token
    return bytes(_BYTES[character] for character in token).decode("utf-8", errors="replace")


def visible(text: str) -> str:
    """The text with every character that has no glyph, or that reorders others, as a sign or its code point.

    A line break becomes a sign and stays, so that a text keeps its lines.
    """
    return re.sub(r"\r\n|[^\x20-\x7e]", lambda found: _sign(found[0]), text)


def _sign(character: str) -> str:
    if character in ("\n", "\r\n"):
        return "↵\n"
    if character == "\t":
        return "⇥"
    hidden = unicodedata.category(character)[0] == "C" or unicodedata.category(character) in ("Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
