"""Shares of answers with their intervals, and how they differ between two conditions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest

from misdirection.statistics.estimates import LEVEL, Estimate, Rate
from misdirection.statistics.resampling import Floats, p_value, percentiles, resample

_SMALLEST_P = 1e-12

Pooled = tuple[int, int]
"""Hits and answers of all questions together."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Answers counted in each question.

    Attributes:
        hits, totals: of each question, [questions].
    """

    hits: NDArray[np.int64]
    totals: NDArray[np.int64]

    @property
    def pooled(self) -> Pooled:
        """Hits and answers of all questions together."""
        return int(self.hits.sum()), int(self.totals.sum())

    def rate(self, *, seed: int = 0) -> Rate | None:
        """Hits among all answers; None when there is no answer.

        The interval is that over questions, widened to Wilson's of the answers where that is larger: with one question
        it is Wilson's; with several it keeps 0 of 400 from being shown as exactly zero.
        """
        hits, total = self.pooled
        if not total:
            return None
        low, high = wilson(hits, total)
        if len(self.hits) > 1:
            edges = percentiles(resample(quotient, self.hits, self.totals, seed=seed))
            low, high = min(low, float(edges[0])), max(high, float(edges[1]))
        return Rate(hits / total, low, high, hits, total)


def quotient(hits: NDArray, totals: NDArray, axis: int = -1) -> Floats:
    """Hits over answers, each summed over the questions of a draw; NaN for one that happens to have no answer."""
    with np.errstate(invalid="ignore"):
        return np.asarray(hits.sum(axis) / totals.sum(axis), dtype=np.float64)


def _difference(hits: NDArray, totals: NDArray, later_hits: NDArray, later_totals: NDArray, axis: int) -> Floats:
    return quotient(later_hits, later_totals, axis) - quotient(hits, totals, axis)


def rate_change(before: Counts, after: Counts, *, seed: int = 0) -> Estimate:
    """The rate after minus the rate before, on the same questions.

    The interval resamples questions, the same ones for both, and is never narrower than Newcombe's for two independent
    shares; the p-value is likewise the larger of the two.
    """
    draws = resample(_difference, before.hits, before.totals, after.hits, after.totals, seed=seed)
    edges, shares = percentiles(draws), (before.pooled, after.pooled)
    low, high = newcombe(*shares)
    return Estimate(
        _share(shares[1]) - _share(shares[0]),
        min(low, float(edges[0])),
        max(high, float(edges[1])),
        len(before.hits),
        max(p_value(draws), _newcombe_p(*shares)),
    )


def _share(pooled: Pooled) -> float:
    return pooled[0] / pooled[1]


def wilson(hits: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The Wilson score interval of a binomial share."""
    interval = binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(before: Pooled, after: Pooled, level: float = LEVEL) -> tuple[float, float]:
    """The interval of after - before for two independent shares (Newcombe 1998, method 10: from Wilson's)."""
    (low_1, high_1), (low_2, high_2) = wilson(*before, level), wilson(*after, level)
    first, second = _share(before), _share(after)
    below = np.hypot(second - low_2, high_1 - first)
    above = np.hypot(high_2 - second, first - low_1)
    return second - first - float(below), second - first + float(above)


def _newcombe_p(before: Pooled, after: Pooled) -> float:
    """One minus the level from which on Newcombe's interval holds zero."""

    def nearest(p: float) -> float:
        low, high = newcombe(before, after, 1 - p)
        return max(low, -high)

    if nearest(1 - _SMALLEST_P) <= 0:
        return 1.0
    return _SMALLEST_P if nearest(_SMALLEST_P) > 0 else float(brentq(nearest, _SMALLEST_P, 1 - _SMALLEST_P))
