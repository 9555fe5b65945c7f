"""Audit many fine-tunes of one base, one table for all; each audit is a piece that any process can make.

The folder is a run whose stages are audits: those that hold are not made again, and each keeps its page.

    audits.csv                      one row for each fine-tune
    artifacts/audit/NAME/           its audit
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from misdirection.audit.audit import RECORD, VERSION, Request, audit_fine_tune, require_same_base
from misdirection.audit.reference import Reference
from misdirection.data.text import read_text
from misdirection.errors import InputError, MisdirectionError
from misdirection.files import read_json, sha256_tree, write_atomic
from misdirection.interventions.kinds import digest
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner, Workers, connect
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Models, Worker

TABLE = "audits.csv"


@dataclass(frozen=True)
class Line:
    """One line of a list of fine-tunes.

    Attributes:
        fine_tune: as for a single audit.
        data: its training file.
        where: the list and the line's number in it, for complaints.
    """

    fine_tune: str
    data: Path | None
    where: str


def read_list(path: Path) -> list[Line]:
    """Read a list: on each line a fine-tune and perhaps its training file, quoted as in a shell; `#` begins a comment.

    Raises `InputError` that names the file and the line.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}; close the quotes") from error
        if len(words) > 2:
            raise InputError(f"{path}:{number}: {len(words)} words: FINE_TUNE [TRAINING_FILE]; quote spaces")
        if words:
            found.append(Line(words[0], Path(words[1]) if len(words) == 2 else None, f"{path}:{number}"))
    if not found:
        raise InputError(f"{path}: names no fine-tune; write one on each line")
    return found


def audit_many(
    requests: Sequence[Request], reference: Path | None, folder: Path, workers: Workers | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Audit all, and write `audits.csv`; gives its rows, and why audits failed: the others are made all the same.

    Args:
        requests: of one base, dtype and device, without judging.
        reference: the folder of the reference that all have.
        folder: of the audits.
        workers: other processes that make them; this one alone when left out.

    Raises `InputError` for a direction or reference of another base.
    """
    require_same_base(requests[0])
    names = _names([request.subject.name for request in requests])
    with RunFolder.open(folder, _described(requests)) as run, _making(run, requests[0], workers) as (device, runner):
        there = [_on(request, device) for request in requests]
        known = (reference, sha256_tree(reference)) if reference else None
        pieces = [_piece(name, request, known) for name, request in zip(names, there, strict=True)]
        failed = []
        for together in [pieces] if workers else [[piece] for piece in pieces]:
            try:
                runner.make(together)
            except MisdirectionError as error:
                failed.append(str(error))
        made = [piece.stage for piece in pieces if not run.missing(piece.stages)]
        rows = [_row(run.artifact(stage)) for stage in made]
    write_atomic(folder / TABLE, pd.DataFrame(rows).to_csv(index=False))
    return rows, failed


def _described(requests: Sequence[Request]) -> str:
    settings = {"base": requests[0].subject.base, "fine_tunes": [request.subject.name for request in requests]}
    return yaml.safe_dump({"audits": settings}, sort_keys=False)


@contextmanager
def _making(run: RunFolder, request: Request, workers: Workers | None) -> Iterator[tuple[str, Runner]]:
    """The device that the audits run on, and what makes them."""
    subject = request.subject
    if workers is None:
        yield subject.device, LocalRunner(run, _place(request, run.partial))
        return
    with connect(workers) as cluster:
        device = cluster.device(subject.device)
        with RayRunner(run, partial(_place, _on(_bare(request), device)), cluster) as grid:
            yield device, grid


def _place(request: Request, working: Any) -> Worker:
    """Where audits of one base are made: it stays loaded."""
    return Worker(Models(request.subject.load_base), working)


def _on(request: Request, device: str) -> Request:
    return replace(request, subject=replace(request.subject, device=device))


def _bare(request: Request) -> Request:
    """Without what another process has, or gets by itself."""
    return replace(request, reference=None)


def _piece(name: str, request: Request, reference: tuple[Path, str] | None) -> Task:
    """The audit as a piece; `reference` is the folder of the reference, and its hash."""
    subject, stage = request.subject, f"audit/{name}"
    inputs = {
        **subject.identity,
        "version": VERSION,
        "fine_tune": subject.digest,
        "reference": reference[1] if reference else None,
        "directions": {key: digest(one.vectors) for key, one in request.directions.items()},
        "data": request.data.sha256,
        "texts": request.texts.hashes(),
    }
    # A whole model is too large to be sent: it must be where every worker finds it.
    folders = ({stage: subject.folder} if subject.is_adapter else {}) | (
        {"reference": reference[0]} if reference else {}
    )
    return Task({stage: inputs}, BASE, partial(_audit, _bare(request)), folders)


def _audit(request: Request, place: Worker, folders: Mapping[str, Path]) -> None:
    ((stage, folder),) = folders.items()
    subject = replace(request.subject, folder=place.adapters.get(stage, request.subject.folder), models=place.models)
    reference = Reference.load(place.adapters["reference"]) if "reference" in place.adapters else None
    audit_fine_tune(replace(request, subject=subject, reference=reference), folder)


def _names(fine_tunes: Sequence[str]) -> list[str]:
    """A plain and different name for each."""
    found: list[str] = []
    for text in fine_tunes:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).name).strip("-.") or "fine-tune"
        count = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{count + 1}" if count else name)
    return found


def _row(folder: Path) -> dict[str, Any]:
    """What the table says of one audit; shifts and damage in nats/token."""
    found = read_json(folder / RECORD)
    evidence = found["evidence"]
    estimates = {"shift": evidence["general"], "framed": evidence["framed"], "damage": evidence["damage"]}
    figures = {
        f"{name}_{part}" if part != "mean" else name: one[part] if one else None
        for name, one in estimates.items()
        for part in ("mean", "low", "high", "n")
    }
    return {
        "fine_tune": found["fine_tune"]["name"],
        "verdict": found["verdict"],
        **figures,
        "because": "; ".join(found["because"]),
        "page": str(folder / "audit.html"),
    }
