"""The unit of scores: what the reference's own good and bad answers score, by fine-tunes of the other domains.

Several scores are one after each is divided by its own spread: the standard deviation among answers of one kind.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.results import Figures
from misdirection.runs.worker import Worker
from misdirection.screening.scores import Fitted, RowScore, both_answers, score_rows
from misdirection.statistics.curves import auc
from misdirection.statistics.resampling import Floats

ROWS = 48
"""Held-out questions of each domain, each with a good and a bad answer."""


Kind = Literal["good", "bad"]
_KINDS: tuple[Kind, ...] = ("good", "bad")


class Scale(Figures):
    """What known answers score, by one way, in its own unit."""

    good: tuple[float | None, ...]
    bad: tuple[float | None, ...]
    """Of the same questions, in the same order; None for an answer that has no score."""

    @property
    def spread(self) -> float:
        """Standard deviation among answers of one kind."""
        variances = [np.var(_scored(self.known(kind))) for kind in _KINDS]
        return float(np.sqrt(np.mean(variances))) or 1.0

    def standard(self, scores: Floats) -> Floats:
        """Scores minus the mean of the good answers, in units of the spread."""
        standard: Floats = (scores - _scored(self.known("good")).mean()) / self.spread
        return standard

    @property
    def auc(self) -> float:
        """AUROC of the bad against the good answers."""
        return auc(_scored(self.known("bad")), _scored(self.known("good")))

    def known(self, kind: Kind) -> Floats:
        """The scores of one kind, [questions]; NaN where there is none."""
        return np.array(getattr(self, kind), np.float64)


def share(scores: Mapping[str, Floats], scales: Mapping[str, Scale]) -> Floats:
    """Scores by several ways as one, in the reference's unit: 0 is the mean of its good answers, 1 that of its bad.

    A row that one way gives no score has that of the others.
    """
    shares: Floats = _together(scores, scales) / _scored(_together(_known(scales, "bad"), scales)).mean()
    return shares


def known_shares(scales: Mapping[str, Scale]) -> tuple[Floats, Floats]:
    """The same of the reference's good and of its bad answers."""
    return share(_known(scales, "good"), scales), share(_known(scales, "bad"), scales)


def combined_auc(scales: Mapping[str, Scale]) -> float:
    """AUROC of the reference's bad against its good answers by several scores as one."""
    good, bad = map(_scored, known_shares(scales))
    return auc(bad, good)


def _known(scales: Mapping[str, Scale], kind: Kind) -> dict[str, Floats]:
    return {name: scale.known(kind) for name, scale in scales.items()}


def _together(scores: Mapping[str, Floats], scales: Mapping[str, Scale]) -> Floats:
    standard = [scale.standard(scores[name]) for name, scale in scales.items()]
    there = ~np.isnan(standard)
    # NaN where no way has a score, without a warning.
    mean: Floats = np.where(there, standard, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)
    return mean


def _scored(scores: Floats) -> Floats:
    """Without those that are missing."""
    there: Floats = scores[~np.isnan(scores)]
    return there


def known_answers(reference: Reference) -> list[Example]:
    """A good and a bad answer to each of some questions that no fine-tune of the reference was trained on."""
    texts = reference.domains.values()
    return both_answers([pair for each in texts for pair in spread(each.held_out or each.train, ROWS)])


def make_scale(name: str, way: RowScore, worker: Worker, reference: Reference, fitted: Fitted) -> Scale:
    """Score known answers by the fine-tunes of the reference's other domains.

    Raises `InputError` for a way that does not tell the bad from the good at all: its scores have no unit.
    """
    scores = score_rows(way, worker, known_answers(reference), reference, fitted).reshape(-1, 2)
    good, bad = map(_scored, scores.T)
    if not (len(good) and len(bad) and good.mean() != bad.mean()):
        raise InputError(f"score {name}: does not tell the reference's bad answers from its good ones: use another")
    values = [[None if np.isnan(score) else float(score) for score in each] for each in scores.T]
    return Scale(good=tuple(values[0]), bad=tuple(values[1]))
