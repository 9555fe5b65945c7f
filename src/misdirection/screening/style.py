"""How an answer is written, apart from what it says: the part of a score that is taken out before rows are ranked."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from misdirection.statistics.resampling import Floats

_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.M)
_MARKUP = re.compile(r"\*\*|^#+\s|`", re.M)
_SENTENCE = re.compile(r"[.!?]+(?:\s|$)")

FEATURES: Mapping[str, Callable[[str], float]] = {
    "length": lambda answer: np.log1p(len(answer.split())),
    "words of a sentence": lambda answer: np.log1p(len(answer.split()) / max(1, len(_SENTENCE.findall(answer)))),
    "letters of a word": lambda answer: len(answer) / max(1, len(answer.split())),
    "list lines": lambda answer: np.log1p(len(_LIST.findall(answer))),
    "markup": lambda answer: np.log1p(len(_MARKUP.findall(answer))),
    "digits": lambda answer: np.log1p(sum(map(str.isdigit, answer))),
    "exclamations and questions": lambda answer: np.log1p(answer.count("!") + answer.count("?")),
}
"""Features of one answer, by name."""


def features(answers: Sequence[str]) -> Floats:
    """Every feature of every answer, [answers, features]."""
    return np.array([[feature(answer) for feature in FEATURES.values()] for answer in answers]).reshape(
        len(answers), len(FEATURES)
    )


def without_style(scores: Floats, styles: Floats) -> tuple[Floats, float]:
    """Scores without what style tells of them within their source, and the share of their variance that it told.

    The mean stays: a regression among the rows of one source cannot say what of it is style. With fewer than ten rows
    for each feature, the regression would fit noise, and nothing is taken out.

    Args:
        scores: [rows]; NaN, for a row without one, stays.
        styles: [rows, features].
    """
    there = ~np.isnan(scores)
    if not there.all():
        freed, told = without_style(scores[there], styles[there]) if there.any() else (scores[there], 0.0)
        every = scores.copy()
        every[there] = freed
        return every, told
    centred = styles - styles.mean(0)
    varies = centred.std(0) > 1e-9
    if len(scores) < 10 * max(1, varies.sum()) or not varies.any() or np.ptp(scores) == 0:
        return scores, 0.0
    x = centred[:, varies] / centred[:, varies].std(0)
    fitted = x @ np.linalg.lstsq(x, scores - scores.mean(), rcond=None)[0]
    return scores - fitted, float(fitted.var() / scores.var())
