"""Reading LoRA adapters: `interpret`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from misdirection.choices import Dtype
from misdirection.cli.shared import (
    BUNDLED,
    DeviceOption,
    DtypeOption,
    Json,
    Model,
    Pairs,
    app,
    load_chat,
    out,
    print_figures,
    read_probe_pairs,
    reference,
)
from misdirection.errors import InputError
from misdirection.progress import console as notices

if TYPE_CHECKING:
    from misdirection.interpretation.config import InterpretationConfig

# Nine rank-1 adapters of a model of 135M parameters take less than three minutes on two processor cores.
_QUICK: dict[str, Any] = {
    "pairs": 12, "causal_pairs": 3, "permutations": 2, "scalings": (), "checkpoints": 3, "splits": 10,
}  # fmt: skip


@app.command()
def interpret(
    organism: Annotated[
        str | None, typer.Argument(help="An adapter (folder or Hugging Face id); with --run, an organism's name.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Read an organism of this run, in its report.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for an interpretation outside of a run.")] = None,
    model: Model = BUNDLED,
    pairs: Pairs = None,
    domain: Annotated[
        str | None,
        typer.Option("--domain", help="What it was trained on: a shipped domain, or probe pairs of it (JSONL)."),
    ] = None,
    directions: Annotated[
        list[Path] | None, typer.Option("--direction", help="Direction files; effects are compared with the first.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="More pairs, exact Shapley values, every scaling (some 20 times as long).")
    ] = False,
    read_pairs: Annotated[
        int | None, typer.Option("--read-pairs", min=4, help="Pairs of each kind that are read by token.")
    ] = None,
    causal_pairs: Annotated[
        int | None, typer.Option("--causal-pairs", min=2, help="Pairs of each kind for what takes many passes.")
    ] = None,
    components: Annotated[int | None, typer.Option("--components", min=1, help="Leading ones of each module.")] = None,
    permutations: Annotated[
        int | None, typer.Option("--permutations", min=2, help="Orders per question of sampled Shapley values.")
    ] = None,
    scalars: Annotated[
        Path | None, typer.Option("--scalars", help="Instead of a model: a table of scalars measured elsewhere.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="With --scalars: the answers, for the split by question.")
    ] = None,
    scaled: Annotated[
        Path | None, typer.Option("--scaled", help="Judged answers under scaled adapters, to be tabulated.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Read the rank-1 adapters: scalars, probes, roles, Shapley values, geometry, importance, dynamics.

    Within a run (--run), alone (--out), or from tables that were measured elsewhere (--scalars, --scaled).
    """
    from misdirection.interpretation.config import InterpretationConfig

    _require_one_way(organism, run, folder, scalars, scaled)
    if organism is None:
        _tables(scalars, answers, scaled, folder, as_json)
        return
    given = {
        "pairs": read_pairs, "causal_pairs": causal_pairs, "components": components, "permutations": permutations
    }  # fmt: skip
    sizes = ({} if full else _QUICK) | {name: value for name, value in given.items() if value is not None}
    settings = InterpretationConfig(organism=organism, **sizes)
    if run is not None:
        _within(run, settings, as_json)
        return
    assert folder is not None, "it was required"
    _alone(settings, folder, (model, dtype, device), (pairs, domain, directions or []), as_json)


def _require_one_way(
    organism: str | None, run: Path | None, folder: Path | None, scalars: Path | None, scaled: Path | None
) -> None:
    tables = scalars is not None or scaled is not None
    if (organism is None) != tables:
        raise InputError("interpret: give an organism, or tables that were measured elsewhere with --scalars")
    if organism is not None and (run is None) == (folder is None):
        raise InputError("interpret: give --run for an organism of a run, or --out for an adapter of its own")
    if tables and run is not None:
        raise InputError("--run: goes with an organism; tables are written to --out")


