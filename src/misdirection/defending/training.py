"""A training as a defence sees it: the trainer, its model and that model's base, and what can be put in its way.

Everything here that changes something is a context, and undoes it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import TrainerCallback

from misdirection.defending.rows import LearnedRow, dataset_of, read_rows
from misdirection.models.chat_model import ChatModel
from misdirection.models.in_training import chat_of, leaves_base, network_of, require_whole, tokenizer_of, untouched


@dataclass(frozen=True, eq=False)
class Training:
    """What a trainer is about to do.

    Attributes:
        trainer: a `transformers.Trainer`, or one made from it.
    """

    trainer: Any

    def __post_init__(self) -> None:
        require_whole(self.trainer, "defended in training: train on one device, or on several that each hold all of it")

    @cached_property
    def network(self) -> Any:
        """The model in training, below what makes it parallel."""
        return network_of(self.trainer)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's; `InputError` where the trainer has none with a chat template."""
        return tokenizer_of(self.trainer)

    @cached_property
    def chat(self) -> ChatModel:
        """The model in training with its tokenizer."""
        return chat_of(self.trainer)

    @property
    def has_base(self) -> bool:
        """Whether the base can be had at any time, by switching the adapter off."""
        return leaves_base(self.network)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Be the base, in evaluation mode, without gradients; before the first step a model without adapter is its own.

        Computes as the trainer does (autocast).
        """
        switched = self.network.disable_adapter() if self.has_base else contextlib.nullcontext()
        with untouched(self.network), switched, self.trainer.accelerator.autocast():
            yield

    @property
    def seed(self) -> int:
        """Of the trainer's data."""
        args = self.trainer.args
        return int(args.seed if args.data_seed is None else args.data_seed)

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass."""
        return int(self.trainer.args.per_device_train_batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training, on the rows as they are now."""
        args = self.trainer.args
        if args.max_steps > 0:
            return int(args.max_steps)
        batches = math.ceil(len(self.trainer.train_dataset) / (self.batch_size * args.world_size))
        return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))

    # --- what a defence may change --------------------------------------------------------------------------------

    def rows(self) -> list[LearnedRow]:
        """The rows that are trained on; `InputError` for what are no rows of token ids with labels."""
        return read_rows(self.trainer.train_dataset)

    def with_rows(self, rows: Sequence[LearnedRow]) -> contextlib.AbstractContextManager[None]:
        """Train on other rows."""
        return _replaced(self.trainer, "train_dataset", dataset_of(rows, self.trainer.train_dataset))

    def with_loss(self, added: Callable[[], Any]) -> contextlib.AbstractContextManager[None]:
        """Add a term to the loss of every batch, nats/token; it is averaged over the batches of a step.

        A trainer that reads a batch in pieces says so by `is_later_piece`: the term belongs to the first.
        """
        trainer, network = self.trainer, self.network
        compute_loss = trainer.compute_loss

        def compute(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(model, inputs, *args, **kwargs)
            # An evaluation, which may want the model's outputs, is of the trainer's own loss.
            if isinstance(loss, tuple) or not network.training or getattr(trainer, "is_later_piece", False):
                return loss
            return loss + added() / _batches_of(trainer, kwargs.get("num_items_in_batch"))

        return _replaced(trainer, "compute_loss", compute)

    def around_steps(
        self, context: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> contextlib.AbstractContextManager[None]:
        """Run each batch's forward and backward pass in a context of its own, and nothing else: no evaluation."""
        training_step = self.trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            with context():
                return training_step(*args, **kwargs)

        return _replaced(self.trainer, "training_step", step)

    @contextlib.contextmanager
    def with_callback(self, callback: TrainerCallback) -> Iterator[None]:
        """Have the trainer call a callback."""
        self.trainer.add_callback(callback)
        try:
            yield
        finally:
            self.trainer.remove_callback(callback)


def _batches_of(trainer: Any, items: Any) -> int:
    """By how much a batch's mean is to be divided here, since the trainer does so itself only where it did not count.

    With the number of all labelled tokens of a step, a trainer's loss is its batch's part of the step's mean already.
    """
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if scaled else 1


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object, which gets its own one back, or that of its class."""
    own = vars(owner)
    before = own.get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


_ABSENT = object()
