"""Conditions of a judged table, as a person names them: `COLUMN=VALUE`, `COLUMN=BEFORE,AFTER`."""

from collections.abc import Collection, Iterable

import pandas as pd

from misdirection.data.tables import require_columns
from misdirection.errors import InputError
from misdirection.judging.scoring import JUDGED_SHARE, Comparison, compare


def select_rows(table: pd.DataFrame, conditions: Iterable[str]) -> pd.DataFrame:
    """The rows that meet all conditions, `COLUMN=VALUE`; an empty value stands for a missing one.

    Raises `InputError` for an unknown column, and where no row is left.
    """
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if column not in table.columns or not equals:
            raise InputError(f"--where {condition!r}: give COLUMN=VALUE, with a column of the table")
        table = _rows_with(table, column, value, "--where")
    return table


def compare_conditions(table: pd.DataFrame, text: str, min_judged: float = JUDGED_SHARE) -> Comparison:
    """The difference between the two conditions of `COLUMN=BEFORE,AFTER`; raises as `judging.scoring.compare` does.

    A condition whose rows differ in another way, such as several organisms under one intervention, is an `InputError`.
    """
    column, _, values = text.partition("=")
    before, _, after = values.partition(",")
    if column not in table.columns or not after:
        raise InputError(f"--compare {text!r}: give COLUMN=BEFORE,AFTER, with a column of the table")
    parts = {value: _rows_with(table, column, value, "--compare") for value in (before, after)}
    for value, rows in parts.items():
        _refuse_mixed(rows, column, value)
    return compare(parts[before], parts[after], min_judged=min_judged)


def answers_of(table: pd.DataFrame, organisms: Collection[str]) -> pd.DataFrame:
    """The rows of some organisms; raises `InputError` for one that the table has no answers of."""
    require_columns(table, ["organism"])
    known = sorted(table["organism"].dropna().unique())
    if unknown := [name for name in organisms if name not in known]:
        raise InputError(f"this table has no answers of {unknown[0]!r}; it has those of {', '.join(known[:20])}")
    return table[table["organism"].isin(organisms)]


def _rows_with(table: pd.DataFrame, column: str, value: str, option: str) -> pd.DataFrame:
    rows = table[table[column].astype("str").fillna("") == value]
    if rows.empty:
        raise InputError(f"{option}: no row has {value!r} in column {column}")
    return rows


def _refuse_mixed(rows: pd.DataFrame, column: str, value: str) -> None:
    """Answers of several models, or under several interventions, are not one condition."""
    for other in ("organism", "intervention", "experiment"):
        if other != column and other in rows and (values := rows[other].fillna("").unique()).size > 1:
            named = ", ".join(repr(name) for name in values[:5])
            raise InputError(f"--compare: {column} {value!r} has rows of {other} {named}: choose with --where")
