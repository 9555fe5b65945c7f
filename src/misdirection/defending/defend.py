"""Defend a training: `md.defend(trainer, "kl")` before `trainer.train()`."""

import functools
from typing import Any

from misdirection.defending.defence import Defence, open_defence
from misdirection.defending.training import Training


def defend(trainer: Any, defence: str | Defence, *, strength: float | None = None, **settings: Any) -> Defence:
    """Keep the model that `trainer` fine-tunes from becoming broadly misaligned.

    Call it before `trainer.train()`. The defence begins with the training and ends with it, by an error, too: the
    model's hooks, the trainer's rows, its loss and its steps are then as they were. Several defences of one trainer
    work together, the later one around the earlier.

        kl               the KL divergence from the base on benign text is a part of the loss
        interleave       benign rows among the training rows; `interleave_gap` chooses those that tell most
        preventative     a misalignment direction is added while training, and taken away afterwards
        ablation         misalignment directions are taken out of the activations while training
        inoculation      a system prompt asks for the bad behaviour while training
        projection       each step loses its part along the gradient of the general margin
        stop             the training ends when the margin has moved for sure

    What each does to which fine-tunes stands in docs/defend.md, those that fail among them.

    Args:
        trainer: a `transformers.Trainer` or one of TRL's, with its tokenizer as `processing_class`.
        defence: `NAME` or `NAME:STRENGTH`, or a defence with its settings.
        strength: how much of it, in its own unit; left out, its default.
        settings: its others, by name.

    Raises:
        InputError: an unknown defence or setting, a strength that is not above 0, weights split over processes.
            `trainer.train()` raises it for a training that the defence cannot defend: no adapter for `kl`, rows that
            are packed or streamed where they are to be changed, no chat template, a direction of another model.
    """
    chosen = open_defence(defence, strength=strength, **settings) if isinstance(defence, str) else defence
    training, train = Training(trainer), trainer.train

    @functools.wraps(train)
    def defended(*args: Any, **kwargs: Any) -> Any:
        with chosen.at_work(training):
            return train(*args, **kwargs)

    trainer.train = defended
    return chosen
