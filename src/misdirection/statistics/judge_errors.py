"""Rates by a judge that errs, with its errors taken out where a better one scored some answers, too.

`rogan_gladen` where those are other answers, `prediction_powered` where they are some of the very answers that the rate
is of.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from misdirection.statistics.estimates import LEVEL, Estimate
from misdirection.statistics.rates import Counts, Pooled, quotient, rate_change
from misdirection.statistics.resampling import Floats, expanded, percentiles, resample


@dataclass(frozen=True, eq=False)
class Confusion:
    """Answers that a judge and a reference both scored, counted in each question by who says that it is a hit.

    Attributes:
        both, judge_only, reference_only, neither: [questions] each.
    """

    both: NDArray[np.int64]
    judge_only: NDArray[np.int64]
    reference_only: NDArray[np.int64]
    neither: NDArray[np.int64]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Answers of each question, [questions]."""
        return self.both + self.judge_only + self.reference_only + self.neither

    @property
    def seen(self) -> Counts:
        """The judge's hits among the reference's: its sensitivity."""
        return Counts(self.both, self.both + self.reference_only)

    @property
    def spared(self) -> Counts:
        """What the judge calls no hit among what is none by the reference: its specificity."""
        return Counts(self.neither, self.judge_only + self.neither)

    @property
    def alarms(self) -> Counts:
        """The judge's hits among what is none by the reference: one minus its specificity."""
        return Counts(self.judge_only, self.judge_only + self.neither)

    def youden(self, *, seed: int = 0) -> Estimate | None:
        """Sensitivity + specificity - 1, as `rate_change` has it; None where the reference knows one class only."""
        if not (self.seen.pooled[1] and self.alarms.pooled[1]):
            return None
        return rate_change(self.alarms, self.seen, seed=seed)


def rogan_gladen(measured: Counts, confusion: Confusion, *, seed: int = 0) -> Estimate:
    """The rate that the reference would find, from a judge's rate and its errors on other answers (Rogan, Gladen 1978).

        rate = (measured + specificity - 1) / (sensitivity + specificity - 1)

    It holds where the judge errs on these answers as it does on those, and it is not cut: below 0 or above 1 it tells
    that this is not so, or that chance is as large as the rate. The interval resamples questions, on both sides at
    once (`expanded`), and is never narrower than `lang_reiczigel`, that of the answers.

    Args:
        measured: the judge's hits, [questions].
        confusion: the judge beside the reference, of the same questions in the same order; a question that one side
            does not have counts no answer there.
        seed: of the bootstrap.
    """
    seen, alarms = confusion.seen, confusion.alarms
    columns = (measured.hits, measured.totals, seen.hits, seen.totals, alarms.hits, alarms.totals)
    asked, known = (int((totals > 0).sum()) for totals in (measured.totals, confusion.totals))
    edges = percentiles(resample(_without_errors, *columns, seed=seed), expanded(min(asked, known)))
    low, high = lang_reiczigel(measured.pooled, seen.pooled, confusion.spared.pooled)
    return Estimate(float(_without_errors(*columns)), min(low, float(edges[0])), max(high, float(edges[1])), asked)


def _without_errors(
    hits: NDArray, totals: NDArray, seen: NDArray, positive: NDArray, alarms: NDArray, negative: NDArray, axis: int = -1
) -> Floats:
    """NaN for a draw in which the judge tells nothing apart."""
    false = quotient(alarms, negative, axis)
    told = quotient(seen, positive, axis) - false
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(told > 0, (quotient(hits, totals, axis) - false) / told, np.nan))


def lang_reiczigel(measured: Pooled, seen: Pooled, spared: Pooled) -> tuple[float, float]:
    """The interval of a Rogan-Gladen rate where all answers are independent (Lang, Reiczigel 2014), not cut at 0 and 1.

    Args:
        measured: the judge's hits, and answers.
        seen: the reference's hits that the judge calls so, and the reference's hits.
        spared: the same of what is no hit.
    """
    z = float(norm.ppf((1 + LEVEL) / 2))
    answers = measured[1] + z**2
    share = (measured[0] + z**2 / 2) / answers
    sensitivity, specificity = ((hits + 1) / (total + 2) for hits, total in (seen, spared))
    told = sensitivity + specificity - 1
    rate = (share + specificity - 1) / told
    of_seen, of_spared = (
        value * (1 - value) / (total + 2) for value, (_, total) in ((sensitivity, seen), (specificity, spared))
    )
    variance = (share * (1 - share) / answers + rate**2 * of_seen + (1 - rate) ** 2 * of_spared) / told**2
    middle = rate + 2 * z**2 * (rate * of_seen - (1 - rate) * of_spared) / told**2
    return middle - z * math.sqrt(variance), middle + z * math.sqrt(variance)


