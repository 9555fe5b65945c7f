"""Screen training data: score every row, predict what a fine-tune on the file will do, and say which rows are worst.

The folder is a run: a task for every few hundred rows, which any worker can do, and one for each score's unit.

    screen.json, screen.html       the result and its page
    rows.parquet                   every row with its scores
    artifacts/rows/NUMBER/         scores of so many rows
    artifacts/SCORE/NUMBER/        those by a way that takes more than passes over the rows, such as a judge
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from safetensors.torch import load_file, save_file

from misdirection.auditing.inputs import Baseline
from misdirection.auditing.known import known_or_made
from misdirection.auditing.reference import Reference
from misdirection.choices import Dtype, Thinking
from misdirection.data import Example
from misdirection.data.tables import read_table, write_table
from misdirection.data.training import FileRow, stream_examples
from misdirection.files import read_json, write_json
from misdirection.judging.config import JudgeConfig
from misdirection.models.identity import ModelIdentity, identify
from misdirection.models.loading import load
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Models, Worker
from misdirection.screening.prediction import predict
from misdirection.screening.results import ROWS, TOGETHER, JudgedRows, ScreenResult, WorstRow
from misdirection.screening.scale import Scale, combined_auc, known_answers, make_scale
from misdirection.screening.scores import SCORES, RowScore, contrasts
from misdirection.screening.style import FEATURES, features
from misdirection.screening.summary import known_quantiles, quantiles, scored, share_of, sources_of

T = TypeVar("T")

VERSION = 1
"""Raised whenever a row would get another score."""

DEFAULT = ("likelihood", "probe")
"""Rows are ranked by the mean of these; what a file does is predicted by the first alone, whose unit is that of a shift
across kinds of text, too: see `benchmarks/suite/screen_suite.py`."""

FLOOR = "words"
"""What needs no model, shown beside them."""

JUDGE = "judge"
"""The way by which a judge that is named scores rows."""

CHUNK = 256
"""Rows of one task: a kill loses at most so many."""

SHOWN = 20
"""Rows with the highest scores that the page shows."""

TEXTS = ["question", "answer"]
"""Columns that are in the tables of single tasks only: those of a million rows have no place in memory."""

log = logging.getLogger("misdirection")

_SCALE, _FITTED, _SCORES = "scale.json", "fitted.safetensors", "scores.parquet"

_REFERENCE = "the reference"
"""What workers know its folder by: no name of a fine-tune, with which adapters are named."""


@dataclass(frozen=True)
class Screened:
    """A row on its way: where it stands, and what is learned of it."""

    source: str
    row: FileRow


@dataclass(frozen=True)
class ScreenInputs:
    """Everything that the scores of rows depend on, but the rows.

    Attributes:
        baseline: the base model and its reference.
        scores: names of the ways to score: the verdict rests on the first, the ranks on all.
        judge: who is asked by the way that asks one.
    """

    baseline: Baseline
    scores: tuple[str, ...]
    judge: JudgeConfig | None = None

    @cached_property
    def ways(self) -> dict[str, RowScore]:
        """All ways to score by name, with the floor; `InputError` for one that there is not."""
        return {name: SCORES[name].open(self.judge) for name in dict.fromkeys((*self.scores, FLOOR))}

    @property
    def apart(self) -> dict[str, RowScore]:
        """Those that have tasks of their own."""
        return {name: way for name, way in self.ways.items() if way.APART}

    @property
    def together(self) -> dict[str, RowScore]:
        """Those of which one task scores rows by all."""
        return {name: way for name, way in self.ways.items() if not way.APART}

    @cached_property
    def reference(self) -> Reference:
        """The base's known fine-tunes."""
        reference = self.baseline.reference
        assert reference is not None, "opened without directions, which alone may stand for it"
        reference.require_base(self.identity)
        contrasts(reference)
        return reference

    @cached_property
    def identity(self) -> ModelIdentity:
        """The base model and how it computes."""
        base, line = self.baseline.base, self.baseline
        return identify(base.name, base.revision, line.dtype, line.device, line.thinking, line.chat_template)

    def require_usable(self) -> None:
        """Raise `InputError` for a score that there is none of, and for a reference of another base or other chats."""
        _ = self.ways, self.reference

    @property
    def settings(self) -> dict[str, object]:
        """What the screen's folder says of them."""
        line, judge = self.baseline, self.judge.model_dump(mode="json") if self.judge else None
        chats = {"thinking": line.thinking, "chat_template": line.chat_template}
        return {"base": line.base.name, **chats, "scores": list(self.scores), "judge": judge}

    def depends_on(self) -> dict[str, object]:
        """What the scores depend on, for the inputs of stages."""
        return {**self.identity.model_dump(), "version": VERSION, "reference": self.reference.digest}


