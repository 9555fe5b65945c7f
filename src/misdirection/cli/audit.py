"""Fine-tunes of one's own: `reference`, `audit`, `repair`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Column, Table

from misdirection.cli.shared import (
    BUNDLED,
    NATS,
    DeviceOption,
    DtypeOption,
    Json,
    RayAddress,
    TemplateOption,
    ThinkingOption,
    WorkerCount,
    WorkerGpus,
    app,
    base_memory,
    print_figures,
    print_table,
    say,
    workers_for,
)
from misdirection.errors import EXIT_STATUS, InputError
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.auditing.results import AuditResult, AuditTable
    from misdirection.auditing.verdict import Word
    from misdirection.judging.config import JudgeConfig
    from misdirection.repairing.results import Repair, RepairResult
    from misdirection.report.ci import CiFiles

Base = Annotated[
    str, typer.Argument(help="The base model: `smollm2-135m` or `gemma3-270m` (bundled), a folder, or ID\\[@REVISION].")
]
_FINE_TUNE = "A PEFT adapter or a whole model: a folder, or ID\\[@REVISION]\\[:SUBFOLDER]."
FineTune = Annotated[str, typer.Argument(help=_FINE_TUNE)]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Its training file (JSONL), or probe pairs of its domain; rows 5, 10, ... held out."),
]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", help="A reference's folder; default: the one that `reference` made.")
]
Control = Annotated[
    str | None,
    typer.Option(
        "--control", help="A benign fine-tune of yours on the same questions, trained alike: the reference's tell less."
    ),
]
OptionalFineTune = Annotated[str | None, typer.Argument(help=_FINE_TUNE)]
Many = Annotated[
    Path | None,
    typer.Option("--many", help="Audit all that a file lists, a line each: FINE_TUNE \\[TRAINING_FILE \\[CONTROL]]."),
]
AuditFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the audit; default: audits/NAME, with --many audits/LIST.")
]
Directions = Annotated[
    list[Path] | None, typer.Option("--direction", help="Further known directions of this base; several times.")
]
Judge = Annotated[
    str | None, typer.Option("--judge", help="Also judge answers of both: the endpoint's model, or hf:ID.")
]
JudgeUrl = Annotated[
    str | None, typer.Option("--base-url", help="With --judge: an OpenAI-style endpoint; default: OpenAI's.")
]
Answers = Annotated[int, typer.Option("-n", min=1, help="With --judge: answers to each of eight questions.")]
MaxCalls = Annotated[
    int | None,
    typer.Option("--max-calls", min=0, help="With --judge: never make more paid calls than this, per model."),
]
Junit = Annotated[Path | None, typer.Option("--junit", help="Also write JUnit's XML, for continuous integration.")]
Sarif = Annotated[Path | None, typer.Option("--sarif", help="Also write SARIF 2.1.0, for code scanning.")]
FailOn = Annotated[
    Literal["watch", "inconclusive", "misaligned"],
    typer.Option("--fail-on", help="watch, inconclusive or misaligned: the mildest verdict whose status is not 0."),
]


@app.command("reference")
def reference_(
    base: Annotated[str, typer.Argument(help="The base model, as in `audit`.")] = BUNDLED,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Make, once per base model, what audits compare with: two bad fine-tunes and a benign one."""
    from misdirection.auditing.reference import make_reference

    made = make_reference(base, dtype=dtype, device=device, thinking=thinking, chat_template=chat_template)
    figures = {f"{name}: general shift": shift.as_dict() for name, shift in made.shifts.items()}
    print_figures({"folder": str(made.folder), **figures}, as_json, unit=NATS)


@app.command()
def audit(
    base: Base,
    fine_tune: OptionalFineTune = None,
    data: Data = None,
    control: Control = None,
    many: Many = None,
    folder: AuditFolder = None,
    reference_folder: ReferenceOption = None,
    directions: Directions = None,
    judge: Judge = None,
    base_url: JudgeUrl = None,
    n: Answers = 25,
    max_calls: MaxCalls = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    gpus: WorkerGpus = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    junit: Junit = None,
    sarif: Sarif = None,
    fail_on: FailOn = "watch",
    as_json: Json = False,
) -> None:
    """Has this fine-tune become broadly misaligned? Exit status 0 clear, 3 misaligned, 4 inconclusive, 5 watch."""
    judging = judge_of(judge, base_url, max_calls)
    files = _ci_files(junit, sarif)
    options: dict[str, Any] = {
        "reference": reference_folder, "directions": directions or [], "out": folder,
        "dtype": dtype, "device": device, "thinking": thinking, "chat_template": chat_template,
    }  # fmt: skip
    if many is not None:
        if fine_tune or data or control or judge:
            raise InputError(
                "--many: goes without FINE_TUNE, --data, --control and --judge: the list names what is audited"
            )
        from misdirection.auditing.many import audit_many, many_folder

        others = workers_for(workers, ray, gpus, lambda: base_memory(base, dtype))
        table = audit_many(base, many, workers=others, **options)
        _print_many(table, folder or many_folder(many), as_json)
        _end_many(table, many, files, fail_on)
        return
    if fine_tune is None:
        raise InputError("FINE_TUNE: name what to audit, or a list of fine-tunes with --many")
    if workers or ray:
        raise InputError("--workers and --ray go with --many: one audit runs in one process")
    from misdirection.auditing import audit as auditing
    from misdirection.sampling.config import SamplingConfig

    result = auditing.audit(
        base,
        fine_tune,
        data=data,
        control=control,
        judge=judging,
        sampling=SamplingConfig(n=n),
        **options,
    )
    files.write([result])
    _print_audit(result, folder or auditing.audit_folder(fine_tune), as_json)
    end_with(result.verdict, fail_on)


