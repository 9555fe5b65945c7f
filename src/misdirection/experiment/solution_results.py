"""Figures of organisms as solutions of their training domain: by the norm of their update, under noise, and by step.

Norms are Frobenius norms of `scaling * B A` over all adapted modules together; losses and their changes are in
nats/token.
"""

from typing import Literal

import pandas as pd

from misdirection.results import Figures
from misdirection.statistics.estimates import Estimate
from misdirection.views import row


class ScaledUpdate(Figures):
    """What an organism's update does when it is scaled to a norm."""

    norm: float
    loss: Estimate
    """On held-out rows of the organism's domain."""
    loss_change: Estimate
    """Against the base."""
    kl: Estimate
    """Mean KL(base || base with the update) at the answers' tokens of neutral texts, nats."""


class NoisyUpdate(Figures):
    """What random noise beside an organism's update does, which is orthogonal to it."""

    noise: float
    """Its norm as a multiple of the update's."""
    loss_rise: Estimate
    """Against the organism without noise; mean over draws of the noise."""
    between: float
    """Standard deviation of the mean rise between draws, which that interval does not hold."""


class Solution(Figures):
    """One organism."""

    domain: str
    answers: Literal["bad", "good"]
    own: ScaledUpdate
    """As it was trained."""
    scaled: list[ScaledUpdate]
    """At norms that all organisms are scaled to."""
    noisy: list[NoisyUpdate]


Measure = Literal["efficiency", "stability", "significance"]
"""Loss at equal norm; rise of the loss under relative noise; KL divergence at equal norm."""


class SolutionDifference(Figures):
    """One organism's figure minus the first one's, on the same rows or texts."""

    measure: Measure
    organism: str
    at: float
    """The norm of both, or the noise's multiple."""
    difference: Estimate


class Phase(Figures):
    """Margin shifts of an organism by step of its training, against the base."""

    continues: str | None
    """The organism that its training went on from."""
    steps: list[int]
    """After which a checkpoint was measured; its own, counted from 1."""
    shift: dict[str, list[Estimate]]
    """By question set, at each step."""
    drift: dict[str, Estimate]
    """Of one that went on from another organism: its margin minus that one's, by question set. Empty without one."""


class SolutionFigures(Figures):
    """Organisms as solutions of their training domain (2602.07852)."""

    seeds: int
    """Draws of the noise."""
    solutions: dict[str, Solution]
    """By organism. The first is what the others are compared with: all are scaled to multiples of its norm."""
    differences: list[SolutionDifference]
    """Of losses for those that were trained on the same rows as the first."""
    phases: dict[str, Phase]
    """By organism, of those that kept their checkpoints."""

    def frame(self) -> pd.DataFrame:
        """One row per organism and norm, that of its training first, and per organism and noise."""
        return pd.DataFrame(
            {"organism": name, **row(at)}
            for name, solution in self.solutions.items()
            for at in (solution.own, *solution.scaled, *solution.noisy)
        )
