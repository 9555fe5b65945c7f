"""Areas under receiver operating characteristics."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score


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
