"""Audit many fine-tunes of one base, one table for all; each audit is a task that any process can do.

The folder is a run whose stages are audits: those that hold are not made again, and each keeps its page.

    audits.csv                      one row for each fine-tune
    artifacts/audit/NAME/           its audit
"""

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml

from misdirection.auditing.audit import run_audit
from misdirection.auditing.inputs import AuditInputs, Baseline, Directions
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult, AuditRow, AuditTable
from misdirection.auditing.stages import VERSION
from misdirection.choices import Dtype, Thinking
from misdirection.data.text import read_text
from misdirection.errors import InputError, MisdirectionError
from misdirection.files import plain_names, write_atomic
from misdirection.interventions.vectors import digest
from misdirection.models.adapters import is_adapter
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Models, Worker

TABLE = "audits.csv"

log = logging.getLogger("misdirection")


@dataclass(frozen=True)
class Listed:
    """One line of a list of fine-tunes.

    Attributes:
        fine_tune: as for a single audit.
        data: its training file.
        control: the user's own benign fine-tune on the same questions.
        source: the list and the line's number in it, for messages.
    """

    fine_tune: str
    data: Path | None
    control: str | None
    source: str


def read_list(path: Path) -> tuple[list[Listed], list[str]]:
    """Read a list: on each line a fine-tune, perhaps its training file, and perhaps a control; `#` begins a comment.

    Quotes are as in a shell.

    Gives its lines, and what is wrong with those that cannot be read. Raises `InputError` where it names nothing.
    """
    listed: list[Listed] = []
    failed: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            if words := _words(line):
                data, control = (*words[1:], None, None)[:2]
                listed.append(Listed(words[0], Path(data) if data else None, control, f"{path}:{number}"))
        except ValueError as error:
            failed.append(f"{path}:{number}: {error}")
    if not (listed or failed):
        raise InputError(f"{path}: names no fine-tune; write one on each line")
    return listed, failed


