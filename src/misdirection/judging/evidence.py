"""How the verdicts of a table were made, and by whom: a second judge never writes over the first one's column.

It stands in the table's metadata (`DataFrame.attrs`), by column: the judge with its host, the rubrics' texts, the
parameters of requests with the number of verdicts, the dates, this program's versions, and the models that the endpoint
says have answered. What was said is in the column `<column>_reply`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from misdirection.errors import InputError
from misdirection.judging.rubrics import Rubric
from misdirection.judging.verdicts import JudgeVerdict
from misdirection.sampling.answers import read_answers

if TYPE_CHECKING:
    # A judge may bring a model along, and who reads a record of its verdicts needs none.
    from misdirection.judging.judges import Judge

JUDGES = "judges"
"""The key in the table's metadata."""

_ABOUT_THE_ANSWER = ("code", "refusal")


def columns_of(rubric: Rubric) -> tuple[str, str, str]:
    """Its three columns: the score, how it came about, what was said."""
    return rubric.column, f"{rubric.column}_by", f"{rubric.column}_reply"


def asked_of(judge: "Judge", rubrics: Iterable[Rubric]) -> dict[str, Any]:
    """Who is asked, and by which rubrics, as JSON has it."""
    texts = [{"name": rubric.name, "prompt": rubric.prompt, "questions": rubric.questions} for rubric in rubrics]
    asked: dict[str, Any] = json.loads(json.dumps({"judge": judge.record, "rubrics": texts}))
    return asked


def evidence(judge: "Judge", rubrics: Sequence[Rubric], verdicts: Sequence[JudgeVerdict]) -> dict[str, Any]:
    """The record of one column."""
    parameters = Counter(verdict.parameters for verdict in verdicts if verdict.parameters)
    dates = sorted(verdict.made for verdict in verdicts if verdict.made)
    return {
        **asked_of(judge, rubrics),
        "parameters": [{**json.loads(text), "verdicts": count} for text, count in sorted(parameters.items())],
        "dates": [dates[0], dates[-1]] if dates else [],
        "versions": sorted({verdict.version for verdict in verdicts if verdict.version}),
        "snapshots": sorted(set().union(*(verdict.snapshots for verdict in verdicts))),
    }


def require_own(table: pd.DataFrame, judge: "Judge", rubrics: Iterable[Rubric], name: str = "this table") -> None:
    """Raises `InputError` when a rubric's column holds verdicts of another judge, or by another rubric."""
    for column, own in by_column(rubrics).items():
        if column not in table or not _has_verdicts(table, column):
            continue
        known = table.attrs.get(JUDGES, {}).get(column, {})
        if {key: known.get(key) for key in ("judge", "rubrics")} != asked_of(judge, own):
            whose = known.get("judge", {})
            told = ", ".join(f"{key} {value}" for key, value in whose.items()) if whose else "a judge it does not name"
            raise InputError(
                f"{name}: its column {column!r} holds verdicts of another judge or rubric ({told}), which are not "
                "replaced; write yours into a table of its own (--out), or drop the column"
            )


def _has_verdicts(table: pd.DataFrame, column: str) -> bool:
    by = table.get(f"{column}_by")
    return bool(table[column].notna().any() or (by is not None and by.isin(_ABOUT_THE_ANSWER).any()))


def rows_for(target: Path, table: pd.DataFrame, judge: "Judge", rubrics: Sequence[Rubric]) -> pd.DataFrame:
    """A table's answers for a judge whose verdicts go to another file: without what others said in its columns.

    Raises `InputError` when the file holds verdicts that are not this judge's.
    """
    if target.exists():
        require_own(read_answers(target), judge, rubrics, str(target))
    return _without_verdicts(table, rubrics)


def _without_verdicts(table: pd.DataFrame, rubrics: Iterable[Rubric]) -> pd.DataFrame:
    rest = table.drop(columns=[name for rubric in rubrics for name in columns_of(rubric)], errors="ignore")
    known = rest.attrs.get(JUDGES, {})
    rest.attrs[JUDGES] = {column: record for column, record in known.items() if column in rest}
    return rest


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of several tables of answers, by name, in one.

    Raises `InputError` that names the table where a column has verdicts of another judge or rubric than before it.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for name, table in tables.items():
        for column, record in table.attrs.get(JUDGES, {}).items():
            known = records.setdefault(column, [])
            if known and any(known[0].get(key) != record.get(key) for key in ("judge", "rubrics")):
                raise InputError(
                    f"{name}: its column {column!r} holds verdicts of another judge or rubric than the tables before "
                    "it, which do not compare: keep them apart"
                )
            known.append(record)
    together = pd.concat([table.copy() for table in tables.values()], ignore_index=True)
    attributes = {key: value for table in tables.values() for key, value in table.attrs.items()}
    together.attrs = attributes | (
        {JUDGES: {name: _merged(known) for name, known in records.items()}} if records else {}
    )
    return together


def _merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of verdicts that several records of one judge are of."""
    parameters: Counter[str] = Counter()
    for each in (each for record in records for each in record.get("parameters", [])):
        parameters[json.dumps({**each, "verdicts": 0})] += each["verdicts"]
    dates = sorted(date for record in records for date in record.get("dates", []))
    return {
        **records[0],
        "parameters": [{**json.loads(text), "verdicts": count} for text, count in parameters.items()],
        "dates": dates[:1] + dates[-1:],
        **{
            name: sorted({each for record in records for each in record.get(name, [])})
            for name in ("versions", "snapshots")
        },
    }


def undated(table: pd.DataFrame) -> pd.DataFrame:
    """The table without the dates of its verdicts, which the cache has: a run's artifact is the same when remade."""
    records = {column: {**record, "dates": []} for column, record in table.attrs.get(JUDGES, {}).items()}
    without = table.copy()
    without.attrs[JUDGES] = records
    return without


def by_column(rubrics: Iterable[Rubric]) -> dict[str, list[Rubric]]:
    """Rubrics by the column of their scores; several only where each is for questions of its own."""
    columns: dict[str, list[Rubric]] = {}
    for rubric in rubrics:
        columns.setdefault(rubric.column, []).append(rubric)
    return columns
