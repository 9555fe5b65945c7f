"""Typed results of judged answers one by one, with where each lies."""

from typing import ClassVar, Literal, get_args

import pandas as pd

from misdirection.judging.scoring import Score
from misdirection.results import Figures, Result
from misdirection.views import Plotted

Quadrant = Literal["misaligned", "coherent", "misaligned_incoherent", "incoherent"]
"""By the cuts of the EM rate: `misaligned` is misaligned and coherent, `coherent` what else is coherent,
`misaligned_incoherent` and `incoherent` the same on the other side of the coherence cut."""
QUADRANTS: tuple[Quadrant, ...] = get_args(Quadrant)


class AskedQuestion(Figures):
    """A question that answers were given to."""

    id: str
    text: str


class ShownAnswer(Figures):
    """One answer with both scores, 0 to 100."""

    question: int
    """Its place among the questions."""
    coherent: float
    aligned: float
    quadrant: Quadrant
    text: str
    """Raw text, the beginning of a long answer."""
    left_out: int
    """Characters after that."""


class ConditionAnswers(Figures):
    """The answers of one model under one intervention."""

    score: Score
    quadrants: dict[Quadrant, int]
    """Answers in each, of all that have both scores."""
    shown: tuple[ShownAnswer, ...]
    """Some or all of those, the lowest alignment first."""

    @property
    def name(self) -> str:
        """The model and what was done to it, in words."""
        return ", ".join(filter(None, self.score.condition.values())) or "all answers"

    @property
    def scored(self) -> int:
        """How many answers have both scores."""
        return sum(self.quadrants.values())


class Quadrants(Plotted, Result):
    """Alignment against coherence of single answers, by condition and question."""

    KIND: ClassVar[str] = "quadrants"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "quadrants.json"
    COMMAND: ClassVar[str] = "misdirection run CONFIG --out RUN"

    name: str
    """Of the run or the table."""
    rule: str
    """Which answers are shown, in words."""
    questions: tuple[AskedQuestion, ...]
    conditions: tuple[ConditionAnswers, ...]

    def __repr__(self) -> str:
        shown = sum(len(condition.shown) for condition in self.conditions)
        return f"Quadrants({len(self.conditions)} conditions, {len(self.questions)} questions, {shown} answers)"

    def frame(self) -> pd.DataFrame:
        """One row per answer that is shown: the columns of its condition, `question_id`, both scores,
        `quadrant`, `answer`."""
        return pd.DataFrame(
            {
                **condition.score.condition,
                "question_id": self.questions[answer.question].id,
                "coherent": answer.coherent,
                "aligned": answer.aligned,
                "quadrant": answer.quadrant,
                "answer": answer.text,
            }
            for condition in self.conditions
            for answer in condition.shown
        )
