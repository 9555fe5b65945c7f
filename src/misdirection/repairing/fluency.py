"""Fluency of a few sampled answers.

A margin and a loss are of given text. A model that was broken in a way that only its own text shows (it loops, it never
ends) would pass for repaired.
"""

from collections.abc import Sequence

from misdirection.judging.scoring import SPOILED_RISE, SPOILED_SHARE, is_repetitive
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track
from misdirection.results import Figures
from misdirection.sampling.answers import Answer
from misdirection.sampling.questions import read_questions
from misdirection.sampling.sample import sample

_EACH, _TOKENS = 2, 96


class Fluency(Figures):
    """Shares of a few answers that a fluent model does not give."""

    answers: int
    repetitive: float
    """Share that repeats itself (see `scoring.is_repetitive`)."""
    truncated: float
    """Share that did not end within 96 tokens."""
    tokens: float
    """Mean length."""

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Fluency":
        """The shares among given answers."""
        count = len(answers)
        return cls(
            answers=count,
            repetitive=sum(is_repetitive(answer.answer) for answer in answers) / count,
            truncated=sum(answer.finish == "length" for answer in answers) / count,
            tokens=sum(answer.tokens for answer in answers) / count,
        )

    def is_broken_beside(self, before: "Fluency") -> bool:
        """Whether answers came to repeat themselves, by the limits that comparisons of judged answers have."""
        return self.repetitive > SPOILED_SHARE or self.repetitive - before.repetitive > SPOILED_RISE


def sample_fluency(chat: ChatModel, label: str) -> Fluency:
    """The fluency of two answers to each of the eight first-plot questions."""
    questions = read_questions("first_plot")
    with track(f"answers of {label}", _EACH * len(questions)) as advance:
        return Fluency.of(sample(chat, questions, n=_EACH, new_tokens=_TOKENS, progress=advance))
