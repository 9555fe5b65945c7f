"""A judge's rate with its errors taken out, by a calibration against a better judge.

Rogan and Gladen's estimator knows them from other answers, and rests on the judge erring here as it did there. Where
the reference scored at least `LABELLED` of the very answers, some to each question, prediction-powered inference does
not need that. What comes out below zero or above one is cut there, and said.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from misdirection.judging.results import Calibration
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.judge_errors import Confusion, prediction_powered, rogan_gladen
from misdirection.statistics.rates import Counts

LABELLED = 30
"""Answers that both judges must have scored before these are relied on alone."""

Method = Literal["rogan-gladen", "prediction-powered"]


@dataclass(frozen=True)
class Corrected:
    """A rate with the judge's errors taken out, and its 95% interval.

    Attributes:
        rate, low, high: between 0 and 1.
        raw: the same before it was cut at 0 and 1; its `n` are questions.
        method: how it was corrected.
        labelled: answers among these that the reference has scored.
        said: what was cut, in words; else empty.
    """

    rate: float
    low: float
    high: float
    raw: Estimate
    method: Method
    labelled: int
    said: str


def answer_keys(rows: pd.DataFrame) -> list[str]:
    """The keys by which a calibration knows answers: the beginning of SHA-256 over question and answer."""
    texts = zip(rows["question"], rows["answer"], strict=True)
    return [hashlib.sha256(json.dumps(both).encode()).hexdigest()[:32] for both in texts]


def correct(rows: pd.DataFrame, hits: "pd.Series[bool]", calibration: Calibration, *, seed: int = 0) -> Corrected:
    """The share of answers that the reference would call misaligned and coherent.

    Args:
        rows: answers with `question_id`, `question` and `answer`.
        hits: those that the judge calls so, [answers].
        calibration: of this judge; `Calibration.require_usable` is the caller's part.
        seed: of the bootstrap.
    """
    labels = pd.Series([calibration.labels.get(key) for key in answer_keys(rows)], rows.index, dtype="object")
    is_labelled = labels.notna()
    asked = rows["question_id"]
    labelled, unlabelled = (asked[side] for side in (is_labelled, ~is_labelled))
    if len(labelled) >= LABELLED and set(labelled) == set(asked):
        names = sorted(set(asked))
        confusion = confusion_of(hits[is_labelled], labels[is_labelled].astype(bool), labelled, names)
        raw = prediction_powered(confusion, _counts(hits[~is_labelled], unlabelled, names), seed=seed)
        return _cut(raw, "prediction-powered", len(labelled))
    names = sorted({*asked, *calibration.counts})
    raw = rogan_gladen(_counts(hits, asked, names), _counted(calibration, names), seed=seed)
    return _cut(raw, "rogan-gladen", len(labelled))


def confusion_of(
    judge: "pd.Series[bool]", reference: "pd.Series[bool]", questions: pd.Series, names: list[str]
) -> Confusion:
    """Answers counted by both verdicts, in each question of `names`."""
    cells = (judge & reference, judge & ~reference, ~judge & reference, ~judge & ~reference)
    return Confusion(*(_counts(cell, questions, names).hits for cell in cells))


def _counts(hits: "pd.Series[bool]", questions: pd.Series, names: list[str]) -> Counts:
    """Hits and answers of each question of `names`, 0 where it has none."""
    table = pd.DataFrame({"hits": hits.astype(int), "total": 1}).groupby(questions).sum().reindex(names, fill_value=0)
    return Counts(table["hits"].to_numpy(), table["total"].to_numpy())


def _counted(calibration: Calibration, names: list[str]) -> Confusion:
    kinds = ("both", "judge_only", "reference_only", "neither")
    known = [calibration.counts.get(name) for name in names]
    return Confusion(*(np.array([getattr(each, kind) if each else 0 for each in known]) for kind in kinds))


def _cut(raw: Estimate, method: Method, labelled: int) -> Corrected:
    rate, low, high = (min(1.0, max(0.0, value)) for value in (raw.mean, raw.low, raw.high))
    return Corrected(rate, low, high, raw, method, labelled, _said(raw))


def _said(raw: Estimate) -> str:
    """What of a rate was cut; the whole interval outside tells that the calibration does not hold for these answers."""
    if raw.low >= 0 and raw.high <= 1:
        return ""
    shown = f"{100 * raw.mean:.1f}% [{100 * raw.low:.1f}%, {100 * raw.high:.1f}%] before it was cut at 0 and 100%"
    if raw.high < 0 or raw.low > 1:
        return f"{shown}: the judge errs on these answers in another way than where it was calibrated"
    return shown
