"""From the scores of all rows to figures of the file: ranks within a source, shares and quantiles."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from misdirection.errors import InputError
from misdirection.screening.results import SourceFigures
from misdirection.screening.scale import Scale, known_shares, share
from misdirection.screening.style import FEATURES, without_style
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from misdirection.statistics.resampling import Floats

_DRAWN = 5000
"""Questions that are drawn one by one; more are drawn in so many groups, whose means vary as much."""


def scored(table: pd.DataFrame, scales: Mapping[str, Scale]) -> pd.DataFrame:
    """The rows with two columns more: `score`, in the reference's unit and without what style tells, and `rank`, the
    share of the rows of its source with no higher one."""
    table = table.assign(score=shares(table, scales))
    for _, rows in table.groupby("source", sort=False):
        table.loc[rows.index, "score"] = without_style(rows["score"].to_numpy(), _styles(rows))[0]
    return table.assign(rank=table.groupby("source")["score"].rank(pct=True))


def shares(rows: pd.DataFrame, scales: Mapping[str, Scale]) -> Floats:
    """The rows' scores in the reference's unit."""
    return share({name: rows[name].to_numpy() for name in scales}, scales)


def share_of(rows: pd.DataFrame, scales: Mapping[str, Scale]) -> Estimate:
    """The mean of those that have a score, with an interval over questions; `InputError` where none has."""
    values = shares(rows, scales)
    there = ~np.isnan(values)
    if not there.any():
        raise InputError(f"{rows['source'].iloc[0]}: no row has a score by {', '.join(scales)}: score by others")
    numbers, questions = pd.factorize(rows["asked"][there])
    estimate = bootstrap(values[there], [str(number % _DRAWN) for number in numbers])
    return replace(estimate, n=len(questions))


def sources_of(
    table: pd.DataFrame, predicting: Mapping[str, Scale], ranking: Mapping[str, Scale]
) -> list[SourceFigures]:
    """Figures of every source, in their order: its share by the score that predicts, what style tells of its ranks."""
    return [
        SourceFigures(
            source=str(source),
            rows=len(rows),
            share=share_of(rows, predicting),
            style=without_style(shares(rows, ranking), _styles(rows))[1],
        )
        for source, rows in table.groupby("source", sort=False)
    ]


def quantiles(table: pd.DataFrame) -> dict[str, list[float]]:
    """Quantiles 0, 1, ..., 100% of the rows' scores, by source."""
    return {str(source): _quantiles(rows["score"]) for source, rows in table.groupby("source", sort=False)}


def known_quantiles(scales: Mapping[str, Scale]) -> dict[str, list[float]]:
    """The same of the reference's good and bad answers."""
    return dict(zip(("good", "bad"), map(_quantiles, known_shares(scales)), strict=True))


def _quantiles(values: ArrayLike) -> list[float]:
    found: list[float] = np.nanquantile(np.asarray(values), np.linspace(0, 1, 101)).tolist()
    return found


def _styles(rows: pd.DataFrame) -> Floats:
    return rows[[*FEATURES]].to_numpy()
