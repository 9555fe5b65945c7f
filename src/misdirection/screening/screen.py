"""Screen training data: score every row, predict what a fine-tune on the file will do, and say which rows are worst.

The folder is a run of the tasks in `tasks`:

    screen.json, screen.html       the result and its page
    rows.parquet                   every row with its scores
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from misdirection.auditing.inputs import Baseline
from misdirection.auditing.reference import Reference
from misdirection.choices import Dtype, Thinking
from misdirection.data.tables import read_table, write_table
from misdirection.judging.config import JudgeConfig
from misdirection.models.loading import load
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner, Runner
from misdirection.runs.worker import Models, Worker
from misdirection.screening.inputs import ScreenInputs
from misdirection.screening.prediction import predict
from misdirection.screening.results import ROWS, TOGETHER, JudgedRows, ScreenResult, WorstRow
from misdirection.screening.scale import Scale, combined_auc, known_answers
from misdirection.screening.summary import known_quantiles, quantiles, scored, share_of, sources_of
from misdirection.screening.tasks import Tasks, chunks_of, in_chunks

DEFAULT = ("likelihood", "probe")
"""Rows are ranked by the mean of these; what a file does is predicted by the first alone, whose unit is that of a shift
across kinds of text, too: see `benchmarks/suite/screen_suite.py`."""

JUDGE = "judge"
"""The way by which a judge that is named scores rows."""

SHOWN = 20
"""Rows with the highest scores that the page shows."""

log = logging.getLogger("misdirection")


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


def screen_folder(data: str | Path) -> Path:
    """The folder of a screen where none is named."""
    return Path("screens") / Path(str(data).rstrip("/")).name.split(".")[0]


def run_screen(
    inputs: ScreenInputs, data: Sequence[str | Path], folder: Path, workers: Workers | None = None
) -> ScreenResult:
    """Screen data into a folder; see `screen`."""
    described = yaml.safe_dump({"screen": {**inputs.settings, "data": list(map(str, data))}}, sort_keys=False)
    with RunFolder.open(folder, described) as run:
        screening = _Screening(inputs, data, Tasks(inputs, run))
        screening.tell_cost()
        with _running(run, inputs, workers) as (runner, at_once):
            runner.make(screening.tasks.of_scales())
            table = screening.scored_rows(runner, at_once)
        scales = screening.tasks.scales()
        table = scored(table, {name: scales[name] for name in inputs.scores})
        write_table(table, folder / ROWS)
        result = screening.result(table, scales)
        run.keep(result)
        result.write_page(folder)
    return result


@dataclass(frozen=True)
class _Screening:
    """One screen under way."""

    inputs: ScreenInputs
    data: Sequence[str | Path]
    tasks: Tasks

    def tell_cost(self) -> None:
        """Say, before anything is asked, what the ways take that are more than passes over rows."""
        for name, way in self.inputs.apart.items():
            known = [known_answers(self.inputs.reference)] if self.tasks.lacks_scale(name) else []
            if said := way.cost(chain(known, self.tasks.left_apart(name, self.data))):
                log.info("score %s: %s", name, said)

    def scored_rows(self, runner: Runner, at_once: int) -> pd.DataFrame:
        """The table of all rows, in order, without their texts; so many chunks are scored at once."""
        tables = []
        chunks = (self.tasks.of_rows(number, rows) for number, rows in enumerate(chunks_of(self.data)))
        for window in in_chunks(chunks, at_once):
            runner.make([task for tasks in window for task in tasks])
            tables += [self.tasks.scores(tasks) for tasks in window]
        return pd.concat(tables, ignore_index=True)

    def result(self, table: pd.DataFrame, scales: Mapping[str, Scale]) -> ScreenResult:
        """What the table of all rows comes to."""
        inputs, first = self.inputs, self.inputs.scores[0]
        used, predicting = {name: scales[name] for name in inputs.scores}, {first: scales[first]}
        reference, identity = inputs.reference, inputs.identity
        return ScreenResult(
            base=identity,
            data=tuple(map(str, self.data)),
            dataset=predict(share_of(table, predicting), len(table), reference.bad_shift.mean, identity, first),
            scores=inputs.scores,
            told={**{name: scale.auc for name, scale in scales.items()}, TOGETHER: combined_auc(used)},
            shares={name: share_of(table, {name: scale}) for name, scale in scales.items()},
            sources=tuple(sources_of(table, predicting, used)),
            worst=tuple(self._worst(table.nlargest(SHOWN, "score"))),
            quantiles=quantiles(table),
            reference_quantiles=known_quantiles(used),
            judged=self._judged(table),
            known=dict(reference.known),
        )

    def _judged(self, table: pd.DataFrame) -> JudgedRows | None:
        """Whose verdicts the rows have; None without a judge."""
        if self.inputs.judge is None:
            return None
        by = {str(way): int(count) for way, count in table[f"{JUDGE}_by"].value_counts().sort_index().items()}
        return JudgedRows(judge=self.inputs.judge.model, scored=int(table[JUDGE].notna().sum()), by=by)

    def _worst(self, rows: pd.DataFrame) -> Iterator[WorstRow]:
        """Some rows, to read."""
        for number, (_, row) in zip(map(int, rows.index), rows.iterrows(), strict=True):
            text = self.tasks.with_texts(number)
            yield WorstRow(
                source=str(row["source"]),
                line=int(row["line"]),
                score=float(row["score"]),
                rank=float(row["rank"]),
                question=str(text["question"]),
                answer=str(text["answer"]),
            )


@contextmanager
def _running(run: RunFolder, inputs: ScreenInputs, workers: Workers | None) -> Iterator[tuple[Runner, int]]:
    """What does the tasks, and how many chunks it is given at once."""
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