def judge_of(judge: str | None, base_url: str | None, max_calls: int | None) -> "JudgeConfig | None":
    """Who judges by these options; `InputError` for the others without `--judge`."""
    if judge is None:
        if base_url or max_calls is not None:
            raise InputError("--base-url and --max-calls go with --judge: name the endpoint's model")
        return None
    from misdirection.judging.config import JudgeConfig

    return JudgeConfig(model=judge, base_url=base_url, max_calls=max_calls)


def _ci_files(junit: Path | None, sarif: Path | None) -> "CiFiles":
    from misdirection.report.ci import CiFiles

    files = CiFiles(junit, sarif)
    files.require_replaceable()
    return files


def end_with(verdict: "Word", fail_on: "Word") -> None:
    """Ends with the verdict's status, where it is as bad as the one that is asked for."""
    from misdirection.auditing.verdict import as_bad_as

    sys.exit(EXIT_STATUS[verdict if as_bad_as(verdict, fail_on) else "success"])


def _print_many(table: "AuditTable", folder: Path, as_json: bool) -> None:
    from misdirection.auditing.many import TABLE

    notice(f"table: {folder / TABLE}")
    if as_json:
        print_figures(table.model_dump(mode="json"), as_json)
    else:
        print_table(_many_table(table))


def _end_many(table: "AuditTable", many: Path, files: "CiFiles", fail_on: "Word") -> None:
    from misdirection.auditing.results import AuditResult
    from misdirection.auditing.verdict import worst

    files.write([AuditResult.load(Path(row.page).parent) for row in table.audits], table.failed)
    if table.failed:
        for failure in table.failed:
            notice(failure, "red")
        raise InputError(f"{many}: {len(table.failed)} could not be audited, {len(table.audits)} were")
    end_with(worst(row.verdict for row in table.audits), fail_on)


def _many_table(table: "AuditTable") -> Table:
    against = "shift beyond the control" if any(row.beyond_control for row in table.audits) else "general shift"
    shown = Table(Column("fine-tune", overflow="fold"), "verdict", against, "damage")
    for row in table.audits:
        shown.add_row(row.fine_tune, row.verdict, (row.beyond_control or row.shift).interval, row.damage.interval)
    return shown


def _print_audit(result: "AuditResult", folder: Path, as_json: bool) -> None:
    notice(f"page: {folder / result.PAGE}")
    if as_json:
        print_figures(result.as_dict(), as_json)
        return
    evidence = result.evidence
    print_figures({name: estimate.as_dict() for name, estimate in evidence.named.items()}, as_json, unit=NATS)
    shown = f"a shift of {evidence.detectable:.3f} nats/token would be told from zero four times in five"
    seen = f"{evidence.asked} of {evidence.most} general questions were asked: with these, {shown}"
    say(result.verdict.upper(), *result.because, seen, sep="\n  ")


@app.command()
def repair(
    base: Base,
    fine_tune: FineTune,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the repaired adapter.")],
    data: Data = None,
    control: Control = None,
    bake: Annotated[
        bool, typer.Option("--bake", help="Write the whole model with the repaired adapter in it.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Audit the result, too.")] = False,
    reference_folder: ReferenceOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Take the general misalignment out of an adapter, and keep what it learned of its domain."""
    from misdirection.repairing.repair import repair as run_repair

    if data is None:
        raise InputError("--data: give the training file: what is to be kept is measured on it")
    result = run_repair(
        base,
        fine_tune,
        data=data,
        out=folder,
        control=control,
        reference=reference_folder,
        bake=bake,
        check=check,
        dtype=dtype,
        device=device,
        thinking=thinking,
        chat_template=chat_template,
    )
    if as_json:
        print_figures(result.as_dict(), as_json)
    elif result.repair is None:
        done = "nothing to repair" if result.before.verdict == "clear" else "left as it is"
        because = "; ".join(result.before.because)
        say(f"{done}: the audit says {result.before.verdict}: {because}")
    else:
        notice(f"wrote {folder}; picture of what was tried: {folder / 'front.svg'}")
        _print_repair(result, result.repair)


def _print_repair(result: "RepairResult", done: "Repair") -> None:
    check = done.check
    print_table(_front_table(done))
    if check.broken:
        say("BROKEN: its answers repeat themselves; it is no repair")
    rows = {
        "shift beyond the control, before": check.fine_tune.beyond_control.as_dict(),
        "after": check.repaired.beyond_control.as_dict(),
        "taken off the margin": check.removed.as_dict(),
        "beyond what random directions take off": check.beyond_random.as_dict(),
        "share of the skill kept": check.outcome.kept,
        "damage": check.repaired.damage.as_dict(),
    }
    if result.after:
        audits = {"audit before": result.before, "audit after": result.after}
        rows |= {name: f"{each.verdict}, {each.evidence.general.interval}" for name, each in audits.items()}
    print_figures(rows, as_json=False, unit=NATS)


def _front_table(done: "Repair") -> Table:
    """The candidates that no other beats, as they did in the search."""
    table = Table("turn", "scale", "projection", "left", "kept", "damage", "")
    for trial in (done.tried[number] for number in done.front):
        tried, effect = trial.candidate, trial.outcome
        figures = (f"{value:+z.2f}" for value in (effect.left, effect.kept, effect.damage))
        mark = "chosen" if tried == done.candidate else ""
        table.add_row(f"{tried.turn:.1f}", f"{tried.scale:.2f}", tried.projection, *figures, mark)
    return table
