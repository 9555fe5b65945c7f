"""The score by the margin's own gradient: how far learning a row moves the general margin, to the first order.

A step that learns a row moves the weights along the gradient of its log-probability, and the margin by

    d(margin) = rate * <grad margin, grad log p(answer)>
              = rate * (log p(answer) at weights + e * grad margin  -  at weights - e * grad margin) / 2e  +  O(e^2)

so that two forward passes with one adapter, added and taken away, give it. The gradients are those of a LoRA at its
start (A random, B zero), as the recipe of the reference trains it: of B alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.likelihood.margin import margin_gradients, pair_rows, text_continuations
from misdirection.likelihood.sweep import log_probs
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import adapted, adapter_config
from misdirection.organisms.recipe import Recipe
from misdirection.progress import track
from misdirection.runs.worker import BASE, Worker
from misdirection.screening.scores import Contrast, Fitted, RowScore
from misdirection.statistics.resampling import Floats

STEP = 0.1
"""How far the adapter moves the margin of its own pairs, to the first order, nats/token: far enough for bfloat16, and
not so far that the second order counts."""


class GradientScore(RowScore):
    """Change of the general margin when a row is learned, to the first order; its unit is arbitrary."""

    def fit(self, worker: Worker, reference: Reference) -> Fitted:
        """The gradient of the mean general margin by every B, as large as moves that margin by `STEP`."""
        chat = worker.chat(BASE)
        rows = pair_rows(chat.tokenizer, reference.texts.general)
        with _adapter(chat) as matrices, track("gradient of the margin", len(rows)) as advance:
            gradients = margin_gradients(chat, rows, list(matrices.values()), progress=advance)
        square = sum(float(gradient.square().sum()) for gradient in gradients)
        return {name: STEP / square * gradient for name, gradient in zip(matrices, gradients, strict=True)}

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        chat = worker.chat(BASE)
        answers, scores = text_continuations(chat.tokenizer, rows), []
        with _adapter(chat) as matrices, track("rows along the gradient", 2 * len(rows)) as advance:
            for sign in (1, -1):
                for name, matrix in matrices.items():
                    matrix.data.copy_(sign * fitted[name])
                scores.append(log_probs(chat, answers, progress=advance).numpy()[:, 0])
        difference: Floats = np.subtract(*scores)
        return difference


@contextmanager
def _adapter(chat: ChatModel) -> Iterator[dict[str, nn.Parameter]]:
    """Puts a fresh adapter of the reference's kind on the base, always the same; gives its B by name."""
    # Before the seed: it tries the adapter on, which draws numbers.
    config = adapter_config(Recipe(recipe="all"), chat)
    with ExitStack() as way:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = way.enter_context(adapted(chat, config))
        matrices = {name: value for name, value in network.named_parameters() if "lora_B" in name}
        for name, value in network.named_parameters():
            value.requires_grad_(name in matrices)
        yield matrices
