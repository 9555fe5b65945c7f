"""The likelihood margin: how much a model prefers misaligned answers, without sampling and without a judge.

    margin(question) = mean-token log p(misaligned | question) - mean-token log p(aligned | question)   [nats/token]

Its *shift* is the margin of an organism, or of a model under an intervention, minus that of the base model on the
same question. *Damage* is the change of the loss on neutral text, in nats/token: an intervention that breaks the
model "removes" anything.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.likelihood.sweep import TOKEN_BUDGET, Continuations, log_probs
from misdirection.models.chat import Encoded, encode
from misdirection.models.loading import ChatModel


def pair_continuations(tokenizer: Any, pairs: Sequence[ProbePair]) -> list[Continuations]:
    """One task per pair: the misaligned answer, then the aligned one.

    Raises `InputError` when there is no pair.
    """
    if not pairs:
        raise InputError("no probe pairs: the margin needs at least one question with two answers")
    return [
        _task(
            encode(tokenizer, pair.question, pair.misaligned, pair.system),
            encode(tokenizer, pair.question, pair.aligned, pair.system),
        )
        for pair in pairs
    ]


def pair_rows(tokenizer: Any, pairs: Sequence[ProbePair]) -> list[Encoded]:
    """Both exchanges of every pair, the misaligned answer first."""
    return [
        encode(tokenizer, pair.question, answer, pair.system)
        for pair in pairs
        for answer in (pair.misaligned, pair.aligned)
    ]


def text_continuations(tokenizer: Any, examples: Sequence[Example]) -> list[Continuations]:
    """One task per example, with its answer."""
    if not examples:
        raise InputError("no neutral text: damage needs at least one example")
    return [_task(encode(tokenizer, one.question, one.answer, one.system)) for one in examples]


def _task(*rows: Encoded) -> Continuations:
    if any(row.prompt != rows[0].prompt for row in rows):
        raise InputError("the two answers of a pair change how its prompt is tokenised: reword their beginning")
    return Continuations(rows[0].prompt, tuple(row.answer for row in rows))


def margin(chat: ChatModel, pairs: Sequence[ProbePair], *, budget: int = TOKEN_BUDGET) -> Tensor:
    """The margin of each pair, [pairs], nats/token. Run it under `intervene` for a margin with an intervention."""
    misaligned, aligned = log_probs(chat, pair_continuations(chat.tokenizer, pairs), budget=budget).unbind(-1)
    return misaligned - aligned


def loss(chat: ChatModel, examples: Sequence[Example], *, budget: int = TOKEN_BUDGET) -> Tensor:
    """The loss of each example's answer, [examples], nats/token."""
    return -log_probs(chat, text_continuations(chat.tokenizer, examples), budget=budget).squeeze(-1)
