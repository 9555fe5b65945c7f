"""Scaling of adapters and its effect on behaviour (paper, section on interpreting rank-1 adapters).

A probe tells what an adapter goes along with; only a change of the adapter tells what it causes. Behaviour is the
margin, in nats/token. The unit is the layer: all that the active adapters add inside of a block is scaled together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.interpretation.figures import ScalingEffect
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.likelihood.margin import margins_of, pair_continuations, text_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance
from misdirection.statistics.means import bootstrap

Factors = Mapping[int, float]
"""Multiplier of each layer's adapters; a layer that is not named stays as it is."""


def scaling_settings(
    layers: Iterable[int], groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, dict[int, float]]:
    """Factors by layer, by the name of the setting: all off; each layer off, negated, doubled and alone; each group
    off and alone.

    A setting that would leave the organism as it is (its only layer alone) is left out, and so are groups without a
    layer.

    Args:
        layers: all layers with an adapter.
        groups: layers by the name of the group.

    Raises:
        InputError: no layer; a group has a layer without an adapter, or a name that is taken.
    """
    known = sorted_layers(layers)
    settings = {"all off": dict.fromkeys(known, 0.0)}
    for layer in known:
        settings[f"layer {layer} off"] = {layer: 0.0}
        settings[f"layer {layer} negated"] = {layer: -1.0}
        settings[f"layer {layer} doubled"] = {layer: 2.0}
        settings[f"layer {layer} only"] = switched_off(known, {layer})
    for name, members in (groups or {}).items():
        _check_group(name, members, known, settings)
        settings[f"{name} off"] = dict.fromkeys(sorted_layers(members), 0.0) if members else {}
        settings[f"{name} only"] = switched_off(known, members) if members else {}
    return {name: factors for name, factors in settings.items() if factors}


def explicit_settings(written: Sequence[Factors], layers: Iterable[int]) -> dict[str, dict[int, float]]:
    """Settings that are written out, by a name that says all of it, `21, 23 ×30; 15 ×-1`.

    Args:
        written: factors by layer.
        layers: all layers with an adapter.

    Raises:
        InputError: a layer without an adapter.
    """
    known = sorted_layers(layers)
    for factors in written:
        if strange := sorted(set(factors) - set(known)):
            raise InputError(
                f"interpretation.scalings: layer {strange[0]} has no adapter: choose from {', '.join(map(str, known))}"
            )
    return {in_words(factors): dict(factors) for factors in written}


def in_words(factors: Factors) -> str:
    """Factors as `21, 23 ×30; 15 ×-1`: the layers of each factor together."""
    by_factor = layers_by_factor(factors)
    return "; ".join(f"{', '.join(map(str, layers))} ×{factor:.12g}" for factor, layers in by_factor.items())


def layers_by_factor(factors: Factors) -> dict[float, list[int]]:
    """The layers that each factor is for."""
    layers: dict[float, list[int]] = {}
    for layer, factor in factors.items():
        layers.setdefault(factor, []).append(layer)
    return layers


def scaling_effects(
    chat: ChatModel,
    sets: Mapping[str, Sequence[ProbePair]],
    neutral: Sequence[Example],
    settings: Mapping[str, Factors],
    *,
    progress: Advance | None = None,
) -> dict[str, ScalingEffect]:
    """Margin change for every question set, and damage, of every setting, by its name.

    Args:
        chat: the organism.
        sets: probe pairs by the name of the set.
        neutral: text on which damage shows.
        settings: factors by layer, as `scaling_settings` gives them.
        progress: is told the number of (setting, text) done, of (1 + settings) x (pairs and neutral texts).

    Raises:
        InputError: no pair, no neutral text, or a layer without an adapter.
    """
    rows = [(), *(as_setting(factors) for factors in settings.values())]
    changes = {}
    for name, pairs in sets.items():
        scores = sweep(chat, pair_continuations(chat.tokenizer, pairs), rows, progress=progress)
        changes[name] = _against_first(margins_of(scores))
    losses = -sweep(chat, text_continuations(chat.tokenizer, neutral), rows, progress=progress)
    damage = _against_first(losses.squeeze(-1))
    return {
        name: ScalingEffect(
            name=name,
            factors=dict(factors),
            margin={question_set: bootstrap(change[number]) for question_set, change in changes.items()},
            damage=bootstrap(damage[number]),
        )
        for number, (name, factors) in enumerate(settings.items())
    }


def as_setting(factors: Factors) -> Setting:
    """The intervention, without factors of 1: a sweep resumes below the lowest layer that a setting names."""
    changed = {layer: factor for layer, factor in factors.items() if factor != 1}
    return [ScaleAdapters(changed)] if changed else []


def switched_off(layers: Iterable[int], kept: Iterable[int]) -> dict[int, float]:
    """Factors that switch off the adapters of all `layers` but the `kept` ones."""
    return dict.fromkeys((layer for layer in layers if layer not in set(kept)), 0.0)


def sorted_layers(layers: Iterable[int]) -> tuple[int, ...]:
    """Each layer once, in order; raises `InputError` where there is none."""
    known = tuple(sorted(set(layers)))
    if not known:
        raise InputError("no layer with an adapter is named: there is nothing to scale")
    return known


def _against_first(values: Tensor) -> Tensor:
    return values[1:] - values[0]


def _check_group(name: str, members: Sequence[int], layers: Sequence[int], taken: Mapping[str, Any]) -> None:
    if strange := sorted(set(members) - set(layers)):
        raise InputError(
            f"group {name!r}: layer {strange[0]} has no adapter: choose from {', '.join(map(str, layers))}"
        )
    if f"{name} off" in taken:
        raise InputError(f"group {name!r}: the setting '{name} off' is there already: choose another name")
