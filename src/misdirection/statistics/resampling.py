"""The one bootstrap, over questions, and how its draws become intervals and p-values."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, norm, t
from scipy.stats import bootstrap as scipy_bootstrap

from misdirection.statistics.estimates import LEVEL

RESAMPLES = 4000
"""Draws of a bootstrap."""

RANKED_RESAMPLES = 1000
"""Fewer, where each draw ranks all answers anew."""

Floats = NDArray[np.float64]


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
        if not vectorized:
            return np.repeat(np.asarray(statistic(*arrays), dtype=np.float64)[..., None], resamples, axis=-1)
        alone = statistic(*(column[None] for column in arrays), axis=-1)
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


def resample_rows(
    figure: Callable[[NDArray[np.int64]], ArrayLike], questions: Sequence[NDArray[np.int64]], *, seed: int = 0
) -> Floats:
    """The same of a figure that is taken of all rows of a draw together, such as a rank correlation.

    Args:
        figure: of rows, given by their numbers; one value or several.
        questions: the numbers of the rows that belong to each.
        seed: of the draws, `RANKED_RESAMPLES` of them.
    """

    def drawn(chosen: NDArray[np.int64]) -> ArrayLike:
        return figure(np.concatenate([questions[number] for number in chosen]))

    numbers = np.arange(len(questions))
    return resample(drawn, numbers, seed=seed, resamples=RANKED_RESAMPLES, vectorized=False)


def percentiles(draws: ArrayLike, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The bounds of the middle 95%, or of another share, along the last dimension; NaN is left out."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.nanquantile(np.asarray(draws, dtype=np.float64), tails, axis=-1)
    return low, high


def expanded(questions: int) -> float:
    """The level that a percentile interval over so few questions takes to hold the mean 95 times in a hundred.

    Draws of 8 questions vary less than samples of 8 do, and their tails are not normal: percentiles at 95% hold the
    mean 87 to 90 times in a hundred. Those at this level are as far out as Student's t (Hesterberg 2015).
    """
    if questions < 2:
        return LEVEL
    reach = t.ppf((1 + LEVEL) / 2, questions - 1) * np.sqrt(questions / (questions - 1))
    return float(1 - 2 * norm.sf(reach))


def p_value(draws: ArrayLike) -> float:
    """Two-sided p-value of a figure being zero: twice the share of draws on the rarer side of it.

    It is below 0.05 where the interval excludes zero, and never below 2 / (draws + 1), so that no one of more than 100
    comparisons holds after `holm` with 4,000 draws.
    """
    values = np.asarray(draws, dtype=np.float64)
    rarer = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, float(2 * (rarer + 1) / (len(values) + 1)))


def one_more(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The bounds that one more draw falls within with this probability, of draws from one normal distribution, [draws].

    Its prediction interval by Student's t: wide where the draws are few. Two or more are needed.
    """
    draws = np.asarray(values, dtype=np.float64)
    width = float(t.ppf((1 + level) / 2, len(draws) - 1) * draws.std(ddof=1) * np.sqrt(1 + 1 / len(draws)))
    return float(draws.mean()) - width, float(draws.mean()) + width
