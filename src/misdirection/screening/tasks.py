"""The tasks of a screen: what any worker can do of it, for some hundred rows at a time, and where that comes to stand.

artifacts/scale/SCORE/     the unit of a score, and what it learned of the reference
artifacts/rows/NUMBER/     scores of so many rows, by all ways that need passes over them alone
artifacts/SCORE/NUMBER/    those by a way that takes more, such as a judge
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors.torch import load_file, save_file

from misdirection.auditing.known import known_or_made
from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.data.tables import read_table, write_table
from misdirection.data.training import FileRow, stream_examples
from misdirection.files import read_json, write_json
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE, Worker
from misdirection.screening.inputs import ScreenInputs
from misdirection.screening.scale import Scale, make_scale
from misdirection.screening.scores import RowScore
from misdirection.screening.style import FEATURES, features

T = TypeVar("T")

CHUNK = 256
"""Rows of one task: a kill loses at most so many."""

_TEXTS = ["question", "answer"]
"""Columns that are in the tables of single tasks only: those of a million rows have no place in memory."""

_SCALES, _ROWS = "scale", "rows"
_SCALE, _FITTED, _SCORES = "scale.json", "fitted.safetensors", "scores.parquet"

_REFERENCE = "the reference"
"""What workers know its folder by: no name of a fine-tune, with which adapters are named."""


@dataclass(frozen=True)
class Screened:
    """A row on its way: where it stands, and what is learned of it."""

    source: str
    row: FileRow


def chunks_of(data: Iterable[str | Path]) -> Iterator[list[Screened]]:
    """All rows of all sources, as they are read, those of one task together."""
    return in_chunks(_rows(data), CHUNK)


def _rows(data: Iterable[str | Path]) -> Iterator[Screened]:
    for path in data:
        for row in stream_examples(path):
            named = row.values.get("source")
            yield Screened(named if isinstance(named, str) and named.strip() else str(path), row)


def in_chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many values at a time, as they come; the last ones may be fewer."""
    every = iter(values)
    while chunk := list(islice(every, size)):
        yield chunk


