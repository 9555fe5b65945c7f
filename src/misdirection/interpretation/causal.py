"""What adapters do to behaviour, found by scaling them (paper, section on interpreting rank-1 adapters).

A probe tells what an adapter goes along with; only a change of the adapter tells what it causes. Behaviour is the
margin, in nats/token. The unit is the layer: all that the active adapters add inside of a block is scaled together.

    Shapley value of layer l    phi_l = sum over S without l of |S|! (k - |S| - 1)! / k! * (v(S + l) - v(S))
    value of a set of layers    v(S) = margin with the adapters of S as they are and those of the other layers at 0

The values of a question sum to v(all) - v(none), whether they are exact or sampled.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting, intervene
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.likelihood.sweep import TOKEN_BUDGET, Continuations, Progress, sweep
from misdirection.models.chat_model import ChatModel
from misdirection.statistics import Estimate, bootstrap

EXACT_LAYERS = 9
"""Most layers for exact Shapley values: 512 subsets."""

Subset = frozenset[int]
"""The layers whose adapters are left as they are."""


# --- scaling --------------------------------------------------------------------------------------------------------


def scaling_settings(
    layers: Iterable[int], groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, dict[int, float]]:
    """Factors by layer, by the name of the setting: all off; each layer off, negated, doubled and alone; each group
    off and alone.

    What would leave the organism as it is (its only layer alone) is left out, and so are groups without a layer.

    Args:
        layers: all layers with an adapter.
        groups: layers by the name of the group.

    Raises:
        InputError: no layer; a group has a layer without an adapter, or a name that is taken.
    """
    known = _sorted(layers)
    settings = {"all off": dict.fromkeys(known, 0.0)}
    for layer in known:
        settings[f"layer {layer} off"] = {layer: 0.0}
        settings[f"layer {layer} negated"] = {layer: -1.0}
        settings[f"layer {layer} doubled"] = {layer: 2.0}
        settings[f"layer {layer} only"] = _off(known, {layer})
    for name, members in (groups or {}).items():
        _check_group(name, members, known, settings)
        settings[f"{name} off"] = dict.fromkeys(_sorted(members), 0.0) if members else {}
        settings[f"{name} only"] = _off(known, members) if members else {}
    return {name: factors for name, factors in settings.items() if factors}


@dataclass(frozen=True)
class ScalingEffect:
    """What one setting changes, against the organism as it is.

    Attributes:
        factors: factor by layer.
        margin: change of the margin, nats/token, by question set.
        damage: change of the loss on neutral text, nats/token.
    """

    factors: dict[int, float]
    margin: dict[str, Estimate]
    damage: Estimate

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `results.json`."""
        return {
            "factors": {str(layer): factor for layer, factor in self.factors.items()},
            "margin": {name: estimate.as_dict() for name, estimate in self.margin.items()},
            "damage": self.damage.as_dict(),
        }


