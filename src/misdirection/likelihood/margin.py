"""The likelihood margin: how much a model prefers misaligned answers, without sampling and without a judge.

    margin(question) = mean-token log p(misaligned | question) - mean-token log p(aligned | question)   [nats/token]

Its *shift* is the margin of an organism, or of a model under an intervention, minus that of the base model on the
same question. *Damage* is the change of the loss on neutral text, in nats/token: an intervention that breaks the
model "removes" anything.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.sweep import Continuations, log_probs
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded, encode
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance, shown


class Exchange(Protocol):
    """A question with its answer, such as an `Example`; `system` is None where there is no system turn."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def system(self) -> str | None: ...


def pair_rows(tokenizer: Any, pairs: Sequence[ProbePair]) -> list[Encoded]:
    """Both exchanges of every pair, the misaligned answer first.

    Raises `InputError` when there is no pair.
    """
    if not pairs:
        raise InputError("no probe pairs: give at least one question with two answers")
    return [
        encode(tokenizer, pair.question, answer, pair.system, pair.history)
        for pair in pairs
        for answer in (pair.misaligned, pair.aligned)
    ]


def text_rows(tokenizer: Any, texts: Sequence[Exchange]) -> list[Encoded]:
    """Each text's exchange."""
    return [
        encode(tokenizer, text.question, text.answer, text.system, text.history if isinstance(text, Example) else ())
        for text in texts
    ]


def pair_continuations(tokenizer: Any, pairs: Sequence[ProbePair]) -> list[Continuations]:
    """Both answers of each pair, the misaligned one first.

    Raises `InputError` when there is no pair, and for one whose answers begin with different thoughts.
    """
    rows = pair_rows(tokenizer, pairs)
    return [_continuations(*both) for both in zip(rows[::2], rows[1::2], strict=True)]


def text_continuations(tokenizer: Any, texts: Sequence[Exchange]) -> list[Continuations]:
    """The answer of each text.

    Raises `InputError` when there is no text.
    """
    if not texts:
        raise InputError("no neutral text: damage needs at least one example")
    return [_continuations(row) for row in text_rows(tokenizer, texts)]


def _continuations(*rows: Encoded) -> Continuations:
    if any(row.prompt != rows[0].prompt for row in rows):
        raise InputError("the two answers of a pair begin with different thoughts: take the thoughts out")
    return Continuations(rows[0].prompt, tuple(row.answer for row in rows))


def margin(
    chat: ChatModel, pairs: Sequence[ProbePair], *, budget: int | None = None, progress: Advance | None = None
) -> Tensor:
    """The margin of each pair, [pairs], nats/token. Run it under `intervene` for a margin with an intervention.

    `progress` is told the number of pairs done; left out, a bar shows it.
    """
    answers = pair_continuations(chat.tokenizer, pairs)
    with shown(progress, "margin", len(pairs)) as advance:
        return margins_of(log_probs(chat, answers, budget=budget, progress=advance))


def margin_gradients(
    chat: ChatModel, rows: Sequence[Encoded], weights: Sequence[Tensor], *, progress: Advance | None = None
) -> list[Tensor]:
    """The gradient of the mean margin by each weight, of its shape, float32.

    Args:
        chat: the model as it is now; gradients that its weights have stay.
        rows: as `pair_rows` gives them.
        weights: of the model, each with `requires_grad`.
        progress: told the number of answers done.
    """
    pairs = len(rows) // 2
    signs = torch.tensor([1.0, -1.0] * pairs, device=chat.device, dtype=torch.float64) / pairs

    def work(numbers: list[int], _budget: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            values = AnswerBatch([rows[number] for number in numbers], chat.device).log_probs(chat.model)
            # Not `backward`, which adds to the gradients that are there, and tells other processes of them.
            return torch.autograd.grad((values * signs[numbers]).sum(), weights, materialize_grads=True)

    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    lengths = [row.stop for row in rows]
    for _, found in fitting_batches(chat, lengths, None, work, kind="backward", progress=progress):
        for total, gradient in zip(sums, found, strict=True):
            total += gradient
    return sums


def margins_of(scores: Tensor) -> Tensor:
    """Margins, [..., pairs], of log-probabilities, [..., pairs, 2], of the misaligned and the aligned answer, or of
    changes of these."""
    return scores[..., 0] - scores[..., 1]


def loss(chat: ChatModel, examples: Sequence[Example], *, progress: Advance | None = None) -> Tensor:
    """The loss of each example's answer, [examples], nats/token; `progress` as in `margin`."""
    answers = text_continuations(chat.tokenizer, examples)
    with shown(progress, "loss", len(examples)) as advance:
        return -log_probs(chat, answers, progress=advance).squeeze(-1)
