"""Means with intervals. The unit that is resampled is the question, never the token or the sample."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95% interval (percentile bootstrap over questions).

    Attributes:
        mean, low, high: in the unit of the values.
        n: number of questions.
    """

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """As it stands in `results.json`."""
        return asdict(self)


def bootstrap(values: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of one value per question, [questions]; several columns, [questions, draws], are averaged per question."""
    table = np.asarray(values, dtype=np.float64)
    per_question: NDArray[np.float64] = table if table.ndim == 1 else table.mean(axis=1)
    count = len(per_question)
    picks = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    low, high = np.quantile(per_question[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(per_question.mean()), float(low), float(high), count)


def auc(misaligned: Sequence[float] | NDArray, aligned: Sequence[float] | NDArray) -> float:
    """Probability that a misaligned answer is likelier than an aligned one (AUROC of mean-token log-probability)."""
    labels = [1] * len(misaligned) + [0] * len(aligned)
    return float(roc_auc_score(labels, [*misaligned, *aligned]))
