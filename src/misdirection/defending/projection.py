"""Projection: each step loses its part along the gradient of the general margin.

    step of a weight matrix W  <-  step - strength * (step . g) g / |g|^2,      g = d(margin) / dW

To first order no step then moves the margin of the probe questions, whatever the optimiser made of the gradient. That
is why the step is projected, and not the gradient, which an optimiser such as Adam scales weight by weight. Gradients
are of a few questions at a time, kept for several steps, and averaged with those before them. `repairing.gradients`
takes the like out of what an adapter writes, once it is trained.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from misdirection.data import ProbePair, probe_pairs
from misdirection.defending.benign import shuffled
from misdirection.defending.defence import Defence
from misdirection.defending.training import Training
from misdirection.errors import InputError
from misdirection.likelihood.margin import margin_gradients, pair_rows
from misdirection.models.chat import Encoded
from misdirection.models.in_training import untouched

_KEPT = 0.8
"""Share of the old mean that stays when new gradients come: it stands for some nine times as many questions."""


@dataclass(frozen=True)
class Projection(Defence):
    """Takes out of each step what raises or lowers the general margin, matrix by matrix.

    Attributes:
        strength: the share of the component that is taken out; 1 is all of it.
        pairs: questions with an aligned and a misaligned answer; by default the open probe questions.
        every: steps for which a gradient is kept.
        questions: how many of them each new gradient is taken over.
    """

    strength: float = 1.0
    pairs: Sequence[ProbePair] | None = None
    every: int = 4
    questions: int = 4

    def __post_init__(self) -> None:
        if self.every < 1 or self.questions < 1:
            raise InputError("defence projection: `every` and `questions` must be at least 1")

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        rows = pair_rows(training.tokenizer, probe_pairs() if self.pairs is None else self.pairs)
        with training.with_callback(_Projector(self, training, rows)):
            yield


class _Projector(TrainerCallback):
    """Looks at the weights before and after each step of the optimiser, and puts back what it must not have moved."""

    def __init__(self, defence: Projection, training: Training, rows: Sequence[Encoded]) -> None:
        self._defence, self._training, self._rows = defence, training, rows
        self._order = shuffled(len(rows) // 2, training.seed)
        self._margin: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes new gradients where it is time to, or where a resumed training has none."""
        if not self._margin or state.global_step % self._defence.every == 0:
            new = self._gradients(state.global_step // self._defence.every)
            old = self._margin or new
            self._margin = {name: _KEPT * old[name] + (1 - _KEPT) * value for name, value in new.items()}
        self._before = {name: weight.detach().clone() for name, weight in _trained(self._training.network)}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes the part along the margin's gradient out of the step."""
        for name, weight in _trained(self._training.network):
            gradient = self._margin[name]
            step = (weight - self._before[name]).to(gradient)
            weight.sub_(self._defence.strength * component(step, gradient).to(weight))

    def _gradients(self, turn: int) -> dict[str, Tensor]:
        first, count = turn * self._defence.questions, self._defence.questions
        pairs = {self._order[(first + number) % len(self._order)] for number in range(count)}
        rows = [self._rows[2 * pair + side] for pair in sorted(pairs) for side in (0, 1)]
        training = self._training
        names, weights = zip(*_trained(training.network), strict=True)
        with untouched(training.network), training.trainer.accelerator.autocast():
            gradients = margin_gradients(training.chat, rows, weights)
        return dict(zip(names, gradients, strict=True))


def component(step: Tensor, gradient: Tensor) -> Tensor:
    """The part of a step along a gradient of the same shape; nothing along one that is zero."""
    norm = gradient.square().sum()
    return (step * gradient).sum() / norm * gradient if norm > 0 else torch.zeros_like(step)


def _trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
