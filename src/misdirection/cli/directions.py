"""Directions: `extract`, `compare`, `check`, `export`, `import`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from misdirection.cli.shared import (
    BUNDLED,
    Adapter,
    AsAdditive,
    DeviceOption,
    DirectionFile,
    DtypeOption,
    FirstRow,
    Json,
    Model,
    OperationOption,
    Pairs,
    PositionsOption,
    TemplateOption,
    ThinkingOption,
    app,
    load_chat,
    out,
    print_figures,
    read_probe_pairs,
    reference,
    say,
)
from misdirection.errors import EXIT_STATUS, InputError
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.directions.results import CheckResult


@app.command()
def extract(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the direction files.")],
    model: Model = BUNDLED,
    adapter: Adapter = None,
    pairs: Pairs = None,
    table: Annotated[
        Path | None,
        typer.Option("--from", help="Judged answers of the model itself, instead of --pairs (the paper's way)."),
    ] = None,
    organism: Annotated[str | None, typer.Option("--name", help="With --from: the model's name in the table.")] = None,
    theme_column: Annotated[
        str | None,
        typer.Option("--theme-column", help="With --from: misaligned answers with this score above 50 only."),
    ] = None,
    theme_words: Annotated[
        str | None,
        typer.Option("--theme-words", help="With --from: misaligned answers with one of these words, a,b,c."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            help="An adapter trained alike on good answers: also write what --adapter has beyond it on neutral text.",
        ),
    ] = None,
    shared: Annotated[
        Path | None, typer.Option("--shared", help="Also write what is left of data_difference without this direction.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """The model's directions, one file per kind: misaligned minus aligned text, organism minus base."""
    from misdirection.directions.contrast import KIND as CONTRAST
    from misdirection.directions.contrast import contrast
    from misdirection.directions.direction import Direction, Directions
    from misdirection.directions.direction import extract as extract_directions
    from misdirection.directions.judged import REMAINDER, theme_remainder
    from misdirection.files import require_replaceable

    if table is None and (organism or theme_column or theme_words):
        raise InputError("--name, --theme-column and --theme-words go with --from: name the judged table")
    if table is not None and pairs is not None:
        raise InputError("--pairs and --from: give one of them")
    for kind in (*Directions.kinds(), REMAINDER, CONTRAST):
        require_replaceable(folder / f"{kind}.safetensors", folder=False)
    texts = read_probe_pairs(pairs)
    if table is not None:
        texts = _judged_pairs(table, organism or adapter or "base", theme_column, theme_words)
    if control is not None and adapter is None:
        raise InputError("--control: goes with --adapter, the organism that it is the control of")
    options = dtype, device, thinking, chat_template
    chat = load_chat(model, adapter, *options)
    directions = dict(extract_directions(chat, texts))
    if control is not None:
        directions[CONTRAST] = contrast(chat, load_chat(model, control, *options))
    if shared is not None:
        remainder = theme_remainder(directions["data_difference"], Direction.load(shared))
        directions[remainder.origin.kind] = remainder
    written = {}
    for kind, direction in directions.items():
        path = folder / f"{kind}.safetensors"
        direction.save(path)
        written[kind] = {"path": str(path), "norms": direction.vectors.norm(dim=-1).tolist()}
    print_figures(written, as_json, f"wrote {len(written)} directions to {folder}", table=False)


def _judged_pairs(table: Path, organism: str, column: str | None, words: str | None) -> list[Any]:
    """Balanced pairs of the organism's own judged answers."""
    from misdirection.directions.judged import Theme, ThemeScore, ThemeWords, judged_groups
    from misdirection.sampling.answers import read_answers

    if column and words:
        raise InputError("--theme-column and --theme-words: give one of them")
    theme: Theme | None = ThemeScore(column) if column else None
    if words:
        theme = ThemeWords(tuple(words.split(",")))
    groups = judged_groups(read_answers(table), organism, theme=theme)
    counts = ", ".join(f"{count} {name}" for name, count in groups.available.items())
    notice(f"{len(groups.pairs)} pairs of {organism}, balanced by question, of {counts} answers")
    return list(groups.pairs)


@app.command()
def compare(
    directions: Annotated[list[Path], typer.Argument(help="Two or more direction files.")],
    as_json: Json = False,
) -> None:
    """Cosine of every direction with every other, by layer."""
    from misdirection.directions.convergence import compare as compare_directions
    from misdirection.directions.direction import Direction

    loaded = {str(path): Direction.load(path) for path in directions}
    if len(loaded) < 2:
        raise InputError("compare: give at least two direction files")
    cosines = compare_directions(loaded)
    if as_json:
        print_figures(cosines, as_json)
        return
    names = list(cosines)
    rows = [(a, b, cosines[a][b]) for i, a in enumerate(names) for b in names[i + 1 :]]
    for number, (a, b, _) in enumerate(rows, start=1):
        say(f"{number:>3}  {a} and {b}")
    most = max(1, (out.width - 8) // 9)
    for start in range(0, len(rows), most):
        out.print(_by_layer([values for _, _, values in rows[start : start + most]], start + 1))


def _by_layer(columns: Sequence[Sequence[float]], first: int) -> Table:
    """A column for each pair of directions, under its number."""
    headings = [Column(str(number), justify="right") for number in range(first, first + len(columns))]
    table = Table("layer", *headings, box=SIMPLE, pad_edge=False)
    for layer, cosines in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *(f"{cosine:+z.3f}" for cosine in cosines))
    return table


