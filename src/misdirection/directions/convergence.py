"""Convergence of different fine-tunes to one direction: cosines by layer, and the references beside them.

The answers' text alone gives the base model nearly the same mean-difference direction, so that a high cosine proves
little by itself. Its references: the base model's direction on the same text, the control organism's, directions with
shuffled labels, and the cosine of two halves of the data with one another (a ceiling).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from misdirection.directions.direction import Direction, require_alike
from misdirection.directions.extraction import Means
from misdirection.errors import InputError
from misdirection.views import Plotted

SHUFFLES = 8
_SEED = 0
_DEPENDENT = 1e-6
"""Singular values of unit vectors below which one of them is a sum of the others."""


def cosines(first: Tensor, second: Tensor) -> list[float]:
    """Signed cosine at each layer of two [layers, width] tensors; an anti-parallel pair gives -1."""
    values: list[float] = cosine_similarity(first.double(), second.double(), dim=-1).tolist()
    return values


def random_cosine_95(width: int) -> float:
    """The |cosine| that one pair of random vectors in twenty exceeds (cosines are nearly normal at such widths)."""
    return NormalDist().inv_cdf(0.975) / math.sqrt(width)


class Cosines(Plotted, dict[str, dict[str, list[float]]]):
    """Cosines of several directions with one another: `cosines[a][b][layer]`.

    Attributes:
        random_95: the |cosine| that one pair of random vectors of this width in twenty exceeds.
    """

    KIND: ClassVar[str] = "cosines"

    def __init__(self, values: Mapping[str, dict[str, list[float]]], width: int) -> None:
        super().__init__(values)
        self.random_95 = random_cosine_95(width)

    @property
    def pairs(self) -> dict[tuple[str, str], list[float]]:
        """The cosines of every two directions, once."""
        return {(a, b): self[a][b] for a, b in combinations(self, 2)}

    def frame(self) -> pd.DataFrame:
        """One row for every two directions (`a`, `b`) and layer: `cosine`, and `random_95`."""
        return pd.DataFrame(
            {"a": a, "b": b, "layer": layer, "cosine": cosine, "random_95": self.random_95}
            for (a, b), curve in self.pairs.items()
            for layer, cosine in enumerate(curve)
        )


def compare(directions: Mapping[str, Direction]) -> Cosines:
    """Cosine by layer of every direction with every other: `result[a][b][layer]`.

    Raises `InputError` for no direction, and for directions of other widths, layers or base models.
    """
    if not directions:
        raise InputError("no directions: give at least two that are to be compared")
    require_alike(list(directions.values()))
    vectors = {name: direction.vectors for name, direction in directions.items()}
    return Cosines(compare_tensors(vectors), width=next(iter(vectors.values())).shape[1])


def compare_tensors(vectors: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """The same for bare [layers, width] tensors."""
    return {a: {b: cosines(first, second) for b, second in vectors.items()} for a, first in vectors.items()}


def project_away(vectors: Tensor, other: Tensor) -> Tensor:
    """`vectors` without their component along `other`, layer by layer; both [layers, width]."""
    unit = torch.nn.functional.normalize(other.double(), dim=-1)
    wide = vectors.double()
    return wide - (wide * unit).sum(-1, keepdim=True) * unit


def project_span_away(vectors: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`vectors` without their part in the span of several, layer by layer; all [layers, width].

    What of these is linearly dependent but for rounding counts once.
    """
    rows = torch.nn.functional.normalize(torch.stack([other.double() for other in others], dim=1), dim=-1)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis * (sizes > _DEPENDENT).unsqueeze(-1)
    wide = vectors.double()
    return wide - torch.einsum("lw,lkw,lkv->lv", wide, basis, basis)


def null_groups(pairs: int) -> dict[str, list[int]]:
    """Groups of rows for the references, where row i is a pair's misaligned and row i + pairs its aligned answer.

    Two halves of the questions, and `SHUFFLES` relabellings that swap the two answers of a random half of them.
    """
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(pairs, generator=generator).tolist()
    halves = {"half_0": order[: pairs // 2], "half_1": order[pairs // 2 :]}
    groups: dict[str, list[int]] = {}
    for name, members in halves.items():
        groups |= _two_classes(name, members, [False] * pairs, pairs)
        groups[f"{name}/all"] = members + [pairs + member for member in members]
    for shuffle in range(SHUFFLES):
        swapped = torch.zeros(pairs, dtype=torch.bool)
        swapped[torch.randperm(pairs, generator=generator)[: pairs // 2]] = True
        groups |= _two_classes(f"shuffled_{shuffle}", range(pairs), swapped.tolist(), pairs)
    return groups


def _two_classes(name: str, members: Sequence[int], swapped: Sequence[bool], pairs: int) -> dict[str, list[int]]:
    misaligned = [member + pairs * swapped[member] for member in members]
    aligned = [member + pairs * (not swapped[member]) for member in members]
    return {f"{name}/misaligned": misaligned, f"{name}/aligned": aligned}


def split_half(means: Means) -> list[float]:
    """Cosine by layer of the direction from one half of the questions with that from the other: the ceiling."""
    first, second = (means.difference(f"half_{i}/misaligned", f"half_{i}/aligned") for i in (0, 1))
    return cosines(first, second)


def shuffled(means: Means) -> list[float]:
    """Mean |cosine| by layer of the true direction with the label-shuffled ones: the floor."""
    true = means.difference("misaligned", "aligned")
    draws = [means.difference(f"shuffled_{i}/misaligned", f"shuffled_{i}/aligned") for i in range(SHUFFLES)]
    values: list[float] = torch.tensor([cosines(true, draw) for draw in draws]).abs().mean(0).tolist()
    return values
