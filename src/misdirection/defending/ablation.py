"""Concept ablation: misalignment directions are taken out of the activations while training.

After 2507.16795 (CAFT): weights that may not use a concept while they learn do not come to rest on it. There the
concepts are principal components and features of autoencoders that a person chose; here it is one direction for each
layer that is named, read off the base.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from misdirection.defending.benign import vectors_for
from misdirection.defending.defence import Defence
from misdirection.defending.training import Training
from misdirection.directions.direction import Direction
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate


@dataclass(frozen=True)
class ConceptAblation(Defence):
    """Takes each layer's direction out of its output, in the forward and backward passes of the training alone.

    The first token keeps its activations, as with every ablation here: there it does most of the damage.

    Attributes:
        strength: the share of the component that is taken out; 1 is all of it, as published.
        direction: one vector per layer, [layers, width], or a `Direction` of the base model; by default the base's own,
            from the open probe questions.
        layers: where it is taken out, 0-based; by default at a quarter, a half and three quarters of the depth.
    """

    strength: float = 1.0
    direction: Direction | Tensor | None = None
    layers: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        quarters = [len(training.chat.layers) * quarter // 4 for quarter in (1, 2, 3)]
        vectors = vectors_for(training, self.direction, quarters if self.layers is None else self.layers)
        ablations = [Ablate(vector, (layer,), self.strength) for layer, vector in vectors.items()]
        with training.around_steps(lambda: intervene(training.chat, ablations)):
            yield
