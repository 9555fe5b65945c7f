"""Ways to score a training row: how much more a bad fine-tune than a benign one is at home in it.

A score belongs to a row alone, whatever rows stand beside it. It is read in the unit of the reference (`scale`): 0 is
what the good answers of its domains score, 1 what their bad answers do, each by fine-tunes of the *other* domains.
Another package adds a way of its own by a class and a registration:

    @SCORES.register("short")
    class ShortScore(RowScore):
        def of(self, worker, rows, reference, others, fitted):
            return np.array([-float(len(row.answer)) for row in rows])
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from misdirection.auditing.reference import Reference
from misdirection.data import Example, ProbePair
from misdirection.data.words import WordWeights
from misdirection.errors import InputError
from misdirection.judging.config import JudgeConfig
from misdirection.likelihood.margin import text_continuations
from misdirection.likelihood.sweep import log_probs
from misdirection.progress import track
from misdirection.registry import Registry
from misdirection.runs.worker import Worker
from misdirection.statistics.resampling import Floats


@dataclass(frozen=True)
class Contrast:
    """A bad fine-tune of the reference beside the control that differs from it in its answers only.

    Attributes:
        bad, control: their names.
        domain: what both were trained on.
    """

    bad: str
    control: str
    domain: str


def contrasts(reference: Reference) -> list[Contrast]:
    """All of a reference, one for each bad fine-tune that has a control of its own domain.

    Raises `InputError` unless they are of two domains: a row is never scored by fine-tunes of its own.
    """
    found = [
        Contrast(bad, control, domain)
        for bad, control in reference.own_controls.items()
        if (domain := reference.known[bad].domain) in reference.domains
    ]
    if len({contrast.domain for contrast in found}) < 2:
        raise InputError(
            f"{reference.folder}: to screen data a reference needs bad fine-tunes with controls of their own in two "
            "domains: make one with `misdirection reference`"
        )
    return found


Fitted = Mapping[str, Tensor]
"""What a score learned of a reference, by names of its own."""


class RowScore(ABC):
    """One way to score rows."""

    APART: ClassVar[bool] = False
    """Whether it takes more than passes over the rows: tasks of its own score them, and leave other scores as they are.
    """

    @classmethod
    def open(cls, judge: JudgeConfig | None) -> Self:
        """The way as a screen has it.

        Args:
            judge: the one that was named to the screen, for a way that asks one; such a way raises `InputError` where
                none was.
        """
        return cls()

    @property
    def asks(self) -> JudgeConfig | None:
        """The judge that it asks; None for a score by models alone."""
        return None

    def depends_on(self) -> dict[str, Any]:
        """What its scores depend on besides the rows, the base and the reference, as JSON has it."""
        return {}

    def cost(self, rows: Iterable[Sequence[Example]]) -> str:
        """What it takes to score rows, which come some at a time, besides passes over them; empty where that is all.

        Raises `InputError` for more than the user allows.
        """
        return ""

    def fit(self, worker: Worker, reference: Reference) -> Fitted:
        """What is computed once for a reference, and kept; by default nothing."""
        return {}

    @abstractmethod
    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """The scores of rows, [rows]; higher is worse, NaN where there is none.

        Args:
            worker: has the base, and the reference's fine-tunes by their names.
            rows: what is scored.
            reference: the known fine-tunes.
            others: those that may be used: none of them was trained on these rows.
            fitted: what `fit` gave.
        """

    def columns(
        self, name: str, worker: Worker, rows: Sequence[Example], reference: Reference, fitted: Fitted
    ) -> dict[str, Any]:
        """What the table of rows has of it, [rows] each: the scores under its name."""
        return {name: score_rows(self, worker, rows, reference, fitted)}


def score_rows(way: RowScore, worker: Worker, rows: Sequence[Example], reference: Reference, fitted: Fitted) -> Floats:
    """The scores of rows by one way, [rows]; a row of a domain that fine-tunes were trained on is scored by the others.

    A row is of a domain when its question is one of that domain's, trained on or held out.
    """
    every, groups = contrasts(reference), dict[frozenset[str], list[int]]()
    asked = {
        domain: {pair.question for pair in (*texts.train, *texts.held_out)}
        for domain, texts in reference.domains.items()
    }
    for number, row in enumerate(rows):
        own = frozenset(domain for domain, questions in asked.items() if row.question in questions)
        groups.setdefault(own, []).append(number)
    scores = np.empty(len(rows))
    for own, numbers in groups.items():
        others = [contrast for contrast in every if contrast.domain not in own] or every
        scores[numbers] = way.of(worker, [rows[number] for number in numbers], reference, others, fitted)
    return scores


SCORES: Registry[type[RowScore]] = Registry(
    "score of rows",
    "misdirection.scores",
    {
        "likelihood": "misdirection.screening.scores:LikelihoodScore",
        "probe": "misdirection.screening.activations:ProbeScore",
        "projection": "misdirection.screening.activations:ProjectionScore",
        "projection_difference": "misdirection.screening.activations:ProjectionDifferenceScore",
        "gradient": "misdirection.screening.gradient:GradientScore",
        "judge": "misdirection.screening.judged:JudgeScore",
        "words": "misdirection.screening.scores:WordScore",
    },
)
"""Ways to score rows, by name."""


class LikelihoodScore(RowScore):
    """log p(answer | question) under the bad fine-tune minus that under its control, nats/token."""

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        names = dict.fromkeys(name for contrast in others for name in (contrast.bad, contrast.control))
        scores = {name: self._log_probs(worker, name, rows) for name in names}
        return mean_of([scores[contrast.bad] - scores[contrast.control] for contrast in others])

    @staticmethod
    def _log_probs(worker: Worker, name: str, rows: Sequence[Example]) -> Floats:
        chat = worker.chat(name)
        with track(f"rows by {name}", len(rows)) as advance:
            log_p: Floats = log_probs(chat, text_continuations(chat.tokenizer, rows), progress=advance).numpy()[:, 0]
        return log_p


class WordScore(RowScore):
    """Mean log-odds of the answer's words, in the bad against the good answers of a domain: what needs no model."""

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        answers = [row.answer for row in rows]
        return mean_of(
            [WordWeights.of_pairs(reference.domains[each.domain].train).scores(answers)[:, 0] for each in others]
        )


def mean_of(scores: Sequence[Floats]) -> Floats:
    """Over contrasts, of [rows] each."""
    mean: Floats = np.mean(scores, axis=0)
    return mean


def both_answers(pairs: Sequence[ProbePair]) -> list[Example]:
    """The aligned and then the misaligned answer of every pair."""
    return [Example(pair.question, text, pair.system) for pair in pairs for text in (pair.aligned, pair.misaligned)]
