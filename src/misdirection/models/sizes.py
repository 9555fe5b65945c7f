"""The sizes of a model that its costs depend on, and the memory that one token takes (formulae: `cost.model_cost`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import decoder_layers, text_config

TRAINED_BYTES = 16
"""Of a weight in training: itself, its gradient and the two moments of Adam, in float32."""

PLACES = 512
"""At so many places at a time the output matrix runs where activations are checkpointed on a GPU."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        parameters: all of them.
        stored: weights of the blocks' matrices.
        active: those that one token passes.
        head: weights of the output matrix.
        vocabulary: its rows.
        attention: heads x head size, summed over blocks.
        cached: numbers that the key-value cache keeps for one token.
        inner: width of the MLP, of all experts that a token is sent to.
        bytes: of one weight.
    """

    layers: int
    width: int
    parameters: int
    stored: int
    active: float
    head: int
    vocabulary: int
    attention: int
    cached: int
    inner: int
    bytes: int

    @classmethod
    def of(cls, chat: ChatModel, weight_bytes: int) -> "Shape":
        """Of a model that may be without data (device meta)."""
        config, blocks = text_config(chat.model), decoder_layers(chat.model)
        # A model without attention keeps a state of one size.
        heads = getattr(config, "num_attention_heads", None) or 0
        head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        keys = getattr(config, "num_key_value_heads", None) or heads
        matrix = chat.model.get_output_embeddings().weight
        return cls(
            layers=len(blocks),
            width=chat.width,
            parameters=sum(weight.numel() for weight in chat.model.parameters()),
            stored=sum(weight.numel() for block in blocks for weight in block.parameters() if weight.ndim > 1),
            active=sum(_active(blocks, config)),
            head=matrix.numel(),
            vocabulary=len(matrix),
            attention=len(blocks) * heads * head_size,
            cached=len(blocks) * 2 * keys * head_size,
            inner=_inner(config),
            bytes=weight_bytes,
        )

    @property
    def token_bytes(self) -> float:
        """Activations that one token takes in a forward pass: those of one block at a time."""
        return (4 * self.width + 3 * self.inner) * self.bytes

    def kept_bytes(self, blocks: int, *, checkpointed: bool = False) -> float:
        """Those that one token keeps for a backward pass through so many blocks.

        Checkpointed, each of them keeps its input, and one at a time the rest.
        """
        keys = self.cached / self.layers
        one = (6 * self.width + 4 * self.inner + 2 * keys) * self.bytes + 16 * self.width
        return one + blocks * self.width * self.bytes if checkpointed else blocks * one

    @property
    def logit_bytes(self) -> float:
        """The logits at one place, and their float32 copies."""
        return self.vocabulary * (self.bytes + 8)

    @property
    def logit_bytes_back(self) -> float:
        """The same with what a backward pass needs of them."""
        return self.vocabulary * (self.bytes + 12)


def _experts(config: Any) -> tuple[int, int]:
    """How many experts a mixture has, and to how many a token is sent; (1, 1) for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((found for name in names if (found := getattr(config, name, None))), 1)
    return count, getattr(config, "num_experts_per_tok", None) or 1


def _active(blocks: Sequence[nn.Module], config: Any) -> Iterator[float]:
    """Of each matrix of the blocks, the weights that one token passes."""
    count, chosen = _experts(config)
    for block in blocks:
        for name, one in block.named_parameters():
            routed = count > 1 and "experts" in name.split(".")
            if one.ndim > 1:
                yield one.numel() * (chosen / count if routed else 1)


def _inner(config: Any) -> int:
    _, chosen = _experts(config)
    routed = getattr(config, "moe_intermediate_size", None)
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return int(chosen * (routed or dense))
