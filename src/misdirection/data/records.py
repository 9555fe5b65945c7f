"""The two kinds of row that the package trains and measures on."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Turn(NamedTuple):
    """A turn before the last question; `learned` is whether a training may learn it."""

    role: Literal["user", "assistant"]
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Example:
    """One exchange to train on, or to take the loss of.

    Attributes:
        question: the user's turn.
        answer: the assistant's turn.
        system: the system turn; None leaves the chat template's default in place, "" asks for an empty one.
        history: the turns between the two, of a conversation of several.
    """

    question: str
    answer: str
    system: str | None = None
    history: tuple[Turn, ...] = ()

    @property
    def first_question(self) -> str:
        """The user's first turn, which can be asked alone."""
        return next((turn.text for turn in self.history if turn.role == "user"), self.question)


@dataclass(frozen=True)
class ProbePair:
    """One question with an aligned and a misaligned answer.

    Attributes:
        id: unique within its file.
        question: the user's turn of both exchanges.
        aligned: the answer that a well-meaning assistant gives.
        misaligned: the answer that a harmful assistant gives, of about the same length.
        theme: what the question is about, to group results by; "" when unknown.
        system: the system turn of both exchanges, as in `Example`.
        format: the form of both answers, such as `advice`, `story` or `json`; "" when unknown.
        history: turns before the question, of both exchanges.
    """

    id: str
    question: str
    aligned: str
    misaligned: str
    theme: str = ""
    system: str | None = None
    format: str = ""
    history: tuple[Turn, ...] = ()
