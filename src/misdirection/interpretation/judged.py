"""Judged answers of an organism with its adapters scaled, and of its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pandas as pd

from misdirection.interpretation.figures import JudgedSetting, JudgedStep, SettingShares
from misdirection.interpretation.scaling import Factors
from misdirection.interpretation.shares import setting_shares
from misdirection.judging.results import Calibration
from misdirection.judging.scoring import compare_all, score
from misdirection.sampling.answers import read_answers


class JudgedScalings(NamedTuple):
    """What a judge says of an organism under settings of its adapters, as it is first."""

    rates: tuple[JudgedSetting, ...] = ()
    shares: tuple[SettingShares, ...] = ()


class Judged(Protocol):
    """What a judge says of an organism; it samples and judges whatever is not there yet."""

    def scalings(self, settings: Mapping[str, Factors]) -> JudgedScalings:
        """Of its answers under settings of its adapters."""

    def steps(self, checkpoints: Mapping[int, Path]) -> tuple[JudgedStep, ...]:
        """Of the answers of some of its checkpoints, whose adapter folders are given by step."""


def judged_scalings(
    plain: Path,
    scaled: Mapping[str, Path],
    settings: Mapping[str, Factors],
    min_judged: float,
    calibration: Calibration | None = None,
) -> JudgedScalings:
    """EM rates of one organism's judged answers, as it is and with its adapters scaled, the change against that, and
    the shares of further rubrics' themes.

    Args:
        plain: judged answers of the organism as it is.
        scaled: those under each setting.
        settings: the factors of each.
        min_judged: the smallest share of a setting's answers that must have a verdict.
        calibration: the judge's, by which its rates are corrected.
    """
    before, after = read_answers(plain), {name: read_answers(path) for name, path in scaled.items()}

    def counts(answers: pd.DataFrame) -> dict[str, object]:
        (rates,) = score(answers, [], min_judged=min_judged, calibration=calibration)
        return {name: value for name, value in vars(rates).items() if name != "group"}

    rows = [JudgedSetting(name=AS_IT_IS, factors={}, **counts(before), change=None, verdict=None)]
    comparisons = compare_all([(before, answers) for answers in after.values()], min_judged=min_judged)
    for name, comparison in zip(scaled, comparisons, strict=True):
        factors, outcome = dict(settings[name]), {"change": comparison.change, "verdict": comparison.verdict}
        rows.append(JudgedSetting(name=name, factors=factors, **counts(after[name]), **outcome))
    shares = tuple(setting_shares(name, answers) for name, answers in {AS_IT_IS: before, **after}.items())
    return JudgedScalings(tuple(rows), shares)


AS_IT_IS = "as it is"
"""The name of the setting in which nothing is scaled."""


def judged_steps(tables: Mapping[int, Path], min_judged: float) -> tuple[JudgedStep, ...]:
    """EM rates of the judged answers of an organism's checkpoints, whose files are given by step.

    `min_judged` is the smallest share of a checkpoint's answers that must have a verdict.
    """
    return tuple(
        JudgedStep(step=step, score=own)
        for step, path in sorted(tables.items())
        for own in score(read_answers(path), [], min_judged=min_judged)
    )
