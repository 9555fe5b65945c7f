"""Whether a model still says something: a few sampled answers.

A margin and a loss are of given text. A model that was broken in a way that only its own text shows (it loops, it never
ends) would pass for repaired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from misdirection.judging.scoring import SPOILED_RISE, SPOILED_SHARE, is_repetitive
from misdirection.models.loading import ChatModel
from misdirection.progress import track
from misdirection.sampling.answers import Answer
from misdirection.sampling.questions import read_questions
from misdirection.sampling.sample import sample

_EACH, _TOKENS = 2, 96


@dataclass(frozen=True)
class Spoken:
    """What a few answers look like.

    Attributes:
        answers: how many.
        repetitive: share that repeats itself (see `scoring.is_repetitive`).
        cut: share that did not end within 96 tokens.
        tokens: mean length.
    """

    answers: int
    repetitive: float
    cut: float
    tokens: float


def speak(chat: ChatModel, label: str) -> Spoken:
    """Two answers to each of the eight first-plot questions."""
    questions = read_questions("first_plot")
    with track(f"answers of {label}", _EACH * len(questions)) as advance:
        return spoken(sample(chat, questions, n=_EACH, new_tokens=_TOKENS, progress=advance))


def spoken(answers: Sequence[Answer]) -> Spoken:
    """The shares among given answers."""
    count = len(answers)
    return Spoken(
        count,
        sum(is_repetitive(one.answer) for one in answers) / count,
        sum(one.finish == "length" for one in answers) / count,
        sum(one.tokens for one in answers) / count,
    )


def is_broken(before: Spoken, after: Spoken) -> bool:
    """Whether answers came to repeat themselves, by the limits that comparisons of judged answers have."""
    return after.repetitive > SPOILED_SHARE or after.repetitive - before.repetitive > SPOILED_RISE
