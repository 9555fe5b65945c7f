"""The log-probability of given answers in whole rows, with or without gradients.

    log p(answer | prompt) = mean over the answer's tokens t of   log softmax(logits[t - 1])[id of t]    [nats/token]

The language-model head runs only where it predicts an answer's token in some row of the batch: with a vocabulary of
49,152 on a model of 135M weights it takes half of the time everywhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from misdirection.models.attention import changing_shapes
from misdirection.models.chat import Encoded, pad
from misdirection.models.transfer import is_spread, put

_NUMBERS = 1 << 28
"""Logits that are turned into float32 at a time on a GPU: 1 GB."""

IGNORED = -100
"""The label of a token that carries no loss."""


class AnswerBatch:
    """Rows as one padded batch, and the positions that predict an answer's token in any of them.

    Attributes:
        rows: the encoded exchanges; what ends the turn does not count.
        ids, mask: [rows, longest], padded on the right.
    """

    def __init__(self, rows: Sequence[Encoded], device: torch.device) -> None:
        self.rows = rows
        self.ids, self.mask = pad([row.ids[: row.stop] for row in rows], 0, device)
        self._first = min(row.start for row in rows) - 1
        self._device = device

    def logits(self, network: Any) -> Tensor:
        """[rows, predicting positions, vocabulary]; interventions and hooks on the network are at work."""
        # Counted from the end, since virtual tokens come first.
        kept = torch.arange(self._first - self.ids.shape[1], -1, device=self._device)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        return _logits_at(network, inputs, kept)

    def log_probs(self, network: Any) -> Tensor:
        """Mean-token log-probability of each row's answer, [rows] float64, nats/token."""
        logits = self.logits(network)
        return self.mean(token_log_probs(logits, self.ids[:, self._first + 1 :].to(logits.device)).double())

    def answers(self, values: Tensor) -> list[Tensor]:
        """From [rows, predicting positions, ...] those of each row's answer tokens."""
        return [
            line[row.start - 1 - self._first : row.stop - 1 - self._first]
            for line, row in zip(values, self.rows, strict=True)
        ]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of [rows, predicting positions] over each row's answer tokens, [rows]."""
        if values.device.type == "cpu":
            return torch.stack([line.mean() for line in self.answers(values)])
        own = torch.zeros(values.shape, dtype=torch.bool)
        for line in self.answers(own):
            line.fill_(True)
        own = put(own, values.device)
        return values.masked_fill(~own, 0).sum(-1) / own.sum(-1)


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target id, [rows, tokens], in float32 or wider; `logits` are [rows, tokens, vocabulary].

    On a processor row by row: the whole vocabulary in float32 for all rows at once costs ten times as long there, for
    the memory it takes. On a GPU each kernel costs a launch, so that as many rows go together as are cheap to copy.
    """
    together = 1 if logits.device.type == "cpu" else max(1, _NUMBERS // logits[0].numel())
    parts = zip(logits.split(together), targets.split(together), strict=True)
    return torch.cat([-_token_losses(*part) for part in parts])


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[rows, tokens]."""
    flat = at_least_single(logits.flatten(0, 1)), targets.flatten()
    return cross_entropy(*flat, reduction="none").view(targets.shape)


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in float32, or wider where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits_at(network: Any, inputs: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """[rows, kept, vocabulary]: the logits at some positions, by their numbers; few models have no such choice."""
    # The last layer's output is indexed by them on its own device, to which nothing takes a tensor of the first one's.
    wanted = kept.tolist() if is_spread(network) else kept
    with changing_shapes(kept.device):
        logits: Tensor = network(**inputs, use_cache=False, logits_to_keep=wanted).logits
    return logits if logits.shape[1] == len(kept) else logits[:, kept.to(logits.device)]


def labelled_loss(network: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss over all labelled tokens, nats, and how many these are.

    Args:
        network: the model, perhaps with an adapter in training.
        inputs: its other inputs, such as `input_ids` and `attention_mask`, [rows, tokens].
        labels: [rows, tokens], `IGNORED` where a token carries no loss.
    """
    targets = labels[:, 1:]
    kept = (targets != IGNORED).any(0).nonzero().squeeze(-1)
    logits = _logits_at(network, inputs, kept)
    targets = targets[:, kept].to(logits.device)
    flat = at_least_single(logits).flatten(0, 1), targets.flatten()
    return cross_entropy(*flat, ignore_index=IGNORED, reduction="sum"), (targets != IGNORED).sum()
