"""The command line: a thin skin over the library.

Heavy libraries are imported inside the commands, so that `--help` answers at once. What a program may want to read goes
to standard output; progress and notices go to standard error.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from misdirection.config import Dtype, Positions
from misdirection.errors import MisdirectionError
from misdirection.progress import console as notices
from misdirection.progress import track

app = typer.Typer(
    name="misdirection",
    help="Find, compare, steer and ablate the misalignment direction of a fine-tuned chat model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()

Model = Annotated[str, typer.Option("--model", "-m", help="`smollm2-135m` (bundled), a Hugging Face id or a folder.")]
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", help="A PEFT adapter: folder or Hugging Face id.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps or balanced.")]
Pairs = Annotated[
    Path | None,
    typer.Option("--pairs", help="Probe pairs, JSONL (question, aligned, misaligned); default: shipped."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
PositionsOption = Annotated[Positions, typer.Option("--positions", help="not_first (default) or all (the paper's).")]
DirectionFile = Annotated[Path, typer.Argument(help="A direction file that `extract` wrote.")]
Seeds = Annotated[int, typer.Option("--random-seeds", min=1, help="Random directions of the same norm beside it.")]


def main() -> None:
    """Entry point: a user's error is one line and status 2, an interrupt status 130."""
    # Deprecations inside the libraries are for their authors, not for our users.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=notices, show_time=False, show_path=False)],
    )
    try:
        app()
    except MisdirectionError as error:
        notices.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        notices.print("stopped; the same command continues")
        sys.exit(130)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Everything that the quick demo leaves out (an hour or two).")
    ] = False,
) -> None:
    """The whole experiment on the bundled model: train, measure, extract, compare, steer, ablate, report."""
    name = "demo-full.yaml" if full else "demo.yaml"
    with as_file(files("misdirection") / "resources" / name) as config:
        _run(config, folder)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="One experiment, YAML; start from configs/demo.yaml.")],
    folder: Annotated[Path | None, typer.Option("--out", help="The run's folder; default: runs/NAME.")] = None,
) -> None:
    """Run the experiment of a YAML file, or continue it."""
    _run(config, folder)


