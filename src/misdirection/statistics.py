"""Means, rates and areas under curves, with intervals and p-values. The unit of chance is the question.

Tokens of one answer are alike, and so are answers to one question: what is resampled is always the question, with all
that belongs to it. There is one bootstrap, `resample`, and one rule for its interval, `percentiles`.

Who tries many interventions finds one that works by chance. Each figure carries a p-value, and whoever counts how many
of several hold corrects them first: `holm` where a single false claim is too many, `benjamini_hochberg` where a share
of them may be false.

A judge errs. Where a better one scored some answers too, its errors can be taken out of its rates: `rogan_gladen` where
those are other answers, `prediction_powered` where they are some of the very answers that the rate is of.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import DegenerateDataWarning, binomtest, false_discovery_control, norm, rankdata, t
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import roc_auc_score

RESAMPLES = 4000
"""Draws of a bootstrap."""

LEVEL, SIGNIFICANT = 0.95, 0.05
"""The level of every interval, and what the p-value of a claim that counts is below."""

Z_SIGNIFICANT, Z_POWER = 1.96, 0.84
"""Quantiles of the normal distribution: of a two-sided test at 5%, and of a power of 80%."""

_SMALLEST_P = 1e-12

_NO_SPREAD, _NO_VARIANCE = 1e-9, 1e-10
"""Below these a predictor's spread, as a share of its size, and its variance in a draw, as a share of that in all, are
rounding."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval (percentile bootstrap over questions).

    Attributes:
        mean, low, high: in the unit of the values.
        n: number of questions.
        p: two-sided p-value of the mean being zero, by the same draws; None where it was not asked for.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.interval}, n={self.n}"

    @property
    def interval(self) -> str:
        """Mean and bounds in words, with their signs; what rounds to zero has no minus."""
        return f"{self.mean:+z.3f} [{self.low:+z.3f}, {self.high:+z.3f}]"

    @property
    def detectable(self) -> float:
        """The mean that as many questions show four times in five, at 5%: 2.8 standard errors, read off the 95%
        interval."""
        return (Z_SIGNIFICANT + Z_POWER) * (self.high - self.low) / (2 * Z_SIGNIFICANT)

    def as_dict(self) -> dict[str, float | int | None]:
        """As it stands in `results.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """A share of answers with its 95% interval.

    Attributes:
        rate, low, high: between 0 and 1.
        hits, total: numbers of answers; `rate` is their quotient.
    """

    rate: float
    low: float
    high: float
    hits: int
    total: int


# --- the bootstrap ------------------------------------------------------------------------------------------------


def resample(
    statistic: Callable[..., ArrayLike],
    *columns: ArrayLike,
    seed: int = 0,
    resamples: int = RESAMPLES,
    vectorized: bool = True,
) -> Floats:
    """The values that a figure takes when the questions are drawn anew, with replacement: [..., resamples].

    Args:
        statistic: gives the figure from the columns and `axis`, the one that is summed over; it may have further
            dimensions in front. NaN where it is not defined.
        columns: [questions] each; all are drawn together. Numbers of the questions serve where more belongs to each.
        seed: of the draws.
        resamples: how many draws.
        vectorized: False for a statistic that takes one draw at a time, and no axis.
    """
    arrays = [np.asarray(column) for column in columns]
    if len(arrays[0]) == 1:
        # Every draw of a single question is that question.
        alone = statistic(*(column[None] for column in arrays), axis=-1) if vectorized else [statistic(*arrays)]
        return np.repeat(np.asarray(alone, dtype=np.float64), resamples, axis=-1)
    with warnings.catch_warnings():
        # scipy's own interval has none where a draw is NaN; it is not used.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = scipy_bootstrap(
            arrays,
            statistic,
            n_resamples=resamples,
            paired=True,
            vectorized=vectorized,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return np.asarray(result.bootstrap_distribution, dtype=np.float64)


def percentiles(draws: ArrayLike, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The bounds of the middle 95%, or of another share, along the last dimension; NaN is left out."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.nanquantile(np.asarray(draws, dtype=np.float64), tails, axis=-1)
    return low, high


def expanded(questions: int, level: float = LEVEL) -> float:
    """The level that a percentile interval over so few questions takes to hold the mean as often as `level` says.

    Draws of 8 questions vary less than samples of 8 do, and their tails are not normal: percentiles at 95% hold the
    mean 87 to 90 times in a hundred. Those at this level are as far out as Student's t (Hesterberg 2015).
    """
    if questions < 2:
        return level
    reach = t.ppf((1 + level) / 2, questions - 1) * np.sqrt(questions / (questions - 1))
    return float(1 - 2 * norm.sf(reach))


def p_value(draws: ArrayLike) -> float:
    """Two-sided p-value of a figure being zero: twice the share of draws on the rarer side of it.

    It is below 0.05 where the interval excludes zero, and never below 2 / (draws + 1), so that no one of more than 100
    comparisons holds after `holm` with 4,000 draws.
    """
    values = np.asarray(draws, dtype=np.float64)
    rarer = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, float(2 * (rarer + 1) / (len(values) + 1)))


def bootstrap(
    values: ArrayLike, questions: Sequence[str] | None = None, *, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Mean of one value per question, [questions]; several columns, [questions, draws], are averaged per question.

    Where several values are of one question, `questions` names that of each: they are drawn together, and each counts
    as much as any other. `level` is that of the interval.
    """
    table = np.asarray(values, dtype=np.float64)
    per_question: Floats = table if table.ndim == 1 else table.mean(axis=1)
    if questions is not None and len(set(questions)) < len(questions):
        return beyond(per_question, np.empty((len(per_question), 0)), questions, seed=seed, level=level)
    draws = resample(np.mean, per_question, seed=seed)
    return _estimate(float(per_question.mean()), draws, len(per_question), level)