def prediction_powered(labelled: Confusion, others: Counts, *, seed: int = 0) -> Estimate:
    """The rate that the reference would find, where it scored some of the answers and a judge all (PPI++).

    In each question, of all its answers,

        rate = mean(reference) + weight (mean(judge, the others) - mean(judge, labelled))

    and the rate is the mean over all answers. It holds for every judge, if the labelled answers were drawn from each
    question's by chance; the better the judge, the narrower. The weight, 0 to 1, is the one that makes the variance
    within questions the smallest (Angelopoulos, Duchi and Zrnic 2023), chosen anew in each draw of questions. The
    interval (`expanded`) is never narrower than that of independent answers, with half an answer added to each kind.

    Args:
        labelled: the judge beside the reference, [questions]; each question has some.
        others: the judge's hits among the answers that the reference has not scored, [questions].
        seed: of the bootstrap.
    """
    judged = (labelled.both, labelled.judge_only, labelled.reference_only, labelled.neither)
    columns = (*judged, others.hits, others.totals)
    questions = len(others.totals)
    edges = percentiles(resample(_powered, *columns, seed=seed), expanded(questions))
    low, high = _powered_alone(columns)
    return Estimate(float(_powered(*columns)), min(low, float(edges[0])), max(high, float(edges[1])), questions)


def _powered(*cells: NDArray, axis: int = -1) -> Floats:
    rates, changes, weights, shares = _by_question(cells, axis)
    return np.asarray((shares * (rates + weights * changes)).sum(axis))


def _by_question(cells: tuple[NDArray, ...], axis: int) -> tuple[Floats, Floats, Floats, Floats]:
    """The reference's rate in each question, how the judge's rates differ there, the weight of that (the same in all
    of a draw), and the question's share of all answers.

    `cells` are those of a `Confusion`, the judge's hits among the other answers, and these.
    """
    both, judge_only, reference_only, neither, hits, others = cells
    labelled, judged = both + judge_only + reference_only + neither, both + judge_only
    everything, own = labelled + others, judged / labelled
    rate = (both + reference_only) / labelled
    shares = everything / everything.sum(axis, keepdims=True)
    beyond = np.divide(hits, others, out=own.astype(np.float64), where=others > 0)
    covariance = both / labelled - rate * own
    mean = (judged + hits) / everything
    variance = mean * (1 - mean) * (1 / labelled + 1 / np.maximum(others, 1))
    counted = shares**2 * (others > 0)
    told, spread = ((counted * each).sum(axis, keepdims=True) for each in (covariance / labelled, variance))
    weights = np.clip(np.divide(told, spread, out=np.zeros_like(told), where=spread > 0), 0, 1)
    return rate, beyond - own, weights, shares


def _powered_alone(columns: tuple[NDArray, ...]) -> tuple[float, float]:
    """The normal interval of PPI++ where all answers are independent, with half an answer added to each of four kinds.

    Otherwise a few labelled answers without a hit would seem to prove that there is none.
    """
    both, judge_only, reference_only, neither, hits, others = (
        np.array([column.sum() + half]) for column, half in zip(columns, (0.5, 0.5, 0.5, 0.5, 0, 0), strict=True)
    )
    rate, change, weight, _ = _by_question((both, judge_only, reference_only, neither, hits, others), -1)
    labelled, share = both + judge_only + reference_only + neither, hits / np.maximum(others, 1)
    # Of reference - weight x judge, which is 1 - weight, -weight, 1 or 0.
    mean = ((1 - weight) * both - weight * judge_only + reference_only) / labelled
    squares = ((1 - weight) ** 2 * both + weight**2 * judge_only + reference_only) / labelled
    variance = (squares - mean**2) / labelled + weight**2 * share * (1 - share) / np.maximum(others, 1)
    middle, width = rate + weight * change, norm.ppf((1 + LEVEL) / 2) * np.sqrt(variance)
    return float((middle - width)[0]), float((middle + width)[0])
