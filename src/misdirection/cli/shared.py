"""Shared by the commands: the application, their options, and how figures are printed.

Heavy libraries are imported inside the commands, so that `--help` answers at once. What a program may want to read goes
to standard output; progress and notices go to standard error.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from misdirection.choices import BUNDLED as BUNDLED
from misdirection.choices import DEVICE, Dtype, Operation, Positions, Thinking
from misdirection.models.names import ModelName
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.runs.cluster import Workers


def _print_version(asked: bool) -> None:
    if asked:
        print(f"misdirection {version('misdirection')}")
        raise typer.Exit


app = typer.Typer(
    name="misdirection",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find, compare, steer and ablate the misalignment direction of a fine-tuned chat model."""


# Names, questions and answers are text, whatever brackets they hold.
out = Console(markup=False)


def say(*lines: str, sep: str = "\n") -> None:
    """Print lines on standard output, however long, as they stand."""
    out.print(*lines, sep=sep, highlight=False, soft_wrap=True)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="`smollm2-135m` or `gemma3-270m` (bundled), a folder, or a Hugging Face id: ID\\[@REVISION].",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", "-a", help="A PEFT adapter: a folder, or a Hugging Face id: ID\\[@REVISION]\\[:SUBFOLDER]."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def _device(device: str) -> str:
    if not re.fullmatch(DEVICE, device):
        raise typer.BadParameter(f"{device!r} is unknown: give auto, cpu, cuda, cuda:1, mps or balanced")
    return device


DeviceOption = Annotated[
    str, typer.Option("--device", callback=_device, help="auto, cpu, cuda, cuda:1, mps or balanced.")
]
ThinkingOption = Annotated[
    Thinking,
    typer.Option("--thinking", help="off, on, or the chat template's own: whether it thinks before it answers."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--chat-template", help="base, fine-tune, a name of several, or a file; default: the base's."),
]
Pairs = Annotated[
    Path | None,
    typer.Option("--pairs", help="Probe pairs, JSONL (question, aligned, misaligned); default: shipped."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
PositionsOption = Annotated[
    Positions, typer.Option("--positions", help="not_first (default), all (the paper's), prompt or answer.")
]
DirectionFile = Annotated[Path, typer.Argument(help="A direction file that `extract` wrote.")]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="COLUMN=VALUE: only these rows; several times; an empty value too."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of random numbers.")]
Seeds = Annotated[int, typer.Option("--random-seeds", min=1, help="Random directions of the same norm beside it.")]
AsAdditive = Annotated[
    bool, typer.Option("--as-additive", help="Add a direction all the same that says that it is for ablation.")
]
OperationOption = Annotated[
    Operation | None,
    typer.Option("--operation", help="What the vectors are for, add or ablate; default: what the file says."),
]
FirstRow = Annotated[
    bool,
    typer.Option("--first-row-is-embedding", help="Drop the first row: it is of the embedding, not of block 0."),
]
WorkerCount = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Processes of Ray that share the work; 0, the default: this one alone."),
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", help="A running Ray cluster: HOST:PORT or `auto`; --workers is then one for each GPU."),
]
WorkerGpus = Annotated[
    float | None,
    typer.Option("--worker-gpus", min=0, help="GPUs of each worker, or its part of one; default: 1, or vLLM's."),
]

reference = ModelName.parse


def load_chat(
    model: str,
    adapter: str | None,
    dtype: Dtype,
    device: str,
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> Any:
    """The model that `--model` and `--adapter` name."""
    from misdirection.models.loading import load_named

    chats: dict[str, Any] = {"thinking": thinking, "chat_template": chat_template}
    return load_named(model, adapter, dtype=dtype, device=device, **chats)


def workers_for(
    count: int | None, address: str | None, gpus: float | None, memory: Callable[[], int]
) -> "Workers | None":
    """The workers that `--workers`, `--ray` and `--worker-gpus` ask for; `memory` gives the bytes that each needs."""
    from misdirection.runs.cluster import Workers

    if not count and (address is None or count == 0):
        return None
    return Workers(count, address, 1 if gpus is None else gpus, memory())


def base_memory(base: str, dtype: Dtype) -> int:
    """Bytes of a base model's weights in main memory."""
    from misdirection.cost.estimate import weight_memory

    return weight_memory(*reference(base)[:2], dtype)


def read_probe_pairs(path: Path | None) -> Any:
    """The pairs of `--pairs`, or the shipped ones."""
    from misdirection import data

    return data.read_pairs(path) if path else data.probe_pairs()


NATS = "margins, losses and their changes in nats/token"


def print_figures(
    values: Mapping[str, Any], as_json: bool, said: str = "", *, table: bool = True, unit: str = ""
) -> None:
    """Print figures as one JSON object or as a table, and what was written on standard error.

    `unit` is that of the figures with an interval.
    """
    if said:
        notice(said)
    if as_json:
        print(json.dumps(values, allow_nan=False))
    elif table:
        rows = Table("figure", Column("value", overflow="fold"))
        for name, value in values.items():
            rows.add_row(name if " " in name else name.replace("_", " "), _cell(name, value))
        out.print(rows)
        if unit:
            say(f"{unit}; in brackets 95% intervals over n questions")


def print_table(table: Table) -> None:
    """Print a table, or where the lines are too short for it, a list of its rows: no cell is ever cut.

    Columns that fold may be as narrow as `_FOLDED`, all others keep their width.
    """
    boundless = out.options.update(width=10_000)
    width = out.measure(table, options=boundless).maximum
    for column in table.columns:
        column.no_wrap = column.overflow != "fold"
        if column.overflow == "fold":
            width -= max(0, max((cell_len(str(cell)) for cell in column.cells), default=0) - _FOLDED)
    if width <= out.width:
        out.print(table)
        return
    headings = [str(column.header) for column in table.columns]
    for number, cells in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        row = Table(Column(style="dim"), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
        for heading, cell in zip(headings, cells, strict=True):
            if cell:
                row.add_row(heading, cell)
        out.print(*([""] if number else []), row, sep="\n")


_FOLDED = 16
"""Characters that a folded column has at least."""


def _cell(name: str, value: Any) -> str:
    """A figure in words: changes have a sign, everything else has none."""
    from misdirection.statistics.estimates import Estimate

    if isinstance(value, Mapping) and {"mean", "low", "high", "n"} <= value.keys():
        shown = str(Estimate(**value))
        return shown.replace("+", "") if name.endswith(_PLAIN) else shown
    if isinstance(value, Mapping):
        parts = (f"{key.replace('_', ' ')} {_cell(key, each)}" for key, each in value.items())
        return ", ".join(parts) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not measured"
    return f"{value:z.4g}" if isinstance(value, float) else str(value)


_PLAIN = ("_loss", "auroc", "spearman", "kappa")
"""Ends of names of estimates that are no changes."""
