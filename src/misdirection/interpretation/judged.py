"""Judged answers of an organism with its adapters scaled."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from misdirection.interpretation.results import JudgedSetting
from misdirection.interpretation.scaling import Factors
from misdirection.judging.results import Calibration
from misdirection.judging.scoring import compare_all, score
from misdirection.sampling.answers import read_answers

JudgedSettings = Callable[[Mapping[str, Factors]], tuple[JudgedSetting, ...]]
"""Gives the organism's judged answers under settings of its adapters, as it is first."""


def judged_settings(
    plain: Path,
    scaled: Mapping[str, Path],
    settings: Mapping[str, Factors],
    min_judged: float,
    calibration: Calibration | None = None,
) -> tuple[JudgedSetting, ...]:
    """EM rates of one organism's judged answers: as it is, then with its adapters scaled, with the change against that.

    Args:
        plain: judged answers of the organism as it is.
        scaled: those under each setting.
        settings: the factors of each.
        min_judged: the smallest share of a setting's answers that must have a verdict.
        calibration: of the judge, by which rates are corrected, too.
    """

    def counted(table: pd.DataFrame) -> dict[str, object]:
        (rates,) = score(table, [], min_judged=min_judged, calibration=calibration)
        return {name: value for name, value in vars(rates).items() if name != "group"}

    before, tables = read_answers(plain), {name: read_answers(path) for name, path in scaled.items()}
    rows = [JudgedSetting(name="as it is", factors={}, **counted(before), change=None, verdict=None)]
    comparisons = compare_all([(before, table) for table in tables.values()], min_judged=min_judged)
    for (name, table), comparison in zip(tables.items(), comparisons, strict=True):
        factors, outcome = dict(settings[name]), {"change": comparison.change, "verdict": comparison.verdict}
        rows.append(JudgedSetting(name=name, factors=factors, **counted(table), **outcome))
    return tuple(rows)
