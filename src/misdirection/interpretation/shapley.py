"""Shapley values of adapters for the margin (paper, section on interpreting rank-1 adapters), in nats/token.

    Shapley value of layer l    phi_l = sum over S without l of |S|! (k - |S| - 1)! / k! * (v(S + l) - v(S))
    value of a set of layers    v(S) = margin with the adapters of S as they are and those of the other layers at 0

The values of a question sum to v(all) - v(none), whether they are exact or sampled.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.interpretation.scaling import as_setting, sorted_layers, switched_off
from misdirection.interventions.hooks import intervene
from misdirection.likelihood.margin import margins_of, pair_continuations
from misdirection.likelihood.sweep import Continuations, sweep
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

EXACT_LAYERS = 9
"""Most layers for exact Shapley values: 512 subsets."""

Subset = frozenset[int]
"""The layers whose adapters are left as they are."""


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


def shapley(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    layers: Iterable[int],
    *,
    permutations: int | None = None,
    seed: int = 0,
    budget: int | None = None,
    progress: Advance | None = None,
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
    known = sorted_layers(layers)
    _check_permutations(len(known), permutations)
    questions = pair_continuations(chat.tokenizer, pairs)
    margins = _Margins(chat, known, budget, progress)
    if permutations is None:
        parts = [margins.exact(questions)]
    else:
        orders = [_orders(known, permutations, [seed, number]) for number in range(len(questions))]
        parts = [margins.sampled(question, own) for question, own in zip(questions, orders, strict=True)]
    values, empty, full = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Shapley(known, values, empty, full, permutations)


def subset_count(layers: int, permutations: int | None) -> int:
    """Subsets that `shapley` measures for each question, at most."""
    return 2**layers if permutations is None else min(2**layers, permutations * (layers - 1) + 2)


Order = tuple[int, ...]
"""Layers in the order in which their adapters are switched on."""

Values = tuple[Tensor, Tensor, Tensor]
"""Shapley values [questions, k], empty margins and full margins [questions]."""


@dataclass(frozen=True)
class _Margins:
    """Margins of questions by subset of the layers."""

    chat: ChatModel
    layers: tuple[int, ...]
    budget: int | None
    progress: Advance | None

    def exact(self, questions: Sequence[Continuations]) -> Values:
        """From all subsets."""
        margins: dict[Subset, Tensor] = {}
        # The blocks of the lower half of the layers give the same for every subset of the upper half: a sweep inside
        # of the lower ones' setting computes it once, and the blocks above it for each subset.
        low, high = self.layers[: len(self.layers) // 2], self.layers[len(self.layers) // 2 :]
        for kept in _subsets(low):
            with intervene(self.chat, as_setting(switched_off(low, kept))):
                by_subset = self._sweep(questions, high, _subsets(high))
            margins |= {kept | above: margin for above, margin in by_subset.items()}
        return _weighted(margins, self.layers), margins[frozenset()], margins[frozenset(self.layers)]

    def sampled(self, question: Continuations, orders: list[Order]) -> Values:
        """From the subsets that begin the orders."""
        layers = self.layers
        prefixes = {frozenset(order[:size]) for order in orders for size in range(len(layers) + 1)}
        # A set has no order of its own that lasts from run to run, and batches are made in the order given.
        subsets = sorted(prefixes, key=sorted)
        margins = self._sweep([question], layers, subsets)
        if self.progress:
            self.progress(subset_count(len(layers), len(orders)) - len(subsets))
        gains = torch.zeros(1, len(layers), dtype=torch.float64)
        for order in orders:
            for size, layer in enumerate(order):
                before = frozenset(order[:size])
                gains[:, layers.index(layer)] += margins[before | {layer}] - margins[before]
        return gains / len(orders), margins[frozenset()], margins[frozenset(layers)]

    def _sweep(
        self, questions: Sequence[Continuations], layers: tuple[int, ...], subsets: Sequence[Subset]
    ) -> dict[Subset, Tensor]:
        """Margins, [questions], with those of the `layers` at 0 that are not in the subset."""
        rows = [as_setting(switched_off(layers, kept)) for kept in subsets]
        scores = sweep(self.chat, questions, rows, budget=self.budget, progress=self.progress)
        return dict(zip(subsets, margins_of(scores), strict=True))


def _weighted(margins: Mapping[Subset, Tensor], layers: tuple[int, ...]) -> Tensor:
    """[questions, k], by the formula over all subsets."""
    k = len(layers)
    weights = [math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k) for size in range(k)]
    gains = {
        layer: [weights[len(kept)] * (margins[kept | {layer}] - margins[kept]) for kept in margins if layer not in kept]
        for layer in layers
    }
    return torch.stack([torch.stack(gains[layer]).sum(0) for layer in layers], -1)


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


def _check_permutations(layers: int, permutations: int | None) -> None:
    if permutations is None and layers > EXACT_LAYERS:
        raise InputError(
            f"exact Shapley values of {layers} layers need {2**layers} passes a question: give a number of permutations"
        )
    if permutations is not None and (permutations < 2 or permutations % 2):
        raise InputError(
            f"permutations: {permutations}: give an even number, since each order is measured with its reverse"
        )