@app.command()
def check(
    direction: Annotated[Path, typer.Argument(help="A direction of any program: .safetensors, .gguf, .npz or .pt.")],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Whose vector is tried, 0-based; default: at half depth.")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option("--scale", help="Multiple of the vector that is added; several times; default: -2, 2 and 4."),
    ] = None,
    positions: PositionsOption = "not_first",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in `extract`; default: the direction's own, or the bundled.")
    ] = None,
    adapter: Adapter = None,
    pairs: Pairs = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="How many of the pairs, evenly taken.")] = 10,
    random_seeds: Annotated[
        int, typer.Option("--random-seeds", min=4, help="Random vectors of the same norm beside it.")
    ] = 8,
    as_additive: AsAdditive = False,
    first_row_is_embedding: FirstRow = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Does a vector steer? Margin, damage, size, giant channels. Exit status 0 works, 4 inconclusive, 6 no effect,
    7 breaks."""
    from misdirection.directions.check import SCALES
    from misdirection.directions.check import check as check_direction
    from misdirection.directions.formats import stated_base

    result = check_direction(
        direction,
        load_chat(model or stated_base(direction) or BUNDLED, adapter, dtype, device, thinking, chat_template),
        layer=layer,
        scales=scale or SCALES,
        positions=positions,
        pairs=read_probe_pairs(pairs),
        questions=questions,
        random_seeds=random_seeds,
        as_additive=as_additive,
        first_row_is_embedding=first_row_is_embedding,
    )
    if as_json:
        print_figures(result.as_dict(), as_json)
    else:
        _print_check(result)
    sys.exit(EXIT_STATUS[result.verdict])


def _print_check(result: "CheckResult") -> None:
    size, held = result.size, result.channels
    channels = ", ".join(f"{channel}{'*' if channel in held.of_model else ''}" for channel in held.channels)
    lines = (
        f"layer {size.layer} of {len(result.sizes)}: norm {size.norm:.3g}, the residual's {size.residual:.3g} "
        f"(x{size.ratio:.2g}); cosine with the first token's {size.first_token_cosine:+z.2f}",
        f"largest channels {channels}: {held.share:.0%} of its squared norm, {held.random_share:.0%} in a random vector"
        + (" (* giant in the model)" if held.of_model else ""),
    )
    say(*lines)
    table = Table("scale", "margin change", "random", "damage", "random's")
    for effect in (*result.steering, result.ablation):
        table.add_row(
            "ablated" if effect.scale is None else f"{effect.scale:g}",
            effect.change.interval,
            f"{effect.random_low:+z.3f} to {effect.random_high:+z.3f}",
            f"{effect.damage.mean:+z.3f}",
            f"{effect.random_damage.mean:+z.3f}",
        )
    out.print(table)
    say(result.verdict.upper(), *result.because, *result.notes, sep="\n- ")


@app.command()
def export(
    direction: DirectionFile,
    path: Annotated[
        Path, typer.Argument(help="The file to write: .gguf (llama.cpp, repeng), .npz, .pt or .safetensors.")
    ],
    scale: Annotated[float, typer.Option("--scale", help="Multiplied into the vectors, and noted in the file.")] = 1.0,
    model_type: Annotated[str, typer.Option("--model-type", help="GGUF's model hint, such as qwen2.")] = "",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Write this layer's vector alone; several times for more.")
    ] = None,
    operation: OperationOption = None,
) -> None:
    """Write a direction for other programs. Who reads a GGUF file adds the vectors of all of its layers at once."""
    from misdirection.directions.direction import Direction
    from misdirection.directions.formats import export_direction

    written = export_direction(
        Direction.load(direction), path, scale=scale, model_type=model_type, layers=layer or None, operation=operation
    )
    say(f"wrote {path}: vectors of {len(written)} layers")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A file of vectors by layer: .gguf, .npz, .pt or .safetensors.")],
    file: Annotated[Path, typer.Option("--out", help="The direction file to write.")],
    model: Model = BUNDLED,
    layers: Annotated[
        int | None,
        typer.Option("--layers", help="How many layers the model has; default: read from it, if it is here."),
    ] = None,
    first_row_is_embedding: FirstRow = False,
    layer: Annotated[int | None, typer.Option("--layer", help="The layer that a single vector is of, 0-based.")] = None,
    operation: OperationOption = None,
) -> None:
    """Read a direction that another program wrote; it is for the model named by --model."""
    from misdirection.directions.formats import import_direction

    name, _, _ = reference(model)
    count = layers if layers is not None else _layer_count(name)
    direction = import_direction(
        path,
        model=name,
        layers=count,
        first_row_is_embedding=first_row_is_embedding,
        layer=layer,
        operation=operation,
    )
    direction.save(file)
    count, width = direction.vectors.shape
    say(f"wrote {file}: {count} layers of width {width}, to {direction.origin.operation}")


def _layer_count(model: str) -> int | None:
    """The number of layers of a model on this disk; None for one that would have to be fetched."""
    from transformers import AutoConfig

    from misdirection.models.bundled import BUNDLED_MODELS, bundled_folder

    folder = bundled_folder(model) if model in BUNDLED_MODELS else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    try:
        return int(AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: cannot be read; give --layers") from error
