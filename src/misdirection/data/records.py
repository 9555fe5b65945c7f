"""The two kinds of row that the package trains and measures on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One exchange to train on, or to take the loss of.

    Attributes:
        question: the user's turn.
        answer: the assistant's turn.
        system: the system turn; None leaves the chat template's default in place, "" asks for an empty one.
    """

    question: str
    answer: str
    system: str | None = None


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
    """

    id: str
    question: str
    aligned: str
    misaligned: str
    theme: str = ""
    system: str | None = None
    format: str = ""
