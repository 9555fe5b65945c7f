"""The profile of the judge whose scores a table has, from the table's own record of that."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from misdirection.errors import InputError
from misdirection.judging.evidence import JUDGES, asked_of, by_column
from misdirection.judging.results import Calibration, JudgeProfile
from misdirection.judging.rubrics import Rubric
from misdirection.sampling.answers import SCORED_BY

if TYPE_CHECKING:
    from misdirection.judging.judges import Judge

_UNSAID = ("host", "logprobs", "samples")
"""What of a judge's record does not say who it is: where it runs, and how it is asked, which a profile says itself."""


def profile_of(table: pd.DataFrame, columns: Sequence[str]) -> JudgeProfile | None:
    """The profile of the judge of several columns; None where the table does not name one and the same."""
    known = table.attrs.get(JUDGES, {})
    records = {column: known[column] for column in columns if column in known and column in table}
    judges = [record["judge"] for record in records.values()]
    if len(records) < len(columns) or any(judge != judges[0] for judge in judges):
        return None
    by = pd.concat([table.get(f"{column}_by", pd.Series(dtype="str")) for column in columns])
    return _profile(judges[0], records, tuple(way for way in SCORED_BY if (by == way).any()))


def _profile(judge: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], ways: tuple[str, ...]) -> JudgeProfile:
    return JudgeProfile(
        judge={key: value for key, value in judge.items() if key not in _UNSAID},
        snapshots=tuple(sorted({name for record in records.values() for name in record.get("snapshots", ())})),
        ways=ways,
        samples=judge.get("samples") if "text" in ways else None,
        rubrics={column: _digest(record["rubrics"]) for column, record in records.items()},
    )


def _digest(rubrics: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what was asked, and of which questions; a rubric's name is none of it."""
    asked = sorted([rubric["prompt"], *(rubric.get("questions") or ())] for rubric in rubrics)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def require_profile(table: pd.DataFrame, columns: Sequence[str], name: str) -> JudgeProfile:
    """The profile; raises `InputError` where the table does not name one judge."""
    if (profile := profile_of(table, columns)) is None:
        raise InputError(
            f"{name}: does not say which one judge scored {' and '.join(columns)}, so that no calibration can be held "
            "against it: judge it with `misdirection judge`"
        )
    return profile


def require_calibration_of(
    judge: "Judge", rubrics: Iterable[Rubric], columns: Sequence[str], calibration: Calibration
) -> None:
    """The same as `require_calibrated`, as far as it can be told before anything is judged."""
    own = by_column(rubrics)
    records = {column: asked_of(judge, own[column]) for column in columns}
    _require_same(_profile(judge.record, records, calibration.profile.ways), calibration)


def _require_same(profile: JudgeProfile, calibration: Calibration) -> None:
    if difference := profile.difference(calibration.profile):
        raise InputError(f"this calibration is {difference}: make one of this judge (`agree --save`)")


def require_calibrated(table: pd.DataFrame, columns: Sequence[str], calibration: Calibration) -> None:
    """Raises `InputError` for a calibration that can correct nothing, or is not of the table's judge."""
    calibration.require_usable()
    _require_same(require_profile(table, columns, "this table"), calibration)
