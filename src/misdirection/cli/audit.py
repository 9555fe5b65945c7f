"""Fine-tunes of one's own: `reference`, `audit`, `repair`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from misdirection.choices import Dtype
from misdirection.cli.shared import (
    BUNDLED,
    DeviceOption,
    DtypeOption,
    Json,
    RayAddress,
    WorkerCount,
    WorkerGpus,
    app,
    out,
    print_figures,
    reference,
    workers_for,
)
from misdirection.errors import InputError, MisdirectionError
from misdirection.progress import console as notices

if TYPE_CHECKING:
    from misdirection.audit.audit import Request
    from misdirection.runs.ray_workers import Workers

Base = Annotated[str, typer.Argument(help="The base model: `smollm2-135m` (bundled), a folder, or ID\\[@REVISION].")]
_FINE_TUNE = "A PEFT adapter or a whole model: a folder, or ID\\[@REVISION]\\[:SUBFOLDER]."
FineTune = Annotated[str, typer.Argument(help=_FINE_TUNE)]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Its training file (JSONL), or probe pairs of its domain; rows 5, 10, ... held out."),
]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", help="A reference's folder; default: the one that `reference` made.")
]


@app.command("reference")
def reference_(
    base: Annotated[str, typer.Argument(help="The base model, as in `audit`.")] = BUNDLED,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Make, once per base model, what audits compare with: two bad fine-tunes and a benign one."""
    from misdirection.audit.reference import make_reference

    name, revision, _ = reference(base)
    made, folder = make_reference(name, revision, dtype, device)
    figures = {f"{one}: general shift": shift.as_dict() for one, shift in made.shifts.items()}
    print_figures({"folder": str(folder), **figures}, as_json)


