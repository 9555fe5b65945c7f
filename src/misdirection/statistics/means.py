"""Means over questions with their intervals: plain, of several columns at once, and beyond what predictors explain."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from misdirection.statistics.estimates import LEVEL, Estimate
from misdirection.statistics.resampling import Floats, p_value, percentiles, resample

_NO_SPREAD, _NO_VARIANCE = 1e-9, 1e-10
"""Below these a predictor's spread, as a share of its size, and its variance in a draw, as a share of that in all, are
rounding."""


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


def simultaneous(values: Mapping[str, ArrayLike], *, level: float = LEVEL) -> dict[str, Estimate]:
    """Means of several columns of values of the same questions, with intervals that hold all at once (max-T).

    Each interval is the mean and as many standard errors to both sides as the column that is furthest off in a draw of
    questions exceeds in a share of 1 - level of all draws; p-values are of the same draws, so that they are corrected
    for the number of columns and for what these share (Westfall and Young 1993).

    Args:
        values: by name, one value per question, [questions].
        level: the chance that no interval misses its mean.
    """
    if not values:
        return {}
    table = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()])
    means, questions = table.mean(1), table.shape[1]

    def drawn_means(drawn: NDArray[np.int64], axis: int = -1) -> Floats:
        return np.asarray(table[:, drawn].mean(axis))

    draws = resample(drawn_means, np.arange(questions))
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