def _words(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    if len(words) > 3:
        raise ValueError(f"{len(words)} words: FINE_TUNE [TRAINING_FILE [CONTROL]]; quote spaces")
    return words


def audit_many(
    base: str,
    fine_tunes: str | Path,
    *,
    reference: Reference | str | Path | None = None,
    directions: Directions = (),
    out: str | Path | None = None,
    workers: Workers | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> AuditTable:
    """Audit all fine-tunes of a list, and write `audits.csv`; one that fails does not stop the others.

    Args:
        base: as in `audit`.
        fine_tunes: the list's file, as `read_list` reads it.
        reference: as in `audit`.
        directions: as in `audit`.
        out: folder of the audits; by default `many_folder`.
        workers: other processes that make them; this one alone when left out.
        dtype: as in `load`.
        device: as in `load`.
        thinking: as in `load`.
        chat_template: as in `load`, one for all, since they share the base; a file must be where every worker finds it.

    Raises:
        InputError: a file that is no list or has no line that can be audited, or what `audit` raises of a reference.
    """
    if chat_template == "fine-tune":
        raise InputError("chat_template: fine-tune: each has its own: give one for all, or audit these one by one")
    baseline = Baseline.open(base, reference, directions, dtype, device, thinking, chat_template)
    listed, failed = read_list(Path(fine_tunes))
    inputs = []
    for line in listed:
        try:
            inputs.append(baseline.inputs(line.fine_tune, line.data, control=line.control))
        except MisdirectionError as error:
            failed.append(f"{line.source}: {error}")
    if not inputs:
        raise InputError("; ".join(failed))
    for failure in failed:
        log.warning("%s; the others are audited", failure)
    made = run_audits(inputs, Path(out) if out else many_folder(fine_tunes), workers)
    return made.model_copy(update={"failed": [*failed, *made.failed]})


def many_folder(fine_tunes: str | Path) -> Path:
    """The folder of a list's audits where none is named."""
    return Path("audits") / Path(fine_tunes).stem


def run_audits(inputs: Sequence[AuditInputs], folder: Path, workers: Workers | None = None) -> AuditTable:
    """Audit all, and write `audits.csv`.

    Args:
        inputs: with one base, dtype, device and reference, without judging.
        folder: of the audits.
        workers: as in `audit_many`.
    """
    inputs[0].require_same_base()
    names = plain_names([each.fine_tune.name for each in inputs])
    with RunFolder.open(folder, _described(inputs)) as run, _running(run, inputs[0], workers) as (device, runner):
        tasks = [_task(name, each.on(device)) for name, each in zip(names, inputs, strict=True)]
        failed = []
        for batch in [tasks] if workers else [[task] for task in tasks]:
            try:
                runner.make(batch)
            except MisdirectionError as error:
                failed.append(str(error))
        made = [run.artifact(task.stage) for task in tasks if not run.missing(task.stages)]
        rows = [_row(AuditResult.load(audit), audit) for audit in made]
    table = AuditTable(audits=rows, failed=failed)
    if rows:
        write_atomic(folder / TABLE, table.frame().to_csv(index=False))
    return table


def _described(inputs: Sequence[AuditInputs]) -> str:
    settings = {"base": inputs[0].fine_tune.base, "fine_tunes": [each.fine_tune.name for each in inputs]}
    return yaml.safe_dump({"audits": settings}, sort_keys=False)


@contextmanager
def _running(run: RunFolder, inputs: AuditInputs, workers: Workers | None) -> Iterator[tuple[str, Runner]]:
    """The device that the audits run on, and their runner."""
    device = inputs.fine_tune.device
    if workers is None:
        yield device, LocalRunner(run, _worker(inputs, run.partial))
        return
    with connect(workers) as cluster:
        device = cluster.device(device)
        with RayRunner(run, partial(_worker, _portable(inputs).on(device)), cluster) as runner:
            yield device, runner


def _worker(inputs: AuditInputs, partial_folder: Callable[[str], Path]) -> Worker:
    """A worker with the base model, which stays loaded from one audit to the next."""
    return Worker(Models(inputs.fine_tune.load_base), partial_folder)


def _portable(inputs: AuditInputs) -> AuditInputs:
    """Without the reference, which another process reads by itself."""
    return replace(inputs, reference=None)


def _task(name: str, inputs: AuditInputs) -> Task:
    fine_tune, reference, stage = inputs.fine_tune, inputs.reference, f"audit/{name}"
    control = fine_tune.control
    # A whole model is too large to be sent: it must be where every worker finds it.
    models = {stage: fine_tune.folder, **({_control_name(stage): control.folder} if control else {})}
    folders = {name: folder for name, folder in models.items() if is_adapter(folder)}
    if reference:
        assert reference.folder is not None, "a reference that was read from its folder"
        folders["reference"] = reference.folder
    depends_on = {
        **fine_tune.identity.model_dump(),
        "version": VERSION,
        "fine_tune": fine_tune.digest,
        "control": fine_tune.control_digest,
        "reference": reference.digest if reference else None,
        "directions": {key: digest(direction.vectors) for key, direction in inputs.directions.items()},
        "data": inputs.data.sha256,
        "texts": inputs.texts.hashes(),
    }
    return Task({stage: depends_on}, BASE, partial(_audit, _portable(inputs)), folders)


def _control_name(stage: str) -> str:
    """What the adapter of an audit's control is called among a worker's adapters."""
    return f"control/{stage}"


def _audit(inputs: AuditInputs, worker: Worker, folders: Mapping[str, Path]) -> None:
    ((stage, folder),) = folders.items()
    adapter = worker.adapters.get(stage, inputs.fine_tune.folder)
    reference = Reference.load(worker.adapters["reference"]) if "reference" in worker.adapters else None
    control = inputs.fine_tune.control
    if control:
        control = replace(control, folder=worker.adapters.get(_control_name(stage), control.folder))
    fine_tune = replace(inputs.fine_tune, folder=adapter, control=control, models=worker.models)
    run_audit(replace(inputs, fine_tune=fine_tune, reference=reference), folder)


def _row(result: AuditResult, folder: Path) -> AuditRow:
    return AuditRow(
        fine_tune=result.fine_tune.name,
        verdict=result.verdict,
        shift=result.evidence.general,
        beyond_control=result.evidence.decisive["general"] if result.evidence.beyond_control else None,
        framed=result.evidence.framed,
        damage=result.evidence.damage,
        because="; ".join(result.because),
        page=str(folder / AuditResult.PAGE),
    )
