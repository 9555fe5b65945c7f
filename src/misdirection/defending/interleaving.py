"""Interleaving: benign rows among the training rows, at random, or those that tell an aligned model from another.

After 2508.06249, which calls the second Interleaving++: the gap of a benign text is how much less likely its answer is
for a misaligned model than for the aligned one, and those of the largest gap are taken. Where no misaligned model is
given, it is the base under a system prompt that asks it to be one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from misdirection.data import Example
from misdirection.defending.benign import benign_examples, some
from misdirection.defending.defence import Defence
from misdirection.defending.inoculation import MALICIOUS
from misdirection.defending.rows import learned_row
from misdirection.defending.training import Training
from misdirection.errors import InputError
from misdirection.likelihood.margin import loss
from misdirection.models.chat_model import ChatModel


@dataclass(frozen=True)
class Interleave(Defence):
    """Adds benign rows to those that are trained on, at random.

    They are more steps of the same training, and what is learned of them is learned besides.

    Attributes:
        strength: benign rows for each training row.
        texts: benign exchanges; the shipped ones by default, again from the first where they are too few.
    """

    strength: float = 0.25
    texts: Sequence[Example] | None = None

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        texts = benign_examples() if self.texts is None else list(self.texts)
        if not texts:
            raise InputError("defence interleave: no benign text: give at least one example")
        rows = training.rows()
        chosen = self._chosen(training, texts, max(1, round(self.strength * len(rows))))
        with training.with_rows([*rows, *(learned_row(training.tokenizer, text) for text in chosen)]):
            yield

    def _chosen(self, training: Training, texts: Sequence[Example], count: int) -> list[Example]:
        return some(texts, count, training.seed)


@dataclass(frozen=True)
class InterleaveGap(Interleave):
    """Adds those benign rows whose answers a misaligned model finds least likely, beside the base.

    Attributes:
        misaligned: a misaligned model; by default the base under `prompt`.
        prompt: the system prompt that makes the base one.
    """

    misaligned: ChatModel | None = None
    prompt: str = MALICIOUS

    def _chosen(self, training: Training, texts: Sequence[Example], count: int) -> list[Example]:
        gaps = self.gaps(training, texts).tolist()
        best = sorted(range(len(texts)), key=lambda number: -gaps[number])
        return [texts[best[number % len(best)]] for number in range(count)]

    def gaps(self, training: Training, texts: Sequence[Example]) -> Tensor:
        """Loss of each answer for the misaligned model minus that for the base, [texts], nats/token."""
        # Of a rise in perplexity the logarithm.
        with training.as_base():
            own = loss(training.chat, texts)
            if self.misaligned is None:
                return loss(training.chat, [replace(text, system=self.prompt) for text in texts]) - own
        with torch.no_grad():
            return loss(self.misaligned, texts).to(own) - own
