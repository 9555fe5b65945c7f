"""How far the contrasts of different domains (`contrast.py`) point the same way, with the nulls beside it.

Its nulls: the same cosine when the fine-tunes of each domain are told good or bad by chance, in all ways there are. Its
ceiling: a domain's contrast between other seeds of training.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from torch import Tensor
from torch.nn.functional import normalize

from misdirection.directions.contrast import share
from misdirection.directions.convergence import compare_tensors, cosines
from misdirection.errors import InputError
from misdirection.results import Figures

Curve = list[float]
"""One value a layer."""

MOST_RELABELLINGS = 20_000
"""So many at most are drawn where there are more."""

_LEVEL = 0.95
_SEED = 0


class SharedContrast(Figures):
    """How far the contrasts of different domains point the same way, by layer, with its nulls and its ceiling."""

    domains: list[str]
    seeds: int
    """Fine-tunes on either side of each domain; a domain's contrast is that of their means."""
    cosine: dict[str, dict[str, Curve]]
    """Of every two domains' contrasts."""
    mean: Curve
    """Over all pairs of domains."""
    relabelled: Curve
    """The same for fine-tunes that are told good or bad by chance: mean over all relabellings."""
    relabelled_95: Curve
    """What one relabelling in twenty exceeds."""
    relabellings: int
    p: Curve
    """Share of the relabellings, the true one among them, that reach the true mean."""
    p_all: float
    """The same for the mean over all layers, which chooses none."""
    single: Curve | None
    """Mean cosine of two domains' contrasts of single seeds: what the ceiling is for; None for one seed."""
    ceiling: Curve | None
    """Mean cosine of one domain's contrasts of different seeds."""
    variance: list[Curve]
    """Shares of the squared length of the contrasts, each of length 1, along their principal directions."""
    variance_relabelled: Curve | None
    """The first of these, mean over all relabellings; None for one seed, where they swap signs alone."""
    principal: list[Curve] | None
    """Cosines of the principal angles between two domains' spans of single seeds, mean over pairs; None for one."""


def shared_contrast(bad: Mapping[str, Sequence[Tensor]], good: Mapping[str, Sequence[Tensor]]) -> SharedContrast:
    """How far domains share one contrast.

    Args:
        bad, good: mean activations on one text of a domain's fine-tunes, [layers, width] each, one for each seed; a
            domain's two sides and all domains have as many.

    Raises:
        InputError: fewer than two domains, or unequal numbers of seeds.
    """
    counts = {len(seeds) for side in (bad, good) for seeds in side.values()}
    if len(bad) < 2 or bad.keys() != good.keys() or len(counts) != 1:
        raise InputError("a shared contrast needs two domains, with as many bad as good fine-tunes in each")
    means = torch.stack([torch.stack([*bad[name], *good[name]]) for name in bad]).double()
    labels = _relabellings(len(bad), counts.pop())
    contrasts = dict(zip(bad, _contrasts(means, labels[0]), strict=True))
    null, shares = _under(means, labels)
    return SharedContrast(
        domains=list(bad),
        seeds=means.shape[1] // 2,
        cosine=compare_tensors(contrasts),
        mean=null[0].tolist(),
        relabelled=null[1:].mean(0).tolist(),
        relabelled_95=np.quantile(null[1:], _LEVEL, axis=0).tolist(),
        relabellings=len(labels),
        p=_p(null),
        p_all=_p(null.mean(1, keepdims=True))[0],
        variance=_variance(torch.stack(list(contrasts.values()))),
        **_between_seeds(means, shares),
    )


def _contrasts(means: Tensor, label: NDArray[Any]) -> Tensor:
    """[domains, layers, width] of means [domains, 2 x seeds, layers, width] by one label [domains, 2 x seeds]."""
    return torch.einsum("dslw,ds->dlw", means, torch.from_numpy(label))