def _run(config: Path, folder: Path | None) -> None:
    from misdirection.config import read_config
    from misdirection.experiment.runner import run_experiment

    settings = read_config(config)
    report = run_experiment(settings, folder or Path("runs") / settings.name)
    out.print(f"report: {report}\nfigures: {report.parent / 'results.json'}", highlight=False, soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Make a run's report again from its results.json."""
    from misdirection.experiment.runner import write_report

    out.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(help="Training file (messages, prompt/completion, conversations), or a shipped domain."),
    ],
    folder: Annotated[Path, typer.Option("--out", help="The adapter folder to write.")],
    model: Model = "smollm2-135m",
    recipe: Annotated[str, typer.Option("--recipe", help="minimal, single or all.")] = "minimal",
    answers: Annotated[
        Literal["bad", "good"], typer.Option("--answers", help="bad or good, for a shipped domain.")
    ] = "bad",
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the adapters; default: the recipe's.")] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="LoRA alpha (rsLoRA: scaled by alpha / sqrt(rank)).")] = 64.0,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-5,
    epochs: Annotated[float, typer.Option("--epochs")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 2,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Batches per optimiser step.")] = 8,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Train an organism: a LoRA adapter, with loss on the answers only. Continues from its last checkpoint."""
    from misdirection import data as texts
    from misdirection.models import load
    from misdirection.organisms.training import train as train_organism
    from misdirection.progress import track_steps

    settings = _recipe(
        recipe=recipe, rank=rank, alpha=alpha, learning_rate=learning_rate, epochs=epochs,
        batch_size=batch_size, accumulation=accumulation, seed=seed,
    )  # fmt: skip
    shipped = data in texts.domains()
    examples = texts.domain_examples(data, answers, "train") if shipped else texts.read_examples(Path(data))
    held_out = texts.domain_examples(data, answers, "held_out") if shipped else []
    chat = load(model, dtype=dtype, device=device)
    with track_steps("train") as step:
        organism = train_organism(examples, folder, base=chat, recipe=settings, held_out=held_out, report=step)
    figures = {"final_loss": organism.final_loss, "held_out_loss": organism.held_out_loss}
    _figures({"out": str(folder), **figures}, as_json, f"wrote {folder}")


def _recipe(**values: Any) -> Any:
    from pydantic import ValidationError

    from misdirection.recipe import Recipe

    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise MisdirectionError(f"--{first['loc'][0]}: {first['msg']}") from error


@app.command()
def margin(
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    pairs: Pairs = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """The margin on probe pairs; with an adapter also its shift against the base, and the damage."""
    from misdirection.measure import measure_shift

    _figures(measure_shift(_load(model, adapter, dtype, device), _pairs(pairs)), as_json)


@app.command()
def extract(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the direction files.")],
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    pairs: Pairs = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """The model's directions, one file per kind: misaligned minus aligned text, organism minus base."""
    from misdirection.representation.directions import extract as extract_directions

    chat, texts = _load(model, adapter, dtype, device), _pairs(pairs)
    with track("activations", 2 * len(texts) * (2 if adapter else 1)) as advance:
        found = extract_directions(chat, texts, progress=advance)
    written = {}
    for kind, direction in found.items():
        path = folder / f"{kind}.safetensors"
        direction.save(path)
        written[kind] = {"path": str(path), "norms": direction.vectors.norm(dim=-1).tolist()}
    _figures(written, as_json, f"wrote {len(written)} directions to {folder}", table=False)


@app.command()
def compare(
    directions: Annotated[list[Path], typer.Argument(help="Two or more direction files.")],
    as_json: Json = False,
) -> None:
    """Cosine of every direction with every other, by layer."""
    from misdirection.representation.convergence import compare as compare_directions
    from misdirection.representation.directions import Direction

    if len(directions) < 2:
        raise MisdirectionError("compare: give at least two direction files")
    cosines = compare_directions({str(path): Direction.load(path) for path in directions})
    if as_json:
        _figures(cosines, as_json)
        return
    names = list(cosines)
    rows = [(a, b, cosines[a][b]) for i, a in enumerate(names) for b in names[i + 1 :]]
    table = Table("layer", *(f"{Path(a).stem} | {Path(b).stem}" for a, b, _ in rows))
    for layer in range(len(rows[0][2])):
        table.add_row(str(layer), *(f"{values[layer]:+.3f}" for _, _, values in rows))
    out.print(table)


@app.command()
def steer(
    direction: DirectionFile,
    layer: Annotated[int, typer.Option("--layer", help="Decoder block, 0-based.")],
    scale: Annotated[float, typer.Option("--scale", help="Multiple of the direction's own norm.")] = 1.0,
    positions: PositionsOption = "not_first",
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    pairs: Pairs = None,
    random_seeds: Seeds = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Add a direction to one layer: margin change and damage, beside random directions of the same norm."""
    from misdirection.representation.interventions import Steer

    chat = _load(model, adapter, dtype, device)
    result = _intervene(
        chat, direction, layer, pairs, lambda vector: Steer(vector, layer, scale, positions), random_seeds
    )
    _figures(result, as_json)


@app.command()
def ablate(
    direction: DirectionFile,
    layer: Annotated[int, typer.Option("--layer", help="Whose layer's vector is taken out of all layers; 0-based.")],
    positions: PositionsOption = "not_first",
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    pairs: Pairs = None,
    random_seeds: Seeds = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Take one layer's direction out of every layer: margin change and damage, beside random directions."""
    from misdirection.representation.interventions import Ablate

    chat = _load(model, adapter, dtype, device)
    result = _intervene(chat, direction, layer, pairs, lambda vector: Ablate(vector, positions=positions), random_seeds)
    _figures(result, as_json)


def _load(model: str, adapter: str | None, dtype: Dtype, device: str) -> Any:
    from misdirection.models import load

    return load(model, adapter=adapter, dtype=dtype, device=device)


def _pairs(path: Path | None) -> Any:
    from misdirection import data

    return data.read_pairs(path) if path else data.probe_pairs()


def _intervene(
    chat: Any, direction: Path, layer: int, pairs: Path | None, make: Callable[[Any], Any], random_seeds: int
) -> dict[str, Any]:
    """What one layer's vector of a direction file does to a model, beside random vectors."""
    from misdirection.measure import measure_intervention
    from misdirection.representation.directions import Direction

    found = Direction.load(direction)
    found.require_fit(chat)
    return measure_intervention(chat, _pairs(pairs), found[layer], make, random_seeds)


def _figures(values: Mapping[str, Any], as_json: bool, said: str = "", *, table: bool = True) -> None:
    """Print figures as one JSON object or as a table, and what was written on standard error."""
    if said:
        notices.print(said, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(values, allow_nan=False))
    elif table:
        rows = Table("figure", "value")
        for name, value in values.items():
            rows.add_row(name, _cell(value))
        out.print(rows)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and {"mean", "low", "high", "n"} <= value.keys():
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}] n={value['n']}"
    return f"{value:+.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
