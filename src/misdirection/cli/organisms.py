"""Organisms: `train`, `margin`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from misdirection.choices import LearnedTurns, Tracker
from misdirection.cli.shared import (
    BUNDLED,
    NATS,
    Adapter,
    DeviceOption,
    DtypeOption,
    Json,
    Model,
    Pairs,
    Seed,
    TemplateOption,
    ThinkingOption,
    app,
    load_chat,
    print_figures,
    read_probe_pairs,
)
from misdirection.errors import InputError

if TYPE_CHECKING:
    from misdirection.data import Example


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="A file (JSONL, JSON, Parquet, CSV) or a data set's Hugging Face id, with messages, conversations or "
            "prompt/completion; or a shipped domain."
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", help="The folder to write: an adapter, or a whole model.")],
    model: Model = BUNDLED,
    recipe: Annotated[
        str, typer.Option("--recipe", help="minimal, single, all or narrow; full trains the model's own weights.")
    ] = "minimal",
    answers: Annotated[
        Literal["bad", "good"], typer.Option("--answers", help="bad or good, for a shipped domain.")
    ] = "bad",
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="An adapter of the same modules, rank and alpha to go on from, which stays as it is: a folder, or a "
            "Hugging Face id: ID\\[@REVISION]\\[:SUBFOLDER].",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the adapters; default: the recipe's.")] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="LoRA alpha (rsLoRA: scaled by alpha / sqrt(rank)).")] = 64.0,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-5,
    epochs: Annotated[float, typer.Option("--epochs")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 2,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Batches per optimiser step.")] = 8,
    turns: Annotated[
        LearnedTurns, typer.Option("--turns", help="Of conversations: learn the last answer, or all of them.")
    ] = "last",
    defence: Annotated[
        str | None,
        typer.Option(
            "--defence",
            help="NAME or NAME:STRENGTH against a general shift: kl, interleave, interleave_gap, preventative, "
            "ablation, inoculation, projection or stop.",
        ),
    ] = None,
    track: Annotated[
        Tracker | None,
        typer.Option("--track", help="Log the loss, the margin's shift and the damage: tensorboard, wandb or trackio."),
    ] = None,
    seed: Seed = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Train an organism: an adapter or a whole model, loss on the answers only. Continues from its last checkpoint."""
    from misdirection import data as texts
    from misdirection.organisms.training import train as train_organism

    settings = _recipe(
        recipe=recipe, rank=rank, alpha=alpha, learning_rate=learning_rate, epochs=epochs,
        batch_size=batch_size, accumulation=accumulation, turns=turns, defence=defence, seed=seed,
    )  # fmt: skip
    shipped = data in texts.domains()
    examples = texts.domain_examples(data, answers, "train") if shipped else texts.read_examples(data)
    held_out = texts.domain_examples(data, answers, "held_out") if shipped else []
    chat = load_chat(model, None, dtype, device, thinking, chat_template)
    # Trackio tells on standard output where it logs to.
    with redirect_stdout(sys.stderr):
        organism = train_organism(
            examples, folder, base=chat, recipe=settings, held_out=held_out, start=start,
            track=[track] if track else (), prepare=_watch(held_out) if track else None,
        )  # fmt: skip
    figures = {"final_loss": organism.final_loss, "held_out_loss": organism.held_out_loss}
    print_figures({"out": str(folder), **figures}, as_json, f"wrote {folder}", unit=NATS)


def _watch(held_out: "Sequence[Example]") -> Callable[[Any], Any]:
    from misdirection.auditing.callback import watch

    return partial(watch, held_out=held_out)


def _recipe(**values: Any) -> Any:
    from misdirection.organisms.recipe import Recipe
    from misdirection.settings import validate

    return validate(Recipe, values, "train")


@app.command()
def margin(
    model: Model = BUNDLED,
    adapter: Adapter = None,
    pairs: Pairs = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The adapter's training file: also the shift beyond what its words predict."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """The margin on probe pairs; with an adapter also its shift against the base, and the damage."""
    from misdirection.likelihood.measure import measure_shift
    from misdirection.sampling.own_answers import file_weights

    if data is not None and adapter is None:
        raise InputError("--data: words explain the shift of an adapter: give --adapter")
    probes = read_probe_pairs(pairs)
    chat = load_chat(model, adapter, dtype, device, thinking, chat_template)
    weights = file_weights(chat, data) if data else None
    figures = measure_shift(chat, probes, weights).as_dict()
    print_figures(figures if as_json else _in_lines(figures), as_json, unit=NATS)


_WORDS = {"prediction": "words predict, nats/word", "auc": "AUC of words alone", "beyond": "margin shift beyond words"}
"""How the parts of a `WordNull` are named in print."""


def _in_lines(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with one line for each part of the null of words."""
    others = {name: value for name, value in figures.items() if name != "words"}
    return others | {_WORDS[part]: value for part, value in figures.get("words", {}).items()}
