"""The unit of scores: what the reference's own good and bad answers score, by fine-tunes of the other domains.

Several scores are one after each is divided by its own spread: the standard deviation among answers of one kind.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from misdirection.auditing.reference import Reference
from misdirection.data.selection import spread
from misdirection.results import Figures
from misdirection.runs.worker import Worker
from misdirection.screening.scores import Fitted, both_answers, score_rows
from misdirection.statistics.curves import auc
from misdirection.statistics.resampling import Floats

ROWS = 48
"""Held-out questions of each domain, each with a good and a bad answer."""


class Scale(Figures):
    """What known answers score, by one way, in its own unit."""

    good: tuple[float, ...]
    bad: tuple[float, ...]
    """Of the same questions, in the same order."""

    @property
    def spread(self) -> float:
        """Standard deviation among answers of one kind."""
        return float(np.sqrt((np.var(self.good) + np.var(self.bad)) / 2)) or 1.0

    def standard(self, scores: Floats) -> Floats:
        """Scores minus the mean of the good answers, in units of the spread."""
        standard: Floats = (scores - np.mean(self.good)) / self.spread
        return standard

    @property
    def auc(self) -> float:
        """AUROC of the bad against the good answers."""
        return auc(np.array(self.bad), np.array(self.good))


def share(scores: Mapping[str, Floats], scales: Mapping[str, Scale]) -> Floats:
    """Scores by several ways as one, in the reference's unit: 0 is the mean of its good answers, 1 that of its bad."""
    shares: Floats = _together(scores, scales) / _together(_known(scales, "bad"), scales).mean()
    return shares


def known_shares(scales: Mapping[str, Scale]) -> tuple[Floats, Floats]:
    """The same of the reference's good and of its bad answers."""
    return share(_known(scales, "good"), scales), share(_known(scales, "bad"), scales)


def combined_auc(scales: Mapping[str, Scale]) -> float:
    """AUROC of the reference's bad against its good answers by several scores as one."""
    good, bad = known_shares(scales)
    return auc(bad, good)


def _known(scales: Mapping[str, Scale], kind: Literal["good", "bad"]) -> dict[str, Floats]:
    return {name: np.array(getattr(scale, kind)) for name, scale in scales.items()}


def _together(scores: Mapping[str, Floats], scales: Mapping[str, Scale]) -> Floats:
    mean: Floats = np.mean([scale.standard(scores[name]) for name, scale in scales.items()], axis=0)
    return mean


def make_scale(name: str, worker: Worker, reference: Reference, fitted: Fitted) -> Scale:
    """Score known answers, which no fine-tune was trained on, by the fine-tunes of the reference's other domains."""
    texts = reference.domains.values()
    pairs = [pair for each in texts for pair in spread(each.held_out or each.train, ROWS)]
    good, bad = score_rows(name, worker, both_answers(pairs), reference, fitted).reshape(-1, 2).T.tolist()
    return Scale(good=good, bad=bad)