def scaling_effects(
    chat: ChatModel,
    sets: Mapping[str, Sequence[ProbePair]],
    neutral: Sequence[Example],
    settings: Mapping[str, Mapping[int, float]],
    *,
    budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> dict[str, ScalingEffect]:
    """Margin change for every question set, and damage, of every setting.

    Args:
        chat: the organism.
        sets: probe pairs by the name of the set.
        neutral: text on which damage shows.
        settings: factors by layer, as `scaling_settings` gives them.
        progress: is told the number of (setting, text) done, of (1 + settings) x (pairs and neutral texts).

    Raises:
        InputError: no pair, no neutral text, or a layer without an adapter.
    """
    rows = [(), *(_setting(factors) for factors in settings.values())]
    changes = {}
    for name, pairs in sets.items():
        scores = sweep(chat, pair_continuations(chat.tokenizer, pairs), rows, budget=budget, progress=progress)
        changes[name] = _against_first(_margin(scores))
    losses = -sweep(chat, text_continuations(chat.tokenizer, neutral), rows, budget=budget, progress=progress)
    damage = _against_first(losses.squeeze(-1))
    return {
        name: ScalingEffect(
            dict(factors),
            {one: bootstrap(change[number]) for one, change in changes.items()},
            bootstrap(damage[number]),
        )
        for number, (name, factors) in enumerate(settings.items())
    }


# --- Shapley values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shapley:
    """How much of the margin that the adapters give each layer's are worth, nats/token.

    Attributes:
        layers: the k layers, sorted.
        values: [questions, k], float64; a question's values sum to its `full` - `empty`.
        empty: [questions], margin with all adapters of `layers` at 0.
        full: [questions], margin of the organism as it is.
        permutations: orders sampled per question; None where the values are exact.
    """

    layers: tuple[int, ...]
    values: Tensor
    empty: Tensor
    full: Tensor
    permutations: int | None

    @cached_property
    def estimates(self) -> dict[int, Estimate]:
        """Mean over questions by layer; the interval holds the sampling of orders, too."""
        return {layer: bootstrap(column) for layer, column in zip(self.layers, self.values.unbind(-1), strict=True)}

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `results.json`."""
        return {
            "values": {str(layer): estimate.as_dict() for layer, estimate in self.estimates.items()},
            "empty": bootstrap(self.empty).as_dict(),
            "full": bootstrap(self.full).as_dict(),
            "permutations": self.permutations,
        }


def shapley(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    layers: Iterable[int],
    *,
    permutations: int | None = None,
    seed: int = 0,
    budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> Shapley:
    """Shapley values of the layers' adapters for the margin of every question.

    Exact values need all 2^k subsets. Sampled ones are unbiased: every question has orders of its own, drawn without
    replacement, each with its reverse, whose errors partly cancel.

    Args:
        chat: the organism.
        pairs: the questions.
        layers: all layers with an adapter.
        permutations: orders per question, an even number; k! of them or more are all orders. None is exact.
        seed: of the orders.
        progress: is told the number of (subset, question) done, of `subset_count` for every question.

    Raises:
        InputError: no pair or layer, a layer without an adapter, an odd number of permutations, or more than
            `EXACT_LAYERS` layers without a number of permutations.
    """
    known = _sorted(layers)
    _check_permutations(len(known), permutations)
    tasks = pair_continuations(chat.tokenizer, pairs)
    if permutations is None:
        parts = [_exact(chat, tasks, known, budget, progress)]
    else:
        orders = [_orders(known, permutations, [seed, number]) for number in range(len(tasks))]
        parts = [_sampled(chat, *pair, budget, progress) for pair in zip(tasks, orders, strict=True)]
    values, empty, full = (torch.cat(one) for one in zip(*parts, strict=True))
    return Shapley(known, values, empty, full, permutations)


def subset_count(layers: int, permutations: int | None) -> int:
    """Subsets that `shapley` measures for each question, at most."""
    return 2**layers if permutations is None else min(2**layers, permutations * (layers - 1) + 2)


Values = tuple[Tensor, Tensor, Tensor]
"""Shapley values [questions, k], empty margins and full margins [questions]."""


def _exact(
    chat: ChatModel, tasks: Sequence[Continuations], layers: tuple[int, ...], budget: int, progress: Progress | None
) -> Values:
    margins: dict[Subset, Tensor] = {}
    # What the lower half of the layers gives is the same for every subset of the upper half: a sweep inside of the
    # lower ones' setting computes it once, and the blocks above it for each subset.
    low, high = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    for kept in _subsets(low):
        with intervene(chat, _setting(_off(low, kept))):
            found = _margins(chat, tasks, high, _subsets(high), budget, progress)
        margins |= {kept | above: margin for above, margin in found.items()}
    return _weighted(margins, layers), margins[frozenset()], margins[frozenset(layers)]


def _weighted(margins: Mapping[Subset, Tensor], layers: tuple[int, ...]) -> Tensor:
    """[questions, k], by the formula over all subsets."""
    k = len(layers)
    weights = [math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k) for size in range(k)]
    gains = {
        layer: [weights[len(kept)] * (margins[kept | {layer}] - margins[kept]) for kept in margins if layer not in kept]
        for layer in layers
    }
    return torch.stack([torch.stack(gains[layer]).sum(0) for layer in layers], -1)


Order = tuple[int, ...]
"""Layers in the order in which their adapters are switched on."""


def _sampled(
    chat: ChatModel, task: Continuations, orders: list[Order], budget: int, progress: Progress | None
) -> Values:
    layers = tuple(sorted(orders[0]))
    prefixes = {frozenset(order[:size]) for order in orders for size in range(len(layers) + 1)}
    # A set has no order of its own that lasts from run to run, and batches are made in the order given.
    subsets = sorted(prefixes, key=sorted)
    margins = _margins(chat, [task], layers, subsets, budget, progress)
    if progress:
        progress(subset_count(len(layers), len(orders)) - len(subsets))
    gains = torch.zeros(1, len(layers), dtype=torch.float64)
    for order in orders:
        for size, layer in enumerate(order):
            before = frozenset(order[:size])
            gains[:, layers.index(layer)] += margins[before | {layer}] - margins[before]
    return gains / len(orders), margins[frozenset()], margins[frozenset(layers)]


def _orders(layers: tuple[int, ...], permutations: int, seed: list[int]) -> list[Order]:
    """Different orders, each beside its reverse."""
    generator = np.random.default_rng(seed)
    orders: dict[Order, None] = {}
    while len(orders) < min(permutations, math.factorial(len(layers))):
        order = tuple(int(layer) for layer in generator.permutation(layers))
        orders |= dict.fromkeys([order, order[::-1]])
    return list(orders)


def _subsets(layers: tuple[int, ...]) -> list[Subset]:
    return [frozenset(some) for size in range(len(layers) + 1) for some in itertools.combinations(layers, size)]


def _margins(
    chat: ChatModel,
    tasks: Sequence[Continuations],
    layers: tuple[int, ...],
    subsets: Sequence[Subset],
    budget: int,
    progress: Progress | None,
) -> dict[Subset, Tensor]:
    """Margins of the tasks, [tasks], with those of the `layers` at 0 that are not in the subset."""
    rows = [_setting(_off(layers, kept)) for kept in subsets]
    scores = sweep(chat, tasks, rows, budget=budget, progress=progress)
    return dict(zip(subsets, _margin(scores), strict=True))


# --- small pieces ---------------------------------------------------------------------------------------------------


def _setting(factors: Mapping[int, float]) -> Setting:
    """Without factors of 1: a sweep resumes below the lowest layer that a setting names."""
    changed = {layer: factor for layer, factor in factors.items() if factor != 1}
    return [ScaleAdapters(changed)] if changed else []


def _off(layers: Iterable[int], kept: Iterable[int]) -> dict[int, float]:
    return dict.fromkeys((layer for layer in layers if layer not in set(kept)), 0.0)


def _margin(scores: Tensor) -> Tensor:
    """[settings, pairs]."""
    return scores[..., 0] - scores[..., 1]


def _against_first(values: Tensor) -> Tensor:
    return values[1:] - values[0]


def _sorted(layers: Iterable[int]) -> tuple[int, ...]:
    known = tuple(sorted(set(layers)))
    if not known:
        raise InputError("no layer with an adapter is named: there is nothing to scale")
    return known


def _check_group(name: str, members: Sequence[int], layers: Sequence[int], taken: Mapping[str, Any]) -> None:
    if strange := sorted(set(members) - set(layers)):
        raise InputError(
            f"group {name!r}: layer {strange[0]} has no adapter: choose from {', '.join(map(str, layers))}"
        )
    if f"{name} off" in taken:
        raise InputError(f"group {name!r}: the setting '{name} off' is there already: choose another name")


def _check_permutations(layers: int, permutations: int | None) -> None:
    if permutations is None and layers > EXACT_LAYERS:
        raise InputError(
            f"exact Shapley values of {layers} layers need {2**layers} passes a question: give a number of permutations"
        )
    if permutations is not None and (permutations < 2 or permutations % 2):
        raise InputError(
            f"permutations: {permutations}: give an even number, since each order is measured with its reverse"
        )
