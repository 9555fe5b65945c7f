"""Sizes of a model's residual stream: how long an activation is at each layer, and which channels are giants.

A few channels of most models are some ten times as large as all others on every token (massive activations, Sun et al.
2024). A direction that lies along one says more of the model's own scale than of what it was extracted for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from misdirection.interventions.resume import record
from misdirection.models.attention import changing_shapes
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import stream_of

GIANT = 10.0
"""Mean size of a giant channel, as a multiple of the median channel's."""


@dataclass(frozen=True, eq=False)
class ResidualSizes:
    """Mean sizes at the output of each block, over tokens of some texts.

    Attributes:
        norms: [layers], of a token's activation; each text's first token, an attention sink, is left out.
        channels: [layers, width], |activation| of each channel over the same tokens.
        first: [layers, width], activation of the first token.
    """

    norms: Tensor
    channels: Tensor
    first: Tensor

    def giants(self, layer: int) -> list[int]:
        """The channels of one layer that are more than `GIANT` times as large as the median channel, largest first."""
        sizes = self.channels[layer]
        order: list[int] = sizes.argsort(descending=True).tolist()
        return order[: int((sizes > GIANT * sizes.median()).sum())]


@torch.inference_mode()
def residual_sizes(chat: ChatModel, rows: Sequence[Encoded]) -> ResidualSizes:
    """Runs the model on each row alone, and keeps sums only."""
    totals = ResidualSizes(
        torch.zeros(len(chat.layers), dtype=torch.float64),
        *(torch.zeros(len(chat.layers), chat.width, dtype=torch.float64) for _ in range(2)),
    )
    for row in rows:
        with changing_shapes(chat.device), record(chat, range(len(chat.layers))) as kept:
            chat.decoder(input_ids=torch.tensor([row.ids], device=chat.device), use_cache=False)
        for layer, output in kept.items():
            residual = stream_of(output)[0].double().cpu()
            totals.first[layer] += residual[0]
            totals.norms[layer] += residual[1:].norm(dim=-1).sum()
            totals.channels[layer] += residual[1:].abs().sum(0)
    tokens = sum(len(row.ids) - 1 for row in rows)
    return ResidualSizes(totals.norms / tokens, totals.channels / tokens, totals.first / len(rows))
