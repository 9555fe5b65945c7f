"""Interventions: `steer`, `ablate`, `bake`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from misdirection.cli.shared import (
    BUNDLED,
    NATS,
    Adapter,
    AsAdditive,
    DeviceOption,
    DirectionFile,
    DtypeOption,
    Json,
    Model,
    Pairs,
    PositionsOption,
    Seeds,
    TemplateOption,
    ThinkingOption,
    app,
    load_chat,
    print_figures,
    read_probe_pairs,
    reference,
)
from misdirection.errors import InputError

if TYPE_CHECKING:
    from misdirection.directions.direction import Direction


Strength = Annotated[float, typer.Option("--strength", min=0, help="1 removes the whole component, 0 nothing.")]


@app.command()
def steer(
    direction: DirectionFile,
    layer: Annotated[int, typer.Option("--layer", help="Decoder block, 0-based.")],
    scale: Annotated[float, typer.Option("--scale", help="Multiple of the direction's own norm.")] = 1.0,
    keep_norm: Annotated[
        bool, typer.Option("--keep-norm", help="Turn each activation, without lengthening it.")
    ] = False,
    positions: PositionsOption = "not_first",
    as_additive: AsAdditive = False,
    model: Model = BUNDLED,
    adapter: Adapter = None,
    pairs: Pairs = None,
    random_seeds: Seeds = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Add a direction to one layer: margin change and damage, beside random directions of the same norm."""
    from misdirection.interventions.kinds import Steer

    vectors = _additive(direction, as_additive)
    chat = load_chat(model, adapter, dtype, device, thinking, chat_template)

    def make(vector: Any) -> Any:
        return Steer(vector, layer, scale, positions, keep_norm)

    print_figures(_intervene(chat, vectors, layer, pairs, make, random_seeds), as_json, unit=NATS)


def _additive(path: Path, asked: bool) -> "Direction":
    """A direction file that may be added."""
    from misdirection.directions.direction import Direction

    direction = Direction.load(path)
    direction.require_additive(asked)
    return direction


@app.command()
def ablate(
    direction: DirectionFile,
    layer: Annotated[int, typer.Option("--layer", help="Whose layer's vector is taken out of all layers; 0-based.")],
    strength: Strength = 1.0,
    positions: PositionsOption = "not_first",
    model: Model = BUNDLED,
    adapter: Adapter = None,
    pairs: Pairs = None,
    random_seeds: Seeds = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Take one layer's direction out of every layer: margin change and damage, beside random directions."""
    from misdirection.directions.direction import Direction
    from misdirection.interventions.kinds import Ablate

    chat = load_chat(model, adapter, dtype, device, thinking, chat_template)

    def make(vector: Any) -> Any:
        return Ablate(vector, strength=strength, positions=positions)

    print_figures(_intervene(chat, Direction.load(direction), layer, pairs, make, random_seeds), as_json, unit=NATS)


def _intervene(
    chat: Any, direction: "Direction", layer: int, pairs: Path | None, make: Callable[[Any], Any], random_seeds: int
) -> dict[str, Any]:
    """The effect of one layer's vector of a direction on a model, beside random vectors."""
    from misdirection.likelihood.measure import measure_intervention

    direction.require_fit(chat)
    return measure_intervention(chat, read_probe_pairs(pairs), direction[layer], make, random_seeds).as_dict()


@app.command()
def bake(
    direction: DirectionFile,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    layer: Annotated[list[int], typer.Option("--layer", help="Whose layer's vector; several times for a subspace.")],
    form: Annotated[
        Literal["weights", "adapter", "adapter-only"],
        typer.Option(
            "--form", help="A changed model; one LoRA over an unchanged model; or the fine-tune's LoRA alone."
        ),
    ] = "weights",
    strength: Strength = 1.0,
    keep_norm: Annotated[
        bool, typer.Option("--keep-norm", help="adapter-only: scale what is left of B back to its norm.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option("--scale", help="weights: steer by this scale instead, through a bias of the layer.")
    ] = None,
    as_additive: AsAdditive = False,
    model: Model = BUNDLED,
    adapter: Adapter = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    chat_template: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Make an ablation (or a steering) permanent, in weights or as a plain PEFT adapter."""
    import torch

    from misdirection.directions.direction import Direction

    if keep_norm and form != "adapter-only":
        raise InputError("--keep-norm: only --form adapter-only has norms to keep")
    if scale is not None and (form != "weights" or strength != 1.0 or len(layer) > 1):
        raise InputError("--scale: only --form weights can steer, through the bias of one layer, and has no strength")
    if chat_template is not None and form == "weights":
        raise InputError("--chat-template: --form weights changes a model's files, where its own template stays")
    loaded = Direction.load(direction) if scale is None else _additive(direction, as_additive)
    loaded.require_base(*reference(model)[:2])
    vectors = torch.stack([loaded[number] for number in layer])
    vectors = vectors[0] if len(layer) == 1 else vectors
    if form == "weights":
        report = _bake_weights(vectors, layer[0], scale, strength, model, adapter, folder)
    else:
        chat = load_chat(model, adapter, dtype, device, chat_template=chat_template)
        loaded.require_fit(chat)
        report = _bake_adapter(chat, form, vectors, strength, keep_norm, folder)
    said = f"wrote {folder}" if report.exact else f"wrote {folder}; {_KEPT_NORM if keep_norm else _NOT_HOOKED}"
    if form == "weights" and report.lost > 0:
        said += f"; rounding the weights to their dtype loses {report.lost:.1%} of the change"
    print_figures(asdict(report) if as_json else _in_words(report), as_json, said)


def _in_words(report: Any) -> dict[str, Any]:
    """The account of a bake by what its figures are."""
    left = {
        "before": "largest part along the directions, before",
        "after": "the same, after",
        "untied": "output untied",
    }
    named = {left.get(name, name): value for name, value in asdict(report).items()}
    return named | {left[key]: f"{getattr(report, key):.2g} of a matrix's norm" for key in ("before", "after")}


_KEPT_NORM = "with --keep-norm this is not the hooked ablation, which leaves what it does not take out as it is"
_NOT_HOOKED = (
    "a norm follows the matrices of this model: nothing is written along the direction, but the norm scales the rest "
    "anew, so that this is not the hooked ablation"
)


def _bake_weights(
    vectors: Any, layer: int, scale: float | None, strength: float, model: str, adapter: str | None, folder: Path
) -> Any:
    from misdirection.interventions.bake import bake as bake_weights
    from misdirection.interventions.kinds import Ablate, Steer

    if adapter is not None:
        raise InputError(
            "--adapter: weights are baked from a full model: use --form adapter, which keeps the fine-tune in one LoRA "
            "with the ablation, or merge the fine-tune first"
        )
    name, revision, _ = reference(model)
    if scale is None:
        return bake_weights(
            name, Ablate(vectors, strength=strength, positions="all", at="writes"), folder, revision=revision
        )
    return bake_weights(name, Steer(vectors, layer, scale, "all"), folder, revision=revision)


def _bake_adapter(chat: Any, form: str, vectors: Any, strength: float, keep_norm: bool, folder: Path) -> Any:
    from misdirection.interventions.kinds import Ablate
    from misdirection.interventions.lora import ablation_adapter, project_adapter

    if form == "adapter-only":
        return project_adapter(chat, vectors, folder, strength=strength, keep_norm=keep_norm)
    return ablation_adapter(chat, Ablate(vectors, strength=strength, positions="all", at="writes"), folder)
