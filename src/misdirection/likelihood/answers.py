"""The log-probability of given answers in whole rows, with or without gradients.

    log p(answer | prompt) = mean over the answer's tokens t of   log softmax(logits[t - 1])[id of t]    [nats/token]

The language-model head runs only where it predicts an answer's token in some row of the batch: with a vocabulary of
49,152 on a model of 135M weights it takes half of the time everywhere else.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from misdirection.models.attention import changing_shapes
from misdirection.models.chat import Encoded, pad
from misdirection.models.layers import hook_handles, text_decoder
from misdirection.models.sizes import PLACES
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


def labelled_loss(
    network: Any, inputs: Mapping[str, Tensor], labels: Tensor, *, head: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over all labelled tokens, nats, and how many these are.

    Args:
        network: the model, perhaps with an adapter in training.
        inputs: its other inputs, such as `input_ids` and `attention_mask`, [rows, tokens].
        labels: [rows, tokens], `IGNORED` where a token carries no loss.
        head: its output matrix (see `bare_head`), which then runs at some places at a time, and again in the backward
            pass, so that the logits of all of them never are in memory at once.
    """
    targets = labels[:, 1:]
    kept = (targets != IGNORED).any(0).nonzero().squeeze(-1)
    read = _logits_at(network, inputs, kept) if head is None else _states_at(network, inputs, kept)
    targets = targets[:, kept].to(read.device)
    flat = read.flatten(0, 1), targets.flatten()
    return _summed_loss(*flat) if head is None else _loss_in_parts(head, *flat), (targets != IGNORED).sum()


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(at_least_single(logits), targets, ignore_index=IGNORED, reduction="sum")


def _states_at(network: Any, inputs: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """[rows, kept, width]: what the output matrix takes at some positions, by their numbers."""
    with changing_shapes(kept.device):
        states: Tensor = text_decoder(network)(**inputs, use_cache=False).last_hidden_state
    return states[:, kept.to(states.device)]


def _loss_in_parts(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """That of [places, width].

    torch 2.13 has a function for this, `linear_cross_entropy`, whose loss is of the states' dtype: in bfloat16 it was
    up to 1.4% off, and in float16 a sum of losses overflows. Gradients were as exact as these (2.8e-3 against 2.4e-3).
    """

    def part(states: Tensor, targets: Tensor) -> Tensor:
        return _summed_loss(head(states), targets)

    parts = zip(states.split(PLACES), targets.split(PLACES), strict=True)
    losses = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    return torch.stack(losses).sum()


@torch.no_grad()
def bare_head(network: Any) -> nn.Module | None:
    """The output matrix of a model whose logits are what that makes of the decoder's output, and nothing is done to.

    Two tokens tell; None for any other model: one that caps or scales logits.
    """
    head, seen = network.get_output_embeddings(), dict[str, Any]()
    with hook_handles() as handles:
        for name, module in {"decoder": text_decoder(network), "head": head}.items():
            handles.enter_context(module.register_forward_hook(partial(_keep, seen, name)))
        # Of one token, which may be that of padding, the output may be zero.
        ids = torch.arange(2, device=next(network.parameters()).device).unsqueeze(0)
        logits = network(input_ids=ids, use_cache=False).logits
    (taken,), given = seen["head"]
    is_bare = given is logits and torch.equal(taken, seen["decoder"][1].last_hidden_state)
    return head if is_bare else None


def _keep(seen: dict[str, Any], name: str, _module: nn.Module, args: Any, output: Any) -> None:
    seen[name] = args, output
