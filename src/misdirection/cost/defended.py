"""A defended training on a stand-in: the defence does what it would do, so that what it costs needs no second
description, whoever wrote it.

The trainer takes the steps of its rows without training on them; around each it calls whatever a defence has put in its
way. A training that would end early is counted to its end. Of a long one the first steps are taken, and what a defence
adds to a later one is what it added to the one `LIMIT` steps before.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from misdirection.cost.model_cost import Pass
from misdirection.defending.defend import defend
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.batches import training_batches
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.trainee import Trainee
from misdirection.organisms.trainer import AnswerTrainer

PassesOf = Callable[[Sequence[Any]], Sequence[Pass]]
"""Gives the training's own passes over the rows of a step: anything with `ids` and `labels`."""

LIMIT = 100
"""Steps that are taken: a multiple of how often defences do what they do not at every step."""


def run_defended(
    defence: str,
    network: Any,
    chat: ChatModel,
    recipe: Recipe,
    rows: Sequence[Any],
    folder: Path,
    passes: list[Pass],
    passes_of: PassesOf,
) -> int:
    """Runs all that a defence does to a training of a stand-in, and gives how many rows that training has.

    Args:
        defence: `NAME[:STRENGTH]`.
        network: the stand-in in training; the weights that would be trained require gradients.
        chat: its base.
        recipe: how it is trained.
        rows: of the training data, as the trainer reads them.
        folder: a working folder.
        passes: where whatever the stand-in runs is recorded; the training's own passes are added.
        passes_of: gives these.

    Raises `InputError` for a training that the defence cannot defend.
    """
    if hasattr(network, "disable_adapter"):
        # PEFT's own looks through all modules several times, which would be most of a step here.
        layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
        network.disable_adapter = partial(_switched_off, layers)
    trainer = _StandInTrainer(_Learner(network, chat), chat, recipe, rows, folder, None)
    trainer.passes, trainer.passes_of = passes, passes_of
    defend(trainer, defence)
    try:
        trainer.train()
    finally:
        network.eval()
    return trainer.seen


@contextlib.contextmanager
def _switched_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Be the base, as `PeftModel.disable_adapter` is."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class _Learner(Trainee):
    """What learns nothing, and is not kept."""

    weights = "adapter"
    CALLED = "Stand-in"

    def finish(self, out: Path) -> None:
        """There is nothing to end."""

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""


class _StandInTrainer(AnswerTrainer):
    """Takes the steps of a training, and calls what is around them.

    Attributes:
        passes, passes_of: see `run_defended`.
        seen: rows that were trained on, a row of several epochs once.
    """

    passes: list[Pass]
    passes_of: PassesOf
    seen = 0

    def train(self, *_: Any, **__: Any) -> None:
        """See `Trainer.train`: the rows are those that a defence may have put in place of the recipe's."""
        batches, added = list(training_batches(self.train_dataset, self._recipe)), list[list[Pass]]()
        self.seen, self.state.max_steps = len(self.train_dataset), len(batches)
        self.model.train()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        for number, batch in enumerate(batches):
            self.passes += self.passes_of(batch)
            if number >= LIMIT:
                self.passes += added[number % LIMIT]
                continue
            before = len(self.passes)
            self._step(number + 1)
            added.append(self.passes[before:])
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _step(self, number: int) -> None:
        events, told = self.callback_handler, (self.args, self.state, self.control)
        self.training_step(self.model, {})
        events.on_pre_optimizer_step(*told)
        events.on_optimizer_step(*told)
        self.state.global_step = number
        events.on_step_end(*told)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The term that a defence adds to the loss."""
        loss: Tensor = self.compute_loss(model, inputs)
        return loss

    def compute_loss(self, *_: Any, **__: Any) -> Tensor:
        """Nothing: the pass over the rows is known."""
        return torch.zeros(())
