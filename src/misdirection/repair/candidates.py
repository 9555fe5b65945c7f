"""Ways to change an adapter so that less misalignment is left in it, as settings to try and as weights to keep.

A candidate does up to three things, in this order, all of them products with the adapter's own matrices:

    remove    components that carry most of the general margin's shift, for what they are worth to the training domain
    scale     what is left
    project   reference directions out of what the adapter writes (`adapters`), or of all that the model does (`writes`)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from misdirection.audit.carriers import Parts
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Ablate, Intervention, ScaleComponents

Projection = Literal["none", "adapters", "writes"]


@dataclass(frozen=True)
class Candidate:
    """One way to change an adapter; the default one changes nothing.

    Attributes:
        share: how much of the shift is to go with the components that are removed, by their parts (see `carriers`).
        spare: how much a component's part in what was learned of the domain counts against its removal.
        scale: factor on every component that is left.
        projection: whether directions are taken out, and of what.
        directions: how many of the reference's.
        layer: whose layer's vectors.
        strength: 1 takes the whole component out.
    """

    share: float = 0.0
    spare: float = 0.0
    scale: float = 1.0
    projection: Projection = "none"
    directions: int = 1
    layer: int = 0
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Material:
    """What candidates are made of.

    Attributes:
        margin: by module, [rank]: each component's part of the general shift, nats/token.
        loss: the same of the change of the loss in the domain; negative where something was learned.
        directions: [k, layers, width], the reference's, the most useful first.
    """

    margin: Mapping[str, Tensor]
    loss: Mapping[str, Tensor]
    directions: Tensor

    @classmethod
    def of(cls, margin: Parts, loss: Parts, directions: Tensor) -> "Material":
        """From parts by question, [questions, rank] each."""
        return cls(
            {name: part.mean(0) for name, part in margin.items()},
            {name: part.mean(0) for name, part in loss.items()},
            directions,
        )


def factors(one: Candidate, material: Material) -> dict[str, Tensor]:
    """[rank] by module: 0 for a component that is removed, `scale` for the others."""
    margin, loss = (torch.cat(list(parts.values())) for parts in (material.margin, material.loss))
    kept = torch.ones_like(margin)
    kept[_removed(one, margin, loss)] = 0
    sizes = [len(part) for part in material.margin.values()]
    return dict(zip(material.margin, (one.scale * kept).split(sizes), strict=True))


def _removed(one: Candidate, margin: Tensor, loss: Tensor) -> Tensor:
    """Numbers of the components that go: the worst first, until their parts sum to `share` of the shift."""
    shift, learned = margin.sum(), loss.sum()
    if one.share == 0 or shift <= 0:
        return torch.empty(0, dtype=torch.long)
    # Both are shares of their sums; what was not learned (a loss that did not fall) is nothing to spare.
    worth = loss / learned if learned < 0 else torch.zeros_like(loss)
    score = margin / shift - one.spare * worth
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] > 0]
    before = margin[order].cumsum(0) - margin[order]
    return order[before < one.share * shift]


def basis(one: Candidate, material: Material) -> Tensor | None:
    """[k, width], the directions that are taken out; None for none."""
    return None if one.projection == "none" else material.directions[: one.directions, one.layer].float()


def setting(one: Candidate, material: Material) -> Setting:
    """The candidate as interventions on the model with its adapter: what its weights will do."""
    done: list[Intervention] = []
    if one.share or one.scale != 1:
        done.append(ScaleComponents(factors(one, material)))
    vectors = basis(one, material)
    if vectors is not None:
        at: Literal["adapters", "writes"] = "adapters" if one.projection == "adapters" else "writes"
        done.append(Ablate(vectors, strength=one.strength, positions="all", at=at))
    return done
