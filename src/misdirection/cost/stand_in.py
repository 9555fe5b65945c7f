"""A model's stand-in: the same modules in the same places, so narrow that it runs at once and holds nothing.

Whatever runs a model (sweeps on a key-value cache, hooks, passes that begin in the middle, adapters, gradients by their
outputs) runs on its stand-in, with the same passes. What it computes is not what the model would: a token has a vector
of its own, blocks hand it on, adapters add to it where something listens to them, and every pass has noise of its own,
so that no two figures are the same by design.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from misdirection.cost.recording import Sites, adaptable, lora_layers, modules_at
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import decoder_layers, is_hooked, text_config, text_decoder

WIDTH = 8
"""Of the stand-in's residual stream; what is wider or thinner in the model is so in its stand-in."""

VOCABULARY = 256

_WIDER, _THINNER = 12, 4

_NOISE = 1e-3
"""Of the residual stream in every pass: differences of two models' activations have a direction, too."""


@dataclass(frozen=True)
class StandIn:
    """The network that runs in a model's stead.

    Attributes:
        chat: the narrow model, on the processor, with a tokenizer of few ids.
        sizes: rows + columns of the model's own weight, by module.
    """

    chat: ChatModel
    sizes: Mapping[nn.Module, int]


def stand_in(chat: ChatModel) -> StandIn:
    """Make a model on the device `meta` into its stand-in; the model itself is gone."""
    network: Any = chat.model
    sizes = _narrow(network, chat.width, len(network.get_input_embeddings().weight))
    text_config(network).hidden_size = WIDTH
    blocks, decoder = decoder_layers(network), text_decoder(network)
    for number, block in enumerate(blocks):
        block.forward = _block_forward(number, adaptable(block))
    forward = _decoder_forward(blocks)
    # Whether a decoder is told each token's place is read off what it takes.
    forward.__signature__ = inspect.signature(decoder.forward)  # type: ignore[attr-defined]
    decoder.forward = forward
    network.forward = _model_forward(decoder, network.get_output_embeddings())
    return StandIn(ChatModel(network.eval(), FewTokens(chat.tokenizer), chat.name, chat.revision), sizes)


def _narrow(network: nn.Module, width: int, vocabulary: int) -> dict[nn.Module, int]:
    """Put small random weights in place of all; gives the sizes of the matrices that were there."""
    generator, sizes = torch.Generator().manual_seed(0), {}

    def smaller(size: int) -> int:
        if size in (width, vocabulary):
            return WIDTH if size == width else VOCABULARY
        return _WIDER if size > width else _THINNER

    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if name == "weight" and weight.ndim == 2:
                sizes[module] = sum(weight.shape)
            values = torch.randn(*map(smaller, weight.shape), generator=generator)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        # Nothing reads them, and whoever takes the network to a device finds none that is without values.
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(1))
        # What torch's modules and those of transformers know of their weights' sizes.
        for name in ("in_features", "out_features", "nx", "nf"):
            if isinstance(size := getattr(module, name, None), int):
                setattr(module, name, smaller(size))
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(map(smaller, module.normalized_shape))
    return sizes


def _block_forward(number: int, sites: Sites) -> Callable[..., Tensor]:
    def forward(residual: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            # The smallest keys and values there are: a cache knows its length by them.
            nothing = residual.new_zeros(len(residual), 1, residual.shape[1], 1)
            cache.update(nothing, nothing, number)
        if torch.is_grad_enabled() and not residual.requires_grad:
            # A gradient goes through every block from the lowest one on that is trained.
            residual = residual + sum(weight.sum() * 0 for weight in _own_trained(sites))
        for layer in lora_layers(sites):
            if _heard(layer) or _teaches(layer, residual):
                added = layer(_resized(residual, layer.in_features))
                residual = residual + _resized(added, WIDTH)
        return residual

    return forward


def _heard(layer: Any) -> bool:
    """Whether anything listens to an adapted module, or to its adapter."""
    return any(map(is_hooked, (layer, *layer.lora_B.values())))


def _teaches(layer: Any, residual: Tensor) -> bool:
    """Whether an adapted module is the first by which a gradient is asked for."""
    if residual.requires_grad or not torch.is_grad_enabled() or layer.disable_adapters:
        return False
    return any(weight.requires_grad for module in layer.lora_B.values() for weight in module.parameters())


def _own_trained(sites: Sites) -> list[Tensor]:
    """The weights of a block's own modules that are trained."""
    weights = [getattr(module, "weight", None) for module in modules_at(sites)]
    return [weight for weight in weights if weight is not None and weight.requires_grad]


def _resized(x: Tensor, size: int) -> Tensor:
    return pad(x, (0, size - x.shape[-1]))


def _decoder_forward(blocks: list[nn.Module]) -> Callable[..., Any]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(VOCABULARY, WIDTH, generator=generator)

    def forward(input_ids: Tensor, cache: Any = None, **_others: Any) -> Any:
        residual = vectors[input_ids] + _NOISE * torch.randn(WIDTH, generator=generator)
        for block in blocks:
            residual = block(residual, cache=cache)
        return SimpleNamespace(last_hidden_state=residual)

    return forward


def _model_forward(decoder: nn.Module, head: nn.Module) -> Callable[..., Any]:
    generator = torch.Generator().manual_seed(0)

    def forward(*, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Any:
        residual = decoder(**inputs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=head(residual[:, kept]) + torch.randn(VOCABULARY, generator=generator))

    return forward


class FewTokens:
    """A tokenizer's ids, numbered as they come and again from the start when the numbers are used up.

    Text has as many tokens as with the tokenizer, and texts begin alike where they did.
    """

    pad_token_id = eos_token_id = 0
    bos_token_id = None
    added_tokens_decoder: Mapping[int, Any] = {}

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[int, int] = {}
        self._encoded = lru_cache(None)(self._encode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        """Ids and, where they are asked for, offsets."""
        return self._encoded(text, *options.items())

    def _encode(self, text: str, *options: tuple[str, Any]) -> dict[str, list[Any]]:
        tokens = dict(self._tokenizer(text, **dict(options)))
        return tokens | {"input_ids": [self._number(token) for token in tokens["input_ids"]]}

    def _number(self, token: int) -> int:
        return self._numbers.setdefault(token, 1 + len(self._numbers) % (VOCABULARY - 1))

    def decode(self, ids: list[int], **_options: Any) -> str:
        """Words that stand for the tokens."""
        return " ".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """A word for each id."""
        return [f"token-{number}" for number in ids]