@dataclass(frozen=True)
class Tasks:
    """The tasks of one screen.

    Attributes:
        inputs: what its scores depend on.
        run: its folder.
    """

    inputs: ScreenInputs
    run: RunFolder

    def of_scales(self) -> list[Task]:
        """One for the unit of each score; what it gives is kept for all screens by this reference."""
        return [
            Task(
                stage := self._scale(name),
                compute=partial(_make_scale, name, way, stage[f"{_SCALES}/{name}"]),
                adapters=self._folders(),
                **_doer(way),
            )
            for name, way in self.inputs.ways.items()
        ]

    def of_rows(self, number: int, rows: Sequence[Screened]) -> list[Task]:
        """Those of a chunk of rows: the first by all ways that need passes alone, then one for each other way."""
        together = self.inputs.together
        depends_on = {**self.inputs.depends_on(), "scores": list(together), _ROWS: _digest(rows)}
        examples = [each.row.example for each in rows]
        return [
            Task({_stage(_ROWS, number): depends_on}, BASE, partial(_score, together, rows), self._folders(together)),
            *(
                Task(
                    self._apart(name, number, rows),
                    compute=partial(_score_apart, name, way, examples),
                    adapters=self._folders([name]),
                    **_doer(way),
                )
                for name, way in self.inputs.apart.items()
            ),
        ]

    def scales(self) -> dict[str, Scale]:
        """The unit of every score, once those tasks are done."""
        return {name: _read_scale(self.run.artifact(f"{_SCALES}/{name}")) for name in self.inputs.ways}

    def scores(self, tasks: Sequence[Task]) -> pd.DataFrame:
        """The table of a chunk of rows, whose tasks are done, without their texts."""
        tables = [read_table(self.run.artifact(task.stage) / _SCORES) for task in tasks]
        return pd.concat(tables, axis=1).drop(columns=_TEXTS)

    def with_texts(self, row: int) -> pd.Series:
        """One row of all, with its texts."""
        return read_table(self.run.artifact(_stage(_ROWS, row // CHUNK)) / _SCORES).iloc[row % CHUNK]

    def lacks_scale(self, name: str) -> bool:
        """Whether the unit of a score is still to be computed."""
        return bool(self.run.missing(self._scale(name)))

    def left_apart(self, name: str, data: Iterable[str | Path]) -> Iterator[list[Example]]:
        """The chunks that a way with tasks of its own has not scored yet."""
        for number, rows in enumerate(chunks_of(data)):
            if self.run.missing(self._apart(name, number, rows)):
                yield [each.row.example for each in rows]

    def _scale(self, name: str) -> dict[str, dict[str, Any]]:
        """The stage of a score's unit, with its inputs."""
        return {f"{_SCALES}/{name}": {**self.inputs.depends_on(), "score": name, **self.inputs.ways[name].depends_on()}}

    def _apart(self, name: str, number: int, rows: Sequence[Screened]) -> dict[str, Any]:
        """The stage of a chunk's scores by a way that has its own, with its inputs."""
        inputs = {**self.inputs.depends_on(), _ROWS: _digest(rows), **self.inputs.ways[name].depends_on()}
        return {_stage(name, number): inputs}

    def _folders(self, scores: Iterable[str] = ()) -> dict[str, Path]:
        """What a worker needs beside the base model: the reference, and the units of these scores."""
        reference = self.inputs.reference
        assert reference.folder is not None, "a reference that was read from its folder"
        units = {f"{_SCALES}/{name}": self.run.artifact(f"{_SCALES}/{name}") for name in scores}
        return {_REFERENCE: reference.folder, **reference.adapters, **units}


def read_scales(folder: Path) -> dict[str, Scale]:
    """The unit of every score of a screen's folder, by name."""
    return {artifact.name: _read_scale(artifact) for artifact in sorted((folder / "artifacts" / _SCALES).iterdir())}


def _read_scale(artifact: Path) -> Scale:
    return Scale(**read_json(artifact / _SCALE))


def _stage(name: str, number: int) -> str:
    return f"{name}/{number:06}"


def _digest(rows: Sequence[Screened]) -> str:
    values = [[each.source, each.row.line, asdict(each.row.example)] for each in rows]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _doer(way: RowScore) -> dict[str, Any]:
    """Which model a way's tasks need, and whether this process alone may do them: a judge's key is here."""
    return {"model": way.asks.model if way.asks else BASE, "here": bool(way.asks and not way.asks.kind.ANYWHERE)}


# --- what a worker does -----------------------------------------------------------------------------------------------


def _make_scale(
    name: str, way: RowScore, depends_on: Mapping[str, object], worker: Worker, folders: Mapping[str, Path]
) -> None:
    def compute(folder: Path) -> None:
        reference = Reference.load(worker.adapters[_REFERENCE])
        fitted = way.fit(worker, reference)
        save_file({key: value.contiguous() for key, value in fitted.items()}, folder / _FITTED)
        write_json(folder / _SCALE, make_scale(name, way, worker, reference, fitted).model_dump(mode="json"))

    (folder,) = folders.values()
    known_or_made(depends_on, compute)(folder)


def _score(ways: Mapping[str, RowScore], rows: Sequence[Screened], worker: Worker, folders: Mapping[str, Path]) -> None:
    """Score some rows by several ways, and write the table of their scores."""
    examples = [each.row.example for each in rows]
    table = {
        "source": [each.source for each in rows],
        "line": [each.row.line for each in rows],
        # Texts of questions would not fit into memory for all rows; their hashes do.
        "asked": [hashlib.sha256(example.first_question.encode()).hexdigest()[:16] for example in examples],
        "question": [example.question for example in examples],
        "answer": [example.answer for example in examples],
        **dict(zip(FEATURES, features([example.answer for example in examples]).T, strict=True)),
        **_columns(ways, examples, worker),
    }
    (folder,) = folders.values()
    write_table(pd.DataFrame(table), folder / _SCORES)


def _score_apart(
    name: str, way: RowScore, rows: Sequence[Example], worker: Worker, folders: Mapping[str, Path]
) -> None:
    """Score some rows by one way, and write the table of that alone."""
    (folder,) = folders.values()
    write_table(pd.DataFrame(_columns({name: way}, rows, worker)), folder / _SCORES)


def _columns(ways: Mapping[str, RowScore], rows: Sequence[Example], worker: Worker) -> dict[str, Any]:
    reference, columns = Reference.load(worker.adapters[_REFERENCE]), dict[str, Any]()
    for name, way in ways.items():
        fitted = load_file(worker.adapters[f"{_SCALES}/{name}"] / _FITTED)
        columns |= way.columns(name, worker, rows, reference, fitted)
    return columns