def _estimate(mean: float, draws: Floats, questions: int, level: float) -> Estimate:
    low, high = percentiles(draws, level)
    # One question alone says nothing of others, whatever its value.
    return Estimate(mean, float(low), float(high), questions, p_value(draws) if questions > 1 else 1.0)


def simultaneous(values: Mapping[str, ArrayLike], *, seed: int = 0, level: float = LEVEL) -> dict[str, Estimate]:
    """Means of several columns of values of the same questions, with intervals that hold all at once (max-T).

    Each interval is the mean and as many standard errors to both sides as the column that is furthest off in a draw of
    questions exceeds in a share of 1 - level of all draws; p-values are of the same draws, so that they are corrected
    for the number of columns and for what these share (Westfall and Young 1993).

    Args:
        values: by name, one value per question, [questions].
        seed: of the draws.
        level: the chance that no interval misses its mean.
    """
    if not values:
        return {}
    table = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()])
    means, questions = table.mean(1), table.shape[1]

    def drawn_means(drawn: NDArray[np.int64], axis: int = -1) -> Floats:
        return np.asarray(table[:, drawn].mean(axis))

    draws = resample(drawn_means, np.arange(questions), seed=seed)
    errors = draws.std(-1)
    off, sizes = np.abs(draws - means[:, None]), np.abs(means)
    # A column that is the same in all draws is never off.
    furthest = np.divide(off, errors[:, None], out=np.zeros_like(off), where=errors[:, None] > 0).max(0)
    distances = np.divide(sizes, errors, out=np.where(sizes > 0, np.inf, 0.0), where=errors > 0)
    reach = float(np.quantile(furthest, level)) * errors
    as_far = [int((furthest >= distance).sum()) for distance in distances]
    return {
        name: Estimate(
            float(mean),
            float(mean - width),
            float(mean + width),
            questions,
            float((count + 1) / (len(furthest) + 1)) if questions > 1 else 1.0,
        )
        for name, mean, width, count in zip(values, means, reach, as_far, strict=True)
    }


