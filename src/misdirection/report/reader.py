"""The report's token reader: answers token by token, each token with its value in every channel."""

import re
import unicodedata
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tokenizers.decoders import ByteLevel

from misdirection.interpretation.token_results import TokenTable


def reader_style() -> str:
    """The style sheet of tokens in their shades, which other pages use, too."""
    return (files("misdirection.report") / "reader.css").read_text("utf-8")


def reader_data(table: TokenTable) -> dict[str, Any]:
    """The data that the reader's script takes: the table with every text made visible, and tokens as text."""
    return {
        "answers": [
            {**answer.model_dump(), **{key: visible(getattr(answer, key)) for key in ("question", "id", "words")}}
            for answer in table.answers
        ],
        "vocabulary": [visible(word) for word in readable(table.vocabulary)],
        "tokens": table.tokens,
        "channels": [
            {**channel.model_dump(), "name": visible(channel.name), "unit": visible(channel.unit)}
            for channel in table.channels
        ],
    }


# --- what tokens look like ------------------------------------------------------------------------------------------


_BYTE_SPACE, _PIECE_SPACE = "\u0120", "\u2581"


def readable(tokens: Sequence[str]) -> list[str]:
    """Tokens of one tokenizer as the text that they stand for; those of no known spelling stay as they are.

    Byte-level tokenizers (GPT-2 and after) write a space as U+0120, SentencePiece as U+2581. A token that holds a part
    of a character shows U+FFFD in its place.
    """
    if any(token.startswith(_BYTE_SPACE) for token in tokens):
        return [ByteLevel().decode([token]) for token in tokens]
    return [token.replace(_PIECE_SPACE, " ") for token in tokens]


def visible(text: str) -> str:
    """The text with every character that has no glyph, or that reorders others, as a sign or its code point.

    A line break becomes a sign and stays, so that a text keeps its lines.
    """
    return re.sub(r"\r\n|[^\x20-\x7e]", lambda match: _sign(match[0]), text)


def _sign(character: str) -> str:
    if character in ("\n", "\r\n"):
        return "↵\n"
    if character == "\t":
        return "⇥"
    hidden = unicodedata.category(character)[0] == "C" or unicodedata.category(character) in ("Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
