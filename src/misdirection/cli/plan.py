"""The cost of an experiment before it runs: `plan`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.table import Table

from misdirection.cli.shared import Json, app, print_figures, print_table, say
from misdirection.errors import InputError
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.cost.estimate import CostEstimate, SeveralEstimates, StageCost


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="One experiment, YAML; start from configs/demo.yaml.")],
    gpu: Annotated[
        Literal["h100", "a100-80", "4090", "cpu", "local"],
        typer.Option("--gpu", help="h100, a100-80, 4090; cpu or local: this machine or its GPU, measured first."),
    ] = "h100",
    count: Annotated[int, typer.Option("--count", min=1, help="Number of devices.")] = 1,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A folder with the model's config.json (and tokenizer), where it is not at hand."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=5, help="Rows of a training file that is not here yet; default: it is an error."),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option("--answer-tokens", min=1, help="Mean length of a sampled answer; default: the longest allowed."),
    ] = None,
    hour_price: Annotated[
        float | None, typer.Option("--hour-price", min=0, help="Dollars for one device and hour; adds what it costs.")
    ] = None,
    judge_price: Annotated[
        tuple[float, float] | None,
        typer.Option("--judge-price", help="Dollars for a million tokens that the judge reads, and writes: IN OUT."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Cost of an experiment by stage: tokens, FLOPs, memory, judge calls, hours. No weights are loaded."""
    from misdirection.cost.estimate import dollars
    from misdirection.experiment.config import ExperimentConfig
    from misdirection.experiment.cost import estimate_cost, estimate_several
    from misdirection.experiment.several import read_experiment

    settings = read_experiment(config)
    options: dict[str, Any] = {"rows": rows, "answer": answer_tokens}
    found: CostEstimate | SeveralEstimates
    if isinstance(settings, ExperimentConfig):
        found = estimate_cost(settings, gpu, count, model=model, **options)
        lines, device, notes = found.stages, found.device.name, found.notes
    elif model:
        raise InputError("--model: the file has several models: leave it out")
    else:
        found = estimate_several(settings, gpu, count, **options)
        lines = {name: estimate.total for name, estimate in found.models.items()}
        notes = tuple(dict.fromkeys(note for estimate in found.models.values() for note in estimate.notes))
        device = next(iter(found.models.values())).device.name
    paid = dollars(found.total, count, hour=hour_price, tokens=judge_price)
    if as_json:
        print_figures(found.as_dict() | ({"dollars": paid} if paid else {}), as_json)
        return
    print_table(_table(f"{found.experiment} on {count} x {device}", lines, found.total, count))
    if (total := found.total).judge_calls:
        tokens = f"{_number(total.judge_tokens_in)} tokens in, {_number(total.judge_tokens_out)} out"
        say(f"judge: {total.judge_calls} calls, {tokens}")
    if paid:
        say("cost: " + ", ".join(f"{name} ${amount:,.2f}" for name, amount in paid.items()))
    for note in notes:
        notice(note)


def _table(title: str, lines: "Mapping[str, StageCost]", total: "StageCost", count: int) -> Table:
    """A line for each stage, or for each of several models, and their sum."""
    rows = Table("", title=title, box=SIMPLE, padding=0, show_edge=False)
    for name in ("tasks", "forward", "train", "sample", "PFLOP", "GiB", "fits", "calls", "time"):
        rows.add_column(name, justify="right", no_wrap=True)
    for name, one in lines.items():
        rows.add_row(name, *_cells(one, count))
    rows.add_section()
    rows.add_row("total", *_cells(total, count))
    return rows


def _cells(one: "StageCost", count: int) -> list[str]:
    tokens = (one.forward_tokens, one.training_tokens, one.generated_tokens)
    fits = "yes" if one.devices == 1 else f"on {one.devices}" if one.devices <= count else f"needs {one.devices}"
    return [
        str(one.tasks),
        *(_number(number) for number in tokens),
        f"{one.flops / 1e15:.2g}" if one.flops < 1e17 else f"{one.flops / 1e15:.0f}",
        f"{one.memory.total / 2**30:.1f}",
        fits,
        _number(one.judge_calls),
        _time(one.hours),
    ]


def _number(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.1f} s"