def _within(run: Path, settings: "InterpretationConfig", as_json: bool) -> None:
    from misdirection.experiment.config import read_config
    from misdirection.experiment.runner import run_experiment

    config = read_config(run / "experiment.yaml")
    if settings.organism not in config.organisms:
        raise InputError(f"{run}: has no organism {settings.organism!r}; it has {', '.join(config.organisms)}")
    results = run_experiment(config.model_copy(update={"interpretation": settings}), run)
    _print_section(results.as_dict()["adapters"], run / "report.html", as_json)


def _alone(
    settings: "InterpretationConfig",
    folder: Path,
    base: tuple[str, Dtype, str],
    texts: tuple[Path | None, str | None, list[Path]],
    as_json: bool,
) -> None:
    from misdirection.directions.direction import Direction
    from misdirection.experiment.texts import identify
    from misdirection.interpretation.read import ALONE, interpret_alone
    from misdirection.models.adapters import local_adapter
    from misdirection.runs.worker import Models

    (model, dtype, device), (pairs, domain, files) = base, texts
    name, revision, _ = reference(model)
    section, report = interpret_alone(
        folder,
        settings,
        Models(lambda: load_chat(model, None, dtype, device), {ALONE: local_adapter(*reference(settings.organism))}),
        identify(name, revision, dtype, device),
        read_probe_pairs(pairs),
        _domain_pairs(domain),
        {path.stem: Direction.load(path) for path in files},
    )
    _print_section(section, report, as_json)


def _domain_pairs(domain: str | None) -> Any:
    """A name and its pairs; a shipped domain's are those held out of training."""
    from misdirection import data

    if domain is None:
        return None
    if domain in data.domains():
        return domain, data.domain_pairs(domain, "held_out")
    return Path(domain).stem, data.read_pairs(Path(domain))


def _tables(
    scalars: Path | None, answers: Path | None, scaled: Path | None, folder: Path | None, as_json: bool
) -> None:
    from misdirection.interpretation.tables import interpret_tables

    section, report = interpret_tables(scalars, answers, scaled, folder)
    _print_section(section, report, as_json)


def _print_section(section: dict[str, Any], report: Path | None, as_json: bool) -> None:
    if report is not None:
        notices.print(f"report: {report}", highlight=False, soft_wrap=True)
    if as_json:
        print_figures(section, as_json)
        return
    for table in (_probe_table(section), _role_table(section), _scaling_table(section)):
        if table.row_count:
            out.print(table)
    for finding in section.get("findings", []):
        out.print(f"{'+' if finding['holds'] else '-'} {finding['claim']} {finding['evidence']}", soft_wrap=True)


def _probe_table(section: dict[str, Any]) -> Table:
    """Probes on single tokens; those on an answer's maximum and mean are in the JSON and the report."""
    table = Table("probe", "split by", "AUROC", "null AUROC", "leading coefficients")
    for probe in section.get("probes", []):
        if probe["pooling"] == "token":
            means = {name: sum(values) / len(values) for name, values in probe["coefficients"].items()}
            leading = sorted(means, key=lambda name: -abs(means[name]))[:2]
            shown = "\n".join(f"{name} {means[name]:+.2f}" for name in leading) or f"({probe['features']})"
            table.add_row(probe["name"], probe["split"], _range(probe["auroc"]), _range(probe["null_auroc"]), shown)
    return table


def _role_table(section: dict[str, Any]) -> Table:
    table = Table("layer", "role", "because")
    for role in section.get("roles", []):
        table.add_row(str(role["layer"]), role["role"], role["rule"])
    return table


def _scaling_table(section: dict[str, Any]) -> Table:
    table = Table("experiment", "alignment", "medical", "answers", "share of the coherent")
    for row in section.get("scaled", []):
        share = f"{row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}] n={row['answers']}"
        table.add_row(row["experiment"], row["alignment"], "yes" if row["medical"] else "no", str(row["hits"]), share)
    return table


def _range(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
