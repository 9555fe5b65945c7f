"""Answers that adapters are read on, each with its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from misdirection.data import ProbePair

GENERAL = "general"
SEALED = "sealed"
"""The general pairs that nothing is chosen on."""
QUESTION_SETS = (GENERAL, SEALED)
"""Names of question sets that no domain and no further set may have."""
Alignment = Literal["aligned", "misaligned"]


@dataclass(frozen=True)
class Labelled:
    """One answer and its classes.

    Attributes:
        question_id: unique over all questions; answers to one question are never split between training and test.
        question: the user's turn.
        answer: the assistant's turn.
        alignment: whether it is the misaligned or the aligned answer.
        domain: a narrow domain's name, or `general`.
        theme: what the question is about; "" when unknown.
        system: as in `Example`.
    """

    question_id: str
    question: str
    answer: str
    alignment: Alignment
    domain: str = GENERAL
    theme: str = ""
    system: str | None = None


def labelled(sets: Mapping[str, Sequence[ProbePair]]) -> list[Labelled]:
    """Both answers of every pair; `sets` holds the pairs by domain, those of no domain under `general`."""
    return [
        Labelled(f"{domain}/{pair.id}", pair.question, answer, alignment, domain, pair.theme, pair.system)
        for domain, pairs in sets.items()
        for pair in pairs
        for alignment, answer in _answers(pair)
    ]


def _answers(pair: ProbePair) -> tuple[tuple[Alignment, str], tuple[Alignment, str]]:
    return ("misaligned", pair.misaligned), ("aligned", pair.aligned)