@app.command()
def audit(
    base: Base,
    fine_tune: Annotated[str | None, typer.Argument(help=_FINE_TUNE)] = None,
    data: Data = None,
    many: Annotated[
        Path | None,
        typer.Option("--many", help="Audit all that a file lists, a line each: FINE_TUNE \\[TRAINING_FILE]."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the audit; default: audits/NAME, with --many audits/LIST.")
    ] = None,
    reference_folder: ReferenceOption = None,
    directions: Annotated[
        list[Path] | None, typer.Option("--direction", help="Further known directions of this base; several times.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Also judge answers of both: the endpoint's model, or hf:ID.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="With --judge: an OpenAI-style endpoint; default: OpenAI's.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="With --judge: answers to each of eight questions.")] = 25,
    max_calls: Annotated[
        int | None, typer.Option("--max-calls", help="With --judge: never make more paid calls than this, per model.")
    ] = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    gpus: WorkerGpus = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Has this fine-tune become broadly misaligned? Exit status 0 clear, 1 watch, 3 misaligned, 4 inconclusive."""
    from misdirection.audit.audit import audit_fine_tune
    from misdirection.audit.verdict import EXIT_STATUS

    if judge is None and (base_url or max_calls is not None):
        raise InputError("--base-url and --max-calls go with --judge: name the endpoint's model")
    if many is not None:
        if fine_tune or data or judge:
            raise InputError("--many: goes without FINE_TUNE, --data and --judge: the list names what is audited")
        others = workers_for(workers, ray, gpus, lambda: _weights(base, dtype))
        _audit_many(base, many, folder, reference_folder, directions or [], (dtype, device), others, as_json)
        return
    if fine_tune is None:
        raise InputError("FINE_TUNE: name what to audit, or a list of fine-tunes with --many")
    if workers or ray:
        raise InputError("--workers and --ray go with --many: one audit runs in one process")
    request = _request(base, fine_tune, data, reference_folder, directions or [], (dtype, device))
    if judge is not None:
        request = replace(request, judging=_judging(judge, base_url, n, max_calls))
    place = folder or Path("audits") / Path(fine_tune).name
    found = audit_fine_tune(request, place)
    _print_audit(found, place, as_json)
    sys.exit(EXIT_STATUS[found["verdict"]])


def _weights(base: str, dtype: Dtype) -> int:
    """Bytes of the base model's weights in main memory."""
    from misdirection.cost.planning import weight_memory

    return weight_memory(*reference(base)[:2], dtype)


def _audit_many(
    base: str,
    many: Path,
    folder: Path | None,
    reference_folder: Path | None,
    directions: list[Path],
    how: tuple[Dtype, str],
    workers: "Workers | None",
    as_json: bool,
) -> None:
    from misdirection.audit.many import TABLE, audit_many, read_list
    from misdirection.audit.verdict import worst

    request, reference_folder = _requests(base, reference_folder, directions, how)
    requests = []
    for line in read_list(many):
        try:
            requests.append(request(line.fine_tune, line.data))
        except MisdirectionError as error:
            raise InputError(f"{line.where}: {error}") from error
    place = folder or Path("audits") / many.stem
    rows, failed = audit_many(requests, reference_folder, place, workers)
    notices.print(f"table: {place / TABLE}", highlight=False, soft_wrap=True)
    if as_json:
        print_figures({"audits": rows, "failed": failed}, as_json)
    else:
        out.print(_many_table(rows))
    if failed:
        raise InputError("; ".join(failed))
    sys.exit(worst(row["verdict"] for row in rows))


def _many_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(Column("fine-tune", overflow="fold"), "verdict", "general shift", "damage")
    for row in rows:
        shift, damage = (
            f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]" for name in ("shift", "damage")
        )
        table.add_row(row["fine_tune"], row["verdict"], shift, damage)
    return table


def _judging(judge: str, base_url: str | None, n: int, max_calls: int | None) -> Any:
    from misdirection.audit.audit import Judging
    from misdirection.judging.config import JudgeConfig
    from misdirection.sampling.config import SamplingConfig

    return Judging(JudgeConfig(model=judge, base_url=base_url, max_calls=max_calls), SamplingConfig(n=n))


@app.command()
def repair(
    base: Base,
    fine_tune: FineTune,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the repaired adapter.")],
    data: Data = None,
    bake: Annotated[
        bool, typer.Option("--bake", help="Write the whole model with the repaired adapter in it.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Audit the result, too.")] = False,
    reference_folder: ReferenceOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Take the general misalignment out of an adapter, and keep what it learned of its domain."""
    from misdirection.repair.repair import repair_fine_tune

    request = _request(base, fine_tune, data, reference_folder, [], (dtype, device))
    found = repair_fine_tune(request, folder, bake=bake, check=check)
    _print_repair(found, folder, as_json)


def _print_repair(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print_figures(found, as_json)
        return
    if not found["repaired"]:
        word, because = found["before"]["verdict"], "; ".join(found["before"]["because"])
        said = "nothing to repair" if word == "clear" else "left as it is"
        out.print(f"{said}: the audit says {word}: {because}", soft_wrap=True)
        return
    check = found["check"]
    notices.print(f"wrote {folder}; picture of what was tried: {folder / 'front.svg'}", highlight=False, soft_wrap=True)
    out.print(_front_table(found))
    if check["broken"]:
        out.print("BROKEN: its answers repeat themselves; it is no repair", highlight=False)
    rows = {
        "shift before": check["fine_tune"]["shift"],
        "shift after": check["repaired"]["shift"],
        "share of it gone": check["gone"],
        "gone by random directions": check["random"]["gone"],
        "share of the skill kept": check["kept"],
        "damage": check["repaired"]["damage"],
    }
    if "after" in found:
        rows |= {f"audit {when}": _verdict(found[when]) for when in ("before", "after")}
    print_figures(rows, as_json)


def _front_table(found: dict[str, Any]) -> Table:
    """The candidates that no other one beats, as they did in the search."""
    table = Table("turn", "scale", "projection", "gone", "kept", "damage", "")
    for number in found["front"]:
        one, did = found["tried"][number]["candidate"], found["tried"][number]["outcome"]
        figures = (f"{did[name]:+.2f}" for name in ("gone", "kept", "damage"))
        mark = "chosen" if one == found["candidate"] else ""
        table.add_row(f"{one['turn']:.1f}", f"{one['scale']:.2f}", one["projection"], *figures, mark)
    return table


def _verdict(found: dict[str, Any]) -> str:
    general = found["evidence"]["general"]
    return f"{found['verdict']}, {general['mean']:+.3f} [{general['low']:+.3f}, {general['high']:+.3f}]"


def _request(
    base: str,
    fine_tune: str,
    data: Path | None,
    reference_folder: Path | None,
    directions: list[Path],
    how: tuple[Dtype, str],
) -> "Request":
    return _requests(base, reference_folder, directions, how)[0](fine_tune, data)


def _requests(
    base: str, reference_folder: Path | None, directions: list[Path], how: tuple[Dtype, str]
) -> "tuple[Callable[[str, Path | None], Request], Path | None]":
    """What makes the request for a fine-tune and its data, and the folder of the reference."""
    from misdirection import data as texts
    from misdirection.audit.audit import Request
    from misdirection.audit.reference import default_folder, open_reference
    from misdirection.audit.texts import OwnTexts, own_texts
    from misdirection.directions.direction import Direction

    name, revision, _ = reference(base)
    known = {path.stem: Direction.load(path) for path in directions}
    place = reference_folder or default_folder(name, revision)
    opened = open_reference(place) if reference_folder or place.is_dir() or not known else None
    general = opened.texts.general if opened else texts.probe_pairs()

    def request(fine_tune: str, data: Path | None) -> Request:
        return Request(
            subject=_subject(name, revision, fine_tune, how),
            reference=opened,
            directions=known,
            data=own_texts(data, general) if data else OwnTexts(),
            general=general,
            neutral=texts.neutral_examples(),
        )

    return request, place if opened else None


def _subject(base: str, revision: str | None, fine_tune: str, how: tuple[Dtype, str]) -> Any:
    from misdirection.audit.fine_tune import Subject
    from misdirection.models.loading import local_fine_tune

    source, tuned_revision, subfolder = reference(fine_tune)
    return Subject(base, revision, fine_tune, local_fine_tune(source, tuned_revision, subfolder), *how)


def _print_audit(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    notices.print(f"page: {folder / 'audit.html'}", highlight=False, soft_wrap=True)
    if as_json:
        print_figures(found, as_json)
        return
    evidence = found["evidence"]
    rows = {
        "general margin shift": evidence["general"],
        "framed margin shift": evidence["framed"],
        "in-domain margin shift": evidence["in_domain"]["margin"],
        "in-domain loss change": evidence["in_domain"]["loss"],
        "damage": evidence["damage"],
    }
    print_figures({name: value for name, value in rows.items() if value}, as_json)
    out.print(f"{found['verdict'].upper()}", *found["because"], sep="\n- ", soft_wrap=True, highlight=False)
