"""Reading LoRA adapters: `interpret`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from misdirection.cli.shared import (
    BUNDLED,
    DeviceOption,
    DtypeOption,
    Json,
    Model,
    Pairs,
    TemplateOption,
    ThinkingOption,
    app,
    print_figures,
    print_table,
    read_probe_pairs,
    say,
)
from misdirection.errors import InputError
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.interpretation.results import AdapterFigures


Organism = Annotated[
    str | None, typer.Argument(help="An adapter (folder or Hugging Face id); with --run, an organism's name.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Read an organism of this run, in its report.")]
Folder = Annotated[Path | None, typer.Option("--out", help="Folder for an interpretation outside of a run.")]
Domain = Annotated[
    str | None, typer.Option("--domain", help="What it was trained on: a shipped domain, or probe pairs of it (JSONL).")
]
DirectionFiles = Annotated[
    list[Path] | None, typer.Option("--direction", help="Direction files; effects are compared with the first.")
]
Checkpoints = Annotated[
    str | None,
    typer.Option("--checkpoints", help="Its checkpoints: a folder, ID[@REVISION][:FOLDER], or several with commas."),
]
Full = Annotated[
    bool, typer.Option("--full", help="More pairs, exact Shapley values, every scaling (some 20 times as long).")
]
ReadPairs = Annotated[
    int | None, typer.Option("--read-pairs", min=4, help="Pairs of each kind that are read by token.")
]
CausalPairs = Annotated[
    int | None, typer.Option("--causal-pairs", min=2, help="Pairs of each kind for what takes many passes.")
]
Components = Annotated[int | None, typer.Option("--components", min=1, help="Leading ones of each module.")]
Permutations = Annotated[
    int | None, typer.Option("--permutations", min=2, help="Orders per question of sampled Shapley values.")
]
ScalarTable = Annotated[
    Path | None, typer.Option("--scalars", help="Instead of a model: a table of scalars measured elsewhere.")
]
AnswerTable = Annotated[
    Path | None, typer.Option("--answers", help="With --scalars: the answers, for the split by question.")
]
ScaledTable = Annotated[
    Path | None, typer.Option("--scaled", help="Judged answers under scaled adapters, to be tabulated.")
]


@app.command()
def interpret(
    organism: Organism = None,
    run: RunOption = None,
    folder: Folder = None,
    model: Model = BUNDLED,
    pairs: Pairs = None,
    domain: Domain = None,
    directions: DirectionFiles = None,
    checkpoints: Checkpoints = None,
    full: Full = False,
    read_pairs: ReadPairs = None,
    causal_pairs: CausalPairs = None,
    components: Components = None,
    permutations: Permutations = None,
    scalars: ScalarTable = None,
    answers: AnswerTable = None,
    scaled: ScaledTable = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Read the rank-1 adapters: scalars, probes, roles, Shapley values, geometry, importance, dynamics.

    Within a run (--run), alone (--out), or from tables that were measured elsewhere (--scalars, --scaled).
    """
    from misdirection.interpretation.config import InterpretationConfig

    _require_one_way(organism, run, folder, scalars, answers, scaled)
    if checkpoints is not None and folder is None:
        raise InputError("--checkpoints: goes with --out; in a run they are those that its organism keeps")
    if organism is None:
        from misdirection.interpretation.interpret import interpret_tables

        _print(interpret_tables(scalars, answers, scaled, folder).adapters, folder, as_json)
        return
    if run is not None and (thinking != "off" or chat_template):
        raise InputError("--thinking and --chat-template: go with --out; in a run they are its experiment's")
    settings = InterpretationConfig.sized(
        organism, full=full, pairs=read_pairs, causal_pairs=causal_pairs, components=components,
        permutations=permutations,
    )  # fmt: skip
    if run is not None:
        from misdirection.experiment.runner import interpret_within

        figures = interpret_within(run, settings).adapters
        assert figures is not None, "they were asked for"
    else:
        from misdirection.interpretation import interpret as library

        assert folder is not None, "it was required"
        files = {path.stem: path for path in directions or []}
        figures = library.interpret(
            organism, folder, model=model, settings=settings, pairs=read_probe_pairs(pairs), domain=domain,
            directions=files, checkpoints=checkpoints, dtype=dtype, device=device, thinking=thinking,
            chat_template=chat_template,
        ).adapters  # fmt: skip
    _print(figures, run or folder, as_json)


def _require_one_way(
    organism: str | None,
    run: Path | None,
    folder: Path | None,
    scalars: Path | None,
    answers: Path | None,
    scaled: Path | None,
) -> None:
    tables = scalars is not None or scaled is not None
    if (organism is None) != tables:
        raise InputError("interpret: give an organism, or tables that were measured elsewhere with --scalars")
    if organism is not None and (run is None) == (folder is None):
        raise InputError("interpret: give --run for an organism of a run, or --out for an adapter of its own")
    if answers is not None and scalars is None:
        raise InputError("--answers: goes with --scalars, whose tokens are of these answers")
    if tables and run is not None:
        raise InputError("--run: goes with an organism; tables are written to --out")


def _print(figures: "AdapterFigures", folder: Path | None, as_json: bool) -> None:
    from misdirection.report.adapter_findings import find_in_adapters

    if folder is not None:
        notice(f"report: {folder / 'report.html'}")
    if as_json:
        print_figures(figures.model_dump(mode="json"), as_json)
        return
    for table in (_probe_table(figures), _role_table(figures), _scaling_table(figures)):
        if table.row_count:
            print_table(table)
    for finding in find_in_adapters(figures):
        mark = {True: "holds", False: "does not hold", None: "not measured"}[finding.holds]
        say(f"{mark}: {finding.claim}\n    {finding.evidence}")


def _probe_table(figures: "AdapterFigures") -> Table:
    """Probes on single tokens; those on an answer's maximum and mean are in the JSON and the report."""
    table = Table(Column("probe", overflow="fold"), "split by", "AUROC", "null AUROC", "leading coefficients")
    for probe in figures.probes:
        if probe.pooling == "token":
            means = {name: sum(values) / len(values) for name, values in probe.coefficients.items()}
            leading = sorted(means, key=lambda name: -abs(means[name]))[:2]
            shown = "\n".join(f"{name} {means[name]:+z.2f}" for name in leading) or f"({probe.features})"
            table.add_row(probe.name, probe.split, str(probe.auroc), str(probe.null_auroc), shown)
    return table


def _role_table(figures: "AdapterFigures") -> Table:
    table = Table("layer", "role", Column("because", overflow="fold"))
    for role in figures.roles:
        table.add_row(str(role.layer), role.role, role.rule)
    return table


def _scaling_table(figures: "AdapterFigures") -> Table:
    table = Table("experiment", "alignment", "medical", "answers", "share of the coherent")
    for row in figures.scaled:
        share = f"{row.share:.0%} [{row.low:.0%}, {row.high:.0%}] n={row.answers}"
        table.add_row(row.experiment, row.alignment, "yes" if row.medical else "no", str(row.hits), share)
    return table
