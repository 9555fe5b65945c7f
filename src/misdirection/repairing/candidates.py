"""Ways to change an adapter so that less misalignment is left in it, as interventions to try and as weights to keep.

A candidate does up to three things, in this order, all of them products with the adapter's own matrices:

    turn      out of what each module's adapter adds, take the direction in which it raises the general margin
              (see `gradients`): B <- B - turn * g g^T B
    scale     all that is left
    project   reference directions out of what the adapter writes (`adapters`), or of all that the model does (`writes`)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from misdirection.interventions.intervention import Intervention
from misdirection.interventions.kinds import Ablate, ProjectAdapters, ScaleAdapters
from misdirection.interventions.vectors import random_like

Projection = Literal["none", "adapters", "writes"]


@dataclass(frozen=True, eq=False)
class Material:
    """Directions that candidates are made of.

    Attributes:
        gradients: by module, [out], a unit vector.
        layers: those with an adapter.
        directions: [k, layers, width], the reference's, the most useful first.
    """

    gradients: Mapping[str, Tensor]
    layers: tuple[int, ...]
    directions: Tensor

    def random(self, seed: int = 0) -> "Material":
        """Random vectors of the same norms in the place of all directions: the control beside a candidate."""
        gradients = {
            name: random_like(gradient, seed + 1000 * number)
            for number, (name, gradient) in enumerate(self.gradients.items())
        }
        return Material(gradients, self.layers, random_like(self.directions, seed))


@dataclass(frozen=True)
class Candidate:
    """A way to change an adapter; the default changes nothing.

    Attributes:
        turn: 1 takes each module's direction out; above that it is turned round, since other modules still write it.
        scale: factor on all that the adapter adds.
        projection: whether reference directions are taken out, and of what.
        directions: how many of the reference's.
        layer: whose layer's vectors.
        strength: 1 takes the whole component out.
    """

    turn: float = 0.0
    scale: float = 1.0
    projection: Projection = "none"
    directions: int = 1
    layer: int = 0
    strength: float = 1.0

    def interventions(self, material: Material) -> list[Intervention]:
        """The candidate on the model with its adapter: the same as its weights will do."""
        done: list[Intervention] = []
        if self.turn:
            bases = {name: gradient.unsqueeze(0) for name, gradient in material.gradients.items()}
            done.append(ProjectAdapters(bases, self.turn))
        if self.scale != 1:
            done.append(ScaleAdapters(dict.fromkeys(material.layers, self.scale)))
        projected = self.ablation(material)
        return [*done, projected] if projected else done

    def ablation(self, material: Material) -> Ablate | None:
        """Its projection of reference directions; None for none."""
        if self.projection == "none":
            return None
        vectors = material.directions[: self.directions, self.layer].float()
        return Ablate(vectors, strength=self.strength, positions="all", at=self.projection)
