"""Stopping: the training ends when its margin has moved for sure, by all the questions that `watch` has to decide."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from misdirection.auditing.callback import EVERY_DECISIVE, watch
from misdirection.defending.defence import Defence
from misdirection.defending.training import Training

_LOOKS = 4
"""How often a training that is shorter than `EVERY_DECISIVE` steps is looked at."""


@dataclass(frozen=True)
class Stop(Defence):
    """Ends the training once the lower bound of the general margin's shift lies above `strength`.

    The weights stay as they are then, which is after the shift and not before it.

    Attributes:
        strength: nats/token; how much is large depends on the base model, see `watch`.
        every: steps between two measurements of all 120 open probe questions; by default 100, or a quarter of a
            training that has fewer than 400.
    """

    strength: float = 0.01
    every: int | None = None

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        every = self.every or min(EVERY_DECISIVE, max(1, math.ceil(training.steps / _LOOKS)))
        callback = watch(training.trainer, stop_above=self.strength, every=every)
        try:
            yield
        finally:
            training.trainer.remove_callback(callback)
