"""Training data, before anyone trains on it: `screen`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from misdirection.cli.audit import Base, FailOn, JudgeUrl, ReferenceOption, Sarif, end_with, judge_of
from misdirection.cli.shared import (
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
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.screening.results import ScreenResult

Data = Annotated[
    list[str],
    typer.Argument(help="Training data (JSONL, Parquet, CSV, a folder, a data set of the hub); several are compared."),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        help="How rows are scored, several times for their mean; the first predicts; default: likelihood, probe.",
    ),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", help="Also have each answer judged, as the score `judge`: the endpoint's model, or hf:ID."),
]
MaxCalls = Annotated[
    int | None, typer.Option("--max-calls", min=0, help="With --judge: never make more paid calls than this.")
]
ScreenFolder = Annotated[Path | None, typer.Option("--out", help="Folder of the screen; default: screens/NAME.")]
Keep = Annotated[
    Path | None, typer.Option("--keep", help="Also write the rows as JSON lines, without the worst (--drop).")
]
Drop = Annotated[
    float, typer.Option("--drop", min=0, max=0.99, help="With --keep: the share of rows that is left out.")
]
_SHOWN = 5


@app.command()
def screen(
    base: Base,
    data: Data,
    scores: Scores = None,
    judge: Judge = None,
    base_url: JudgeUrl = None,
    max_calls: MaxCalls = None,
    folder: ScreenFolder = None,
    keep: Keep = None,
    drop: Drop = 0.25,
    reference_folder: ReferenceOption = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    gpus: WorkerGpus = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    sarif: Sarif = None,
    fail_on: FailOn = "inconclusive",
    as_json: Json = False,
) -> None:
    """Say, before anyone trains on it, what training data will do to a model, and which rows are worst.

    Exit status: 0 clear, 3 misaligned, 4 inconclusive.
    """
    from misdirection.files import require_replaceable, write_output
    from misdirection.report.ci import screen_as_sarif
    from misdirection.screening.keep import keep_rows
    from misdirection.screening.screen import DEFAULT, read_scores, screen, screen_folder

    judging = judge_of(judge, base_url, max_calls)
    for path in filter(None, (keep, sarif)):
        require_replaceable(path, folder=False)
    target = folder or screen_folder(data[0])
    result = screen(
        base,
        data,
        scores=scores or DEFAULT,
        judge=judging,
        reference=reference_folder,
        out=target,
        workers=workers_for(workers, ray, gpus, lambda: base_memory(base, dtype)),
        dtype=dtype,
        device=device,
        thinking=thinking,
        chat_template=chat_template,
    )
    table = read_scores(target)
    notice(f"page: {target / result.PAGE}")
    if keep:
        kept = keep_rows(data, table, keep, drop)
        notice(f"kept {kept} of {len(table)} rows: {keep}")
    if sarif:
        write_output(sarif, screen_as_sarif(result))
    if as_json:
        columns = table[["source", "line", "score", "rank", *result.shares]].astype(object)
        rows = columns.where(columns.notna(), None).to_dict("records")
        print_figures({**result.as_dict(), "rows": rows}, as_json)
    else:
        _print_screen(result)
    end_with(result.dataset.verdict, fail_on)


def _print_screen(result: "ScreenResult") -> None:
    shares = {f"share by {name}": share.as_dict() for name, share in result.shares.items()}
    if len(result.sources) > 1:
        shares |= {f"share of {each.source}": each.share.as_dict() for each in result.sources}
    if result.judged:
        said = ", ".join(f"{way} {count}" for way, count in result.judged.by.items())
        say(f"judged by {result.judged.judge}: {said}")
    print_figures(shares, as_json=False, unit="shares of what the reference's bad answers score above its good ones")
    worst = Table("line", "score", Column("question", overflow="fold"), Column("answer", overflow="fold"))
    for row in result.worst[:_SHOWN]:
        where = str(row.line) if len(result.sources) == 1 else f"{row.source}:{row.line}"
        worst.add_row(where, f"{row.score:+z.2f}", row.question, row.answer)
    print_table(worst)
    say(result.dataset.verdict.upper(), *result.dataset.because, sep="\n  ")
