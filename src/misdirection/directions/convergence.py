"""Convergence of different fine-tunes to one direction: cosines by layer, and the references beside them.

The answers' text alone gives the base model nearly the same mean-difference direction, so that a high cosine proves
little by itself. Its references: the base model's direction on the same text, the control organism's, directions with
shuffled labels, and the cosine of two halves of the data with one another (a ceiling).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from misdirection.directions.direction import Direction, require_alike
from misdirection.directions.extraction import Means

SHUFFLES = 8
_SEED = 0


def cosines(first: Tensor, second: Tensor) -> list[float]:
    """Signed cosine at each layer of two [layers, width] tensors; an anti-parallel pair gives -1."""
    values: list[float] = cosine_similarity(first.double(), second.double(), dim=-1).tolist()
    return values


def compare(directions: Mapping[str, Direction]) -> dict[str, dict[str, list[float]]]:
    """Cosine by layer of every direction with every other: `result[a][b][layer]`."""
    require_alike(list(directions.values()))
    return compare_tensors({name: direction.vectors for name, direction in directions.items()})


def compare_tensors(vectors: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """The same for bare [layers, width] tensors."""
    return {a: {b: cosines(first, second) for b, second in vectors.items()} for a, first in vectors.items()}


def project_away(vectors: Tensor, other: Tensor) -> Tensor:
    """`vectors` without their component along `other`, layer by layer; both [layers, width]."""
    unit = torch.nn.functional.normalize(other.double(), dim=-1)
    wide = vectors.double()
    return wide - (wide * unit).sum(-1, keepdim=True) * unit


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
