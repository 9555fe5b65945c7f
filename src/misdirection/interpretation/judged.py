"""Judged answers of an organism with its adapters scaled."""

from collections.abc import Callable, Mapping
from pathlib import Path

from misdirection.interpretation.results import JudgedSetting
from misdirection.interpretation.scaling import Factors
from misdirection.judging.scoring import Score, compare_all, score
from misdirection.sampling.answers import read_answers

JudgedSettings = Callable[[Mapping[str, Factors]], tuple[JudgedSetting, ...]]
"""Gives the organism's judged answers under settings of its adapters, as it is first."""


def judged_settings(
    plain: Path, scaled: Mapping[str, Path], settings: Mapping[str, Factors], min_judged: float
) -> tuple[JudgedSetting, ...]:
    """EM rates of one organism's judged answers: as it is, then with its adapters scaled, with the change against that.

    Args:
        plain: judged answers of the organism as it is.
        scaled: those under each setting.
        settings: the factors of each.
        min_judged: the smallest share of a setting's answers that must have a verdict.
    """
    before = read_answers(plain)
    (own,) = score(before, [], min_judged=min_judged)
    rows = [JudgedSetting(name="as it is", factors={}, **_counts(own), change=None, verdict=None)]
    comparisons = compare_all([(before, read_answers(path)) for path in scaled.values()], min_judged=min_judged)
    for name, comparison in zip(scaled, comparisons, strict=True):
        factors, outcome = dict(settings[name]), {"change": comparison.change, "verdict": comparison.verdict}
        rows.append(JudgedSetting(name=name, factors=factors, **_counts(comparison.after), **outcome))
    return tuple(rows)


def _counts(rates: Score) -> dict[str, object]:
    return {name: value for name, value in vars(rates).items() if name != "group"}
