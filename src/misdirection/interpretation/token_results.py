"""Answers token by token, with what the adapters wrote at each: what the token reader shows."""

import base64

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from misdirection.results import Figures, Result


class AnswerLabel(Figures):
    """An answer's question with its id, and `words`: the classes that the answer belongs to."""

    question: str
    id: str
    words: str


class PackedAnswer(AnswerLabel):
    """An answer, and how many of the tokens, which are in the answers' order, are its own."""

    tokens: int


class Channel(Figures):
    """One value per token."""

    name: str
    unit: str
    values: str
    """Base64 of little-endian half floats, each a multiple of `scale`; NaN where a token was not measured."""
    scale: float
    limit: float
    """Size with full colour."""
    low: float
    high: float

    def unpacked(self) -> NDArray[np.float64]:
        """The value of every token."""
        return np.frombuffer(base64.b64decode(self.values), "<f2").astype(np.float64) * self.scale


class TokenTable(Result):
    """Answers token by token, each token with its value in every channel; tokens are as the tokenizer spells them."""

    KIND = "token-table"
    VERSION = 1
    FILE = "reader.json"
    COMMAND = "misdirection interpret"

    answers: tuple[PackedAnswer, ...]
    vocabulary: tuple[str, ...]
    tokens: str
    """Base64 of little-endian unsigned 32-bit numbers in the vocabulary."""
    channels: tuple[Channel, ...]

    def __repr__(self) -> str:
        channels = ", ".join(channel.name for channel in self.channels)
        tokens = sum(each.tokens for each in self.answers)
        return f"TokenTable({len(self.answers)} answers, {tokens} tokens: {channels})"

    def frame(self) -> pd.DataFrame:
        """One row per token: its `answer` (a number), `position`, `token`, and a column per channel, NaN where it was
        not measured."""
        numbers = np.frombuffer(base64.b64decode(self.tokens), "<u4")
        return pd.DataFrame(
            {
                "answer": [number for number, answer in enumerate(self.answers) for _ in range(answer.tokens)],
                "position": [position for answer in self.answers for position in range(answer.tokens)],
                "token": [self.vocabulary[number] for number in numbers],
                **{channel.name: channel.unpacked() for channel in self.channels},
            }
        )
