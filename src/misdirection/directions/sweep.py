"""What a direction does, added to one layer after another at several scales, or taken out of all layers."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import pandas as pd

from misdirection.choices import Positions
from misdirection.data import Example, ProbePair, probe_pairs
from misdirection.directions.direction import Direction
from misdirection.directions.setting import by_scale
from misdirection.errors import InputError
from misdirection.likelihood.measure import InterventionFigures, measure_interventions
from misdirection.models.chat_model import ChatModel
from misdirection.results import Figures
from misdirection.views import Plotted, rows

SCALES = (2.0, None)


class SweptEffect(InterventionFigures):
    """The effect of the vector of one layer, beside random vectors of its norm; nats/token."""

    layer: int
    scale: float | None
    """Multiple of the vector that was added at its layer; None where it was ablated everywhere."""


class Sweep(Plotted, Figures):
    """Effects of one direction on one model, by layer and scale."""

    KIND: ClassVar[str] = "sweep"

    model: str
    """The base model, and its adapter where it has one."""
    direction: str
    """Its kind, and of what it is."""
    positions: Positions
    """The tokens that were touched."""
    effects: list[SweptEffect]

    def frame(self) -> pd.DataFrame:
        """One row per layer and scale: both changes and both damages as `NAME`, `NAME_low`, `NAME_high`, `NAME_n`."""
        table = rows(self.effects)
        return table[["layer", "scale", *(name for name in table if name not in ("layer", "scale"))]]


def sweep(
    chat: ChatModel,
    direction: Direction,
    pairs: Sequence[ProbePair] | None = None,
    *,
    layers: Sequence[int],
    scales: Sequence[float | None] = SCALES,
    positions: Positions = "not_first",
    random_seeds: int = 3,
    neutral: Sequence[Example] | None = None,
    as_additive: bool = False,
) -> Sweep:
    """Margin change and damage of the direction at some layers, each beside random vectors of the same norm.

        md.sweep(chat, direction, layers=[9, 12, 15, 18], scales=[2, None]).plot()

    Args:
        chat: the model.
        direction: one of this base.
        pairs: probe pairs; default: the shipped ones.
        layers: whose vectors are used, 0-based.
        scales: multiples of a layer's own vector that are added there; None ablates that vector in every layer.
        positions: which tokens are touched.
        random_seeds: random vectors beside each.
        neutral: texts that the damage is measured on; default: the shipped ones.
        as_additive: also add a direction that is for ablation.

    Raises:
        InputError: no layer or scale, one that is not there or has no vector, or a direction of another base.
    """
    if not layers or not scales:
        raise InputError("nothing to sweep: give at least one layer and one scale")
    direction.require_fit(chat)
    if set(scales) != {None}:
        direction.require_additive(as_additive)
    settings = [(layer, scale) for scale in scales for layer in layers]
    made = [
        (direction[layer], partial(by_scale, layer=layer, scale=scale, positions=positions))
        for layer, scale in settings
    ]
    asked = probe_pairs() if pairs is None else pairs
    figures = measure_interventions(chat, asked, made, random_seeds, neutral)
    return Sweep(
        model=f"{chat.name} with {chat.adapter}" if chat.adapter else chat.name,
        direction=f"{direction.origin.kind} of {direction.origin.organism or direction.origin.model}",
        positions=positions,
        effects=[
            SweptEffect(layer=layer, scale=scale, **dict(measured))
            for (layer, scale), measured in zip(settings, figures, strict=True)
        ],
    )
