"""Corrections of p-values for how many were tried.

Who tries many interventions finds one that works by chance. Each figure carries a p-value, and whoever counts how many
of several hold corrects them first: `holm` where a single false claim is too many, `benjamini_hochberg` where a share
of them may be false.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import false_discovery_control

from misdirection.statistics.estimates import SIGNIFICANT, Estimate


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