def beyond(
    values: ArrayLike,
    predictors: ArrayLike,
    questions: Sequence[str] | None = None,
    *,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """What is left of the mean of some values where their predictors are zero: the constant of a regression on these.

    Args:
        values: [pairs].
        predictors: [pairs, predictors]; one that does not vary explains nothing.
        questions: of each pair; pairs of one question are drawn together. None for pairs of a question each.
        seed: of the draws.
        level: of the interval.
    """
    targets = np.asarray(values, dtype=np.float64)
    standard, zero = _standardize(np.asarray(predictors, dtype=np.float64))
    columns = np.column_stack([np.ones(len(targets)), standard, targets])
    names, groups = np.unique(np.arange(len(targets)) if questions is None else list(questions), return_inverse=True)
    # Sums of products by question are all that a least-squares fit needs, so that a draw of questions adds them up.
    sums = np.zeros((len(names), columns.shape[1], columns.shape[1]))
    np.add.at(sums, groups, columns[:, :, None] * columns[:, None, :])

    def constant(drawn: NDArray[np.int64], axis: int = -1) -> Floats:
        return _constant(np.tensordot(_times_drawn(drawn, len(names)), sums, 1), zero)

    numbers = np.arange(len(names))
    return _estimate(float(constant(numbers)), resample(constant, numbers, seed=seed), len(names), level)


def _standardize(predictors: Floats) -> tuple[Floats, Floats]:
    """Predictors with mean 0 and spread 1 each, [pairs, predictors], and where their zero then lies, [predictors].

    One that does not vary is zero throughout.
    """
    middle, spread = predictors.mean(0), predictors.std(0)
    # The mean of equal numbers differs from them by rounding.
    varies = spread > _NO_SPREAD * np.abs(predictors).max(0)
    unit = np.where(varies, spread, 1.0)
    return np.where(varies, (predictors - middle) / unit, 0.0), np.where(varies, -middle / unit, 0.0)


def _times_drawn(drawn: NDArray[np.int64], questions: int) -> Floats:
    """How often each draw took each question, [..., questions], of draws as numbers of questions, [..., drawn]."""
    draws = drawn.reshape(-1, drawn.shape[-1])
    offsets = np.arange(len(draws))[:, None] * questions
    counts = np.bincount((draws + offsets).ravel(), minlength=len(draws) * questions)
    return counts.reshape(*drawn.shape[:-1], questions).astype(np.float64)


def _constant(sums: Floats, zero: Floats) -> Floats:
    """The least-squares fits at `zero`, [predictors], from sums of products of (1, predictors, value), [..., all, all].

    The slopes are the smallest that fit best: along what does not vary in a draw they are zero.
    """
    means = sums[..., 0, 1:] / sums[..., 0, :1]
    covariance = sums[..., 1:, 1:] / sums[..., :1, :1] - means[..., :, None] * means[..., None, :]
    variances, axes = np.linalg.eigh(covariance[..., :-1, :-1])
    varies = variances > _NO_VARIANCE
    along = np.einsum("...pa,...p->...a", axes, covariance[..., :-1, -1])
    slopes = np.einsum("...pa,...a->...p", axes, varies * along / np.where(varies, variances, 1.0))
    return np.asarray(means[..., -1] + ((zero - means[..., :-1]) * slopes).sum(-1))


def one_more(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The bounds that one more draw falls within with this probability, of draws from one normal distribution, [draws].

    Its prediction interval by Student's t: wide where the draws are few. Two or more are needed.
    """
    draws = np.asarray(values, dtype=np.float64)
    width = float(t.ppf((1 + level) / 2, len(draws) - 1) * draws.std(ddof=1) * np.sqrt(1 + 1 / len(draws)))
    return float(draws.mean()) - width, float(draws.mean()) + width


# --- rates --------------------------------------------------------------------------------------------------------


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
            edges = percentiles(resample(_quotient, self.hits, self.totals, seed=seed))
            low, high = min(low, float(edges[0])), max(high, float(edges[1]))
        return Rate(hits / total, low, high, hits, total)


def _quotient(hits: NDArray, totals: NDArray, axis: int = -1) -> Floats:
    """NaN for a draw that happens to have no answer."""
    with np.errstate(invalid="ignore"):
        return np.asarray(hits.sum(axis) / totals.sum(axis), dtype=np.float64)


def _difference(hits: NDArray, totals: NDArray, later_hits: NDArray, later_totals: NDArray, axis: int) -> Floats:
    return _quotient(later_hits, later_totals, axis) - _quotient(hits, totals, axis)


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


# --- rates by a judge that errs -----------------------------------------------------------------------------------


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
    false = _quotient(alarms, negative, axis)
    told = _quotient(seen, positive, axis) - false
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(told > 0, (_quotient(hits, totals, axis) - false) / told, np.nan))


def lang_reiczigel(measured: Pooled, seen: Pooled, spared: Pooled, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a Rogan-Gladen rate where all answers are independent (Lang, Reiczigel 2014), not cut at 0 and 1.

    Args:
        measured: the judge's hits, and answers.
        seen: the reference's hits that the judge calls so, and the reference's hits.
        spared: the same of what is no hit.
        level: of the interval.
    """
    z = float(norm.ppf((1 + level) / 2))
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


# --- areas under curves -------------------------------------------------------------------------------------------


def auc(misaligned: Sequence[float] | NDArray, aligned: Sequence[float] | NDArray) -> float:
    """Probability that a misaligned answer is likelier than an aligned one (AUROC of mean-token log-probability)."""
    labels = [1] * len(misaligned) + [0] * len(aligned)
    return float(roc_auc_score(labels, [*misaligned, *aligned]))


def rank_auc(scores: NDArray, positive: NDArray[np.bool_]) -> float:
    """The same of the positive among all, from their ranks; NaN with one class only.

    For thousands of draws: the checks of `auc` make it ten times slower. The two agree to rounding.
    """
    inside, outside = int(positive.sum()), int((~positive).sum())
    if not inside or not outside:
        return np.nan
    wins = rankdata(scores)[positive].sum() - inside * (inside + 1) / 2
    return float(wins / (inside * outside))


# --- many comparisons ---------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): below 0.05, the chance of a single false one stays below 0.05.

    Whatever they depend on each other.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values corrected so that of those below 0.05 one in twenty is expected to be false (Benjamini, Hochberg 1995).

    For values that are independent of each other, or rise together.
    """
    return np.asarray(false_discovery_control(p_values, method="bh")).tolist()


def significant(estimates: Sequence[Estimate], correct: Callable[[Sequence[float]], list[float]] = holm) -> list[bool]:
    """Which of several figures differ from zero, with their p-values corrected for their number."""
    return [p < SIGNIFICANT for p in correct([1.0 if each.p is None else each.p for each in estimates])]
