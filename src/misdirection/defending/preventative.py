"""Preventative steering: a misalignment direction is added while training, and taken away afterwards.

After 2507.21509: what the direction gives already, the weights need not learn. Its published setting adds 5 times the
vector at layer 20 of 28 (`configs/train_instruct_7b_steer.json` of its code); its vector is a mean difference as ours.
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
from misdirection.interventions.kinds import Steer

_DEPTH = 20 / 28
"""Of the layer, by the published setting."""


@dataclass(frozen=True)
class Preventative(Defence):
    """Adds `strength` times the direction at one layer, in the forward and backward passes of the training alone.

    Attributes:
        strength: multiple of the direction, with the norm that it has.
        direction: one vector per layer, [layers, width], or a `Direction` of the base model; by default the base's own,
            from the open probe questions.
        layer: where it is added, 0-based; by default at the published depth.
    """

    strength: float = 5.0
    direction: Direction | Tensor | None = None
    layer: int | None = None

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        layer = int(len(training.chat.layers) * _DEPTH) if self.layer is None else self.layer
        steer = Steer(vectors_for(training, self.direction, [layer])[layer], layer, self.strength)
        with training.around_steps(lambda: intervene(training.chat, [steer])):
            yield
