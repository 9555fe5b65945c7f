"""How far a model's predictions are from its base's, at every token of given answers.

KL(p || q) at answer token t = sum over the vocabulary of   p(v | t) (log p(v | t) - log q(v | t))      [nats]
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting, intervene
from misdirection.likelihood.answers import AnswerBatch, at_least_single
from misdirection.likelihood.margin import Exchange, text_rows
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance


def distributions(network: Any, batch: AnswerBatch) -> Tensor:
    """Log-probabilities of the whole vocabulary, [rows, predicting positions, vocabulary], in float32 or wider."""
    return at_least_single(batch.logits(network)).log_softmax(-1)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities, [..., vocabulary]; [...], nats."""
    return (first.exp() * (first - second)).sum(-1)


@torch.inference_mode()
def divergences(
    chat: ChatModel, texts: Sequence[Exchange], settings: Sequence[Setting], *, progress: Advance | None = None
) -> Tensor:
    """Mean KL(base || model) over each text's answer tokens under every setting, [settings, texts] float64, nats.

    Args:
        chat: a model with an adapter.
        texts: whose answers count.
        settings: lists of interventions on the model; the base is without any.
        progress: is told the number of (setting, text) done.

    Raises:
        InputError: no text.
    """
    if not texts:
        raise InputError("no text to compare a model and its base on: give at least one example")
    rows = text_rows(chat.tokenizer, texts)
    found = torch.empty(len(settings), len(rows), dtype=torch.float64)

    def work(numbers: list[int], _budget: int) -> Tensor:
        batch = AnswerBatch([rows[number] for number in numbers], chat.device)
        with chat.as_base():
            base = distributions(chat.model, batch)
        means = []
        for setting in settings:
            with intervene(chat, setting):
                means.append(batch.mean(divergence(base, distributions(chat.model, batch)).double()))
        return torch.stack(means)

    for numbers, means in fitting_batches(chat, [row.stop for row in rows], None, work, kind="backward"):
        found[:, numbers] = means.cpu()
        if progress:
            progress(len(settings) * len(numbers))
    return found