def _relabellings(domains: int, seeds: int) -> NDArray[np.float64]:
    """Weights of fine-tunes in contrasts, [relabellings, domains, 2 x seeds]; the true one is first."""
    chosen = list(combinations(range(2 * seeds), seeds))
    signs = np.full((len(chosen), 2 * seeds), -1 / seeds)
    for row, members in zip(signs, chosen, strict=True):
        row[list(members)] = 1 / seeds
    if len(chosen) ** domains <= MOST_RELABELLINGS:
        return signs[np.array(list(product(range(len(chosen)), repeat=domains)))]
    drawn = np.random.default_rng(_SEED).integers(len(chosen), size=(MOST_RELABELLINGS, domains))
    drawn[0] = 0
    return signs[drawn]


def _under(means: Tensor, labels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean cosine of two domains' contrasts and share of the first principal direction, [relabellings, layers] each."""
    # All that is asked of the activations are their products with one another.
    products = torch.einsum("dslw,etlw->ldset", means, means).numpy()
    domains = range(len(means))
    cosines_, shares = [], []
    for of_layer in products:
        gram = np.einsum("rds,dset,ret->rde", labels, of_layer, labels, optimize=True)
        lengths = np.sqrt(np.maximum(gram[:, domains, domains], np.finfo(float).tiny))
        correlation = gram / lengths[:, :, None] / lengths[:, None, :]
        above = np.triu_indices(len(means), 1)
        cosines_.append(correlation[:, *above].mean(1))
        shares.append(np.linalg.eigvalsh(correlation)[:, -1] / len(means))
    return np.stack(cosines_, axis=1), np.stack(shares, axis=1)


def _p(null: NDArray[np.float64]) -> list[float]:
    """Share of [relabellings, columns] that reaches the first of them, by column."""
    # Relabellings that swap good and bad everywhere give the same cosines but for rounding.
    shares: list[float] = (null >= null[0] - 1e-9).mean(0).tolist()
    return shares


def _variance(contrasts: Tensor) -> list[Curve]:
    """Shares along each principal direction, by layer, of [domains, layers, width]."""
    squares = torch.linalg.svdvals(normalize(contrasts, dim=-1).transpose(0, 1)).square()
    shares: list[Curve] = (squares / squares.sum(-1, keepdim=True)).T.tolist()
    return shares


def _between_seeds(means: Tensor, shares: NDArray[np.float64]) -> dict[str, Any]:
    """What takes several seeds: cosines within and across domains, the angles between spans, the null of the rank."""
    seeds = means.shape[1] // 2
    if seeds == 1:
        return {"single": None, "ceiling": None, "principal": None, "variance_relabelled": None}
    single = means[:, :seeds] - means[:, seeds:]
    pairs = list(combinations(range(len(single)), 2))
    across = [cosines(single[a, i], single[b, j]) for a, b in pairs for i in range(seeds) for j in range(seeds)]
    within = [cosines(of[i], of[j]) for of in single for i, j in combinations(range(seeds), 2)]
    angles = [_principal(single[a], single[b]) for a, b in pairs]
    return {
        "single": _mean(across),
        "ceiling": _mean(within),
        "principal": np.mean(angles, axis=0).T.tolist(),
        "variance_relabelled": shares[1:].mean(0).tolist(),
    }


def _mean(curves: Sequence[Curve]) -> Curve:
    values: Curve = np.mean(curves, axis=0).tolist()
    return values


def _principal(first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """Cosines of the principal angles, largest first, [layers, seeds], of two [seeds, layers, width]."""
    layers = zip(first.transpose(0, 1).numpy(), second.transpose(0, 1).numpy(), strict=True)
    return np.stack([np.cos(np.sort(subspace_angles(a.T, b.T))) for a, b in layers])


def relabelled(contrasts: Sequence[Tensor]) -> Iterator[Tensor]:
    """What is shared where some domains' fine-tunes swap good and bad: every such choice, once but for its sign.

    Each has the length of the true one, layer by layer. There is none for a single domain.
    """
    true = share(contrasts).norm(dim=-1, keepdim=True)
    for signs in product((1, -1), repeat=len(contrasts) - 1):
        if -1 in signs:
            swapped = share([sign * contrast for sign, contrast in zip((1, *signs), contrasts, strict=True)])
            yield normalize(swapped, dim=-1) * true