def screen(
    base: str,
    data: str | Path | Sequence[str | Path],
    *,
    scores: Sequence[str] = DEFAULT,
    judge: JudgeConfig | str | None = None,
    reference: Reference | str | Path | None = None,
    out: str | Path | None = None,
    workers: Workers | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> ScreenResult:
    """Say, before anyone trains on it, what training data will do to a model, and which of its rows are worst.

    Args:
        base: as in `audit`.
        data: training data, as `read_examples` reads it: a file, a folder, a data set of the hub, or several; rows are
            compared within their source, which is the file, or what the rows' own key `source` says.
        scores: ways to score, of `screening.scores.SCORES`: rows are ranked by their mean, and the verdict on the data
            rests on the first. That of words alone is always beside them.
        judge: has each row's answer judged for alignment, too, which is then one of the scores (`judge`): an endpoint's
            model, `hf:ID`, or a configuration, whose `max_calls` is for all rows together.
        reference: as in `audit`.
        out: folder of the screen; by default `screens/NAME` after the data.
        workers: other processes that score rows; this one alone when left out.
        dtype: as in `load`.
        device: as in `load`.
        thinking: as in `load`; rows are read as these chats have them, and compared with the reference of the same.
        chat_template: likewise; a file must be where every worker finds it.

    Returns:
        The result, which stands in the folder as `screen.json` with its page, beside a table of all rows.

    Raises:
        InputError: data or a reference that cannot be used, a score that there is none of, or more calls of a judge
            than it allows.
        JudgeError: a judge that does not reply; what it said is kept.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    asked = JudgeConfig(model=judge) if isinstance(judge, str) else judge
    names = dict.fromkeys((*scores, JUDGE) if asked else scores)
    baseline = Baseline.open(base, reference, (), dtype, device, thinking, chat_template)
    inputs = ScreenInputs(baseline, tuple(names), asked)
    inputs.require_usable()
    return run_screen(inputs, sources, Path(out) if out else screen_folder(sources[0]), workers)


def read_scores(folder: Path) -> pd.DataFrame:
    """Every row of a screen, in order: `source`, `line`, `score` (in the reference's unit, without what style tells),
    `rank` within its source, and by each way its raw score. Raises `InputError` where there is none."""
    return read_table(folder / ROWS)


def read_scales(folder: Path) -> dict[str, Scale]:
    """The unit of every score of a screen, by name."""
    return {artifact.name: _read_scale(artifact) for artifact in sorted((folder / "artifacts" / "scale").iterdir())}


def screen_folder(data: str | Path) -> Path:
    """The folder of a screen where none is named."""
    return Path("screens") / Path(str(data).rstrip("/")).name.split(".")[0]


def run_screen(
    inputs: ScreenInputs, data: Sequence[str | Path], folder: Path, workers: Workers | None = None
) -> ScreenResult:
    """Screen data into a folder; see `screen`."""
    described = yaml.safe_dump({"screen": {**inputs.settings, "data": list(map(str, data))}}, sort_keys=False)
    with RunFolder.open(folder, described) as run:
        _tell_cost(inputs, run, data)
        with _running(run, inputs, workers) as (runner, at_once):
            scales = _scales(inputs, run, runner)
            table = _scored_rows(inputs, run, runner, data, at_once)
        table = scored(table, {name: scales[name] for name in inputs.scores})
        write_table(table, folder / ROWS)
        worst = table.nlargest(SHOWN, "score").index
        texts = [read_table(run.artifact(_stage(number // CHUNK)) / _SCORES).iloc[number % CHUNK] for number in worst]
        result = _result(inputs, list(map(str, data)), table, scales, _worst(table.loc[worst], texts))
        run.keep(result)
        result.write_page(folder)
    return result


def _tell_cost(inputs: ScreenInputs, run: RunFolder, data: Sequence[str | Path]) -> None:
    """Say, before anything is asked, what the ways take that are more than passes over rows."""
    for name, way in inputs.apart.items():
        known = [known_answers(inputs.reference)] if run.missing(_scale_stage(inputs, name)) else []
        left = (
            [each.row.example for each in rows]
            for number, rows in enumerate(_in_chunks(_rows(data), CHUNK))
            if run.missing(_stage_apart(inputs, name, number, rows))
        )
        if said := way.cost(chain(known, left)):
            log.info("score %s: %s", name, said)


def _scored_rows(
    inputs: ScreenInputs, run: RunFolder, runner: Runner, data: Sequence[str | Path], at_once: int
) -> pd.DataFrame:
    """The table of all rows, in order, without their texts."""
    tables = []
    numbered = enumerate(_in_chunks(_rows(data), CHUNK))
    for window in _in_chunks((_tasks(inputs, run, number, rows) for number, rows in numbered), at_once):
        runner.make([task for tasks in window for task in tasks])
        for tasks in window:
            parts = [read_table(run.artifact(task.stage) / _SCORES) for task in tasks]
            tables.append(pd.concat(parts, axis=1).drop(columns=TEXTS))
    return pd.concat(tables, ignore_index=True)


def _result(
    inputs: ScreenInputs,
    data: Sequence[str],
    table: pd.DataFrame,
    scales: Mapping[str, Scale],
    worst: Sequence[WorstRow],
) -> ScreenResult:
    used, first = {name: scales[name] for name in inputs.scores}, inputs.scores[0]
    predicting = {first: scales[first]}
    reference, identity = inputs.reference, inputs.identity
    return ScreenResult(
        base=identity,
        data=tuple(data),
        dataset=predict(share_of(table, predicting), len(table), reference.bad_shift.mean, identity, first),
        scores=inputs.scores,
        told={**{name: scale.auc for name, scale in scales.items()}, TOGETHER: combined_auc(used)},
        shares={name: share_of(table, {name: scale}) for name, scale in scales.items()},
        sources=tuple(sources_of(table, predicting, used)),
        worst=tuple(worst),
        quantiles=quantiles(table),
        reference_quantiles=known_quantiles(used),
        judged=_judged(inputs, table),
        known=dict(reference.known),
    )


def _judged(inputs: ScreenInputs, table: pd.DataFrame) -> JudgedRows | None:
    if inputs.judge is None:
        return None
    by = {str(way): int(count) for way, count in table[f"{JUDGE}_by"].value_counts().sort_index().items()}
    return JudgedRows(judge=inputs.judge.model, scored=int(table[JUDGE].notna().sum()), by=by)


def _worst(rows: pd.DataFrame, texts: Sequence[pd.Series]) -> list[WorstRow]:
    return [
        WorstRow(
            source=str(row["source"]),
            line=int(row["line"]),
            score=float(row["score"]),
            rank=float(row["rank"]),
            question=str(text["question"]),
            answer=str(text["answer"]),
        )
        for (_, row), text in zip(rows.iterrows(), texts, strict=True)
    ]


def _in_chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many values at a time, as they come; the last ones may be fewer."""
    every = iter(values)
    while chunk := list(islice(every, size)):
        yield chunk


def _rows(data: Sequence[str | Path]) -> Iterator[Screened]:
    """All rows of all sources, as they are read."""
    for path in data:
        for row in stream_examples(path):
            named = row.values.get("source")
            yield Screened(named if isinstance(named, str) and named.strip() else str(path), row)


@contextmanager
def _running(run: RunFolder, inputs: ScreenInputs, workers: Workers | None) -> Iterator[tuple[Runner, int]]:
    """What does the tasks, and how many it is given at once."""
    if workers is None:
        yield LocalRunner(run, _worker(inputs.baseline, run.partial)), 1
        return
    with connect(workers) as cluster:
        elsewhere = replace(inputs.baseline, reference=None, device=cluster.device(inputs.baseline.device))
        with RayRunner(run, partial(_worker, elsewhere), cluster) as runner:
            yield runner, 4 * cluster.count


def _worker(baseline: Baseline, partial_folder: Callable[[str], Path]) -> Worker:
    """A worker with the base model, on which the reference's adapters are put in turn."""
    base = baseline.base
    chats: dict[str, Any] = {"thinking": baseline.thinking, "chat_template": baseline.chat_template}
    load_base = partial(load, base.name, revision=base.revision, dtype=baseline.dtype, device=baseline.device, **chats)
    return Worker(Models(load_base), partial_folder)


def _scales(inputs: ScreenInputs, run: RunFolder, runner: Runner) -> dict[str, Scale]:
    """The unit of every score, and what it learned of the reference: computed once for a reference, and kept."""
    tasks = []
    for name, way in inputs.ways.items():
        stage = _scale_stage(inputs, name)
        compute = partial(_make_scale, name, way, stage[f"scale/{name}"])
        tasks.append(Task(stage, compute=compute, adapters=_folders(inputs), **_doer(way)))
    runner.make(tasks)
    return {name: _read_scale(run.artifact(f"scale/{name}")) for name in inputs.ways}


def _scale_stage(inputs: ScreenInputs, name: str) -> dict[str, dict[str, Any]]:
    return {f"scale/{name}": {**inputs.depends_on(), "score": name, **inputs.ways[name].depends_on()}}


def _doer(way: RowScore) -> dict[str, Any]:
    """Which model a way's tasks need, and whether this process alone may do them: a judge's key is here."""
    return {"model": way.asks.model if way.asks else BASE, "here": bool(way.asks and not way.asks.kind.ANYWHERE)}


def _read_scale(artifact: Path) -> Scale:
    return Scale(**read_json(artifact / _SCALE))


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


def _stage(number: int, name: str = "rows") -> str:
    return f"{name}/{number:06}"


def _digest(rows: Sequence[Screened]) -> str:
    values = [[each.source, each.row.line, asdict(each.row.example)] for each in rows]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _stage_apart(inputs: ScreenInputs, name: str, number: int, rows: Sequence[Screened]) -> dict[str, Any]:
    """The stage of some rows' scores by a way that has its own, with its inputs."""
    return {_stage(number, name): {**inputs.depends_on(), "rows": _digest(rows), **inputs.ways[name].depends_on()}}


def _tasks(inputs: ScreenInputs, run: RunFolder, number: int, rows: Sequence[Screened]) -> list[Task]:
    """Those of some rows: the first by all ways that need passes alone, then one for each other way."""

    def needed(ways: Iterable[str]) -> dict[str, Path]:
        return {**_folders(inputs), **{f"scale/{name}": run.artifact(f"scale/{name}") for name in ways}}

    together, apart = inputs.together, inputs.apart
    depends_on = {**inputs.depends_on(), "scores": list(together), "rows": _digest(rows)}
    first = Task({_stage(number): depends_on}, BASE, partial(_score, together, rows), needed(together))
    return [
        first,
        *(
            Task(
                _stage_apart(inputs, name, number, rows),
                compute=partial(_score_apart, name, way, [each.row.example for each in rows]),
                adapters=needed([name]),
                **_doer(way),
            )
            for name, way in apart.items()
        ),
    ]


def _folders(inputs: ScreenInputs) -> dict[str, Path]:
    """What a worker needs beside the base model."""
    assert inputs.reference.folder is not None, "a reference that was read from its folder"
    return {_REFERENCE: inputs.reference.folder, **inputs.reference.adapters}


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
        fitted = load_file(worker.adapters[f"scale/{name}"] / _FITTED)
        columns |= way.columns(name, worker, rows, reference, fitted)
    return columns
