"""KL: the model stays close to its base on benign text.

    loss + strength * mean over answer tokens t of   KL( p_base(. | t) || p(. | t) )            [nats/token]

After 2602.07852, which learns a narrow domain without the general shift by such a term on text of other domains, and
2508.06249, which compares it with other defences.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from misdirection.data import Example
from misdirection.defending.benign import benign_examples, shuffled
from misdirection.defending.defence import Defence
from misdirection.defending.training import Training
from misdirection.errors import InputError
from misdirection.likelihood.answers import AnswerBatch, at_least_single
from misdirection.likelihood.margin import text_rows
from misdirection.models.chat import Encoded

_SHARE = 4
"""Training rows of a batch for each benign row beside them: a benign one costs as four forward passes, with the base's,
and a training row as three."""


@dataclass(frozen=True)
class KL(Defence):
    """Adds the KL divergence from the base on benign text to the loss.

    The base is the same network with its adapter switched off, so that there must be an adapter.

    Attributes:
        strength: nats of loss for each nat of divergence. 1 weighs both alike.
        texts: benign exchanges whose answers count; the shipped ones by default.
        rows: of them beside each batch; by default a quarter of its rows, at least one.
    """

    strength: float = 1.0
    texts: Sequence[Example] | None = None
    rows: int | None = None

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        if not training.has_base:
            raise InputError(
                "defence kl: this training changes the base's own weights, so that there is none to stay close to: "
                "train an adapter that begins at zero"
            )
        texts = text_rows(training.tokenizer, benign_examples() if self.texts is None else self.texts)
        if not texts:
            raise InputError("defence kl: no benign text: give at least one example")
        with training.with_loss(self._term(training, texts)):
            yield

    def _term(self, training: Training, texts: Sequence[Encoded]) -> Callable[[], Tensor]:
        count = self.rows or max(1, training.batch_size // _SHARE)
        order, turn = shuffled(len(texts), training.seed), _Turn(training)

        def term() -> Tensor:
            first = turn.next() * count
            chosen = [texts[order[(first + number) % len(order)]] for number in range(count)]
            return self.strength * divergence(training, AnswerBatch(chosen, training.chat.device))

        return term


class _Turn:
    """Numbers the batches of a training: a resumed one goes on with the texts that were next."""

    def __init__(self, training: Training) -> None:
        self._trainer, self._step, self._batch = training.trainer, -1, 0

    def next(self) -> int:
        step = self._trainer.state.global_step
        self._batch = self._batch + 1 if step == self._step else 0
        self._step = step
        return int(step * self._trainer.args.gradient_accumulation_steps + self._batch)


def divergence(training: Training, batch: AnswerBatch) -> Tensor:
    """Mean KL(base || model) over all answer tokens of the rows, nats/token, with gradients of the model."""
    with training.as_base():
        base = _log_probs(batch, batch.logits(training.network))
    own = _log_probs(batch, batch.logits(training.network))
    return kl_div(own, base, reduction="none", log_target=True).sum(-1).mean()


def _log_probs(batch: AnswerBatch, logits: Tensor) -> Tensor:
    """[answer tokens, vocabulary]."""
    return at_least_single(torch.cat(batch.answers(logits))).log_softmax(-1)
