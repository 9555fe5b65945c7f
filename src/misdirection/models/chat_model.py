"""A chat model in memory: the network, its tokenizer, and what they were loaded from."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from misdirection.errors import InputError
from misdirection.models.base_weights import BaseWeights
from misdirection.models.layers import decoder_layers, text_config, text_decoder


@dataclass(frozen=True, repr=False)
class ChatModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: the transformers model, or the PEFT model around it.
        tokenizer: its tokenizer, with a chat template.
        name: the base model as the user named it.
        revision: the hub revision asked for, if any.
        adapter: where the adapter came from, if there is one, or the weights of a whole fine-tune.
        base: the base as it was before these came; None without them, or where they were attached elsewhere.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    adapter: str | None = None
    base: BaseWeights | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        adapter = f" + {self.adapter}" if self.adapter else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ChatModel({self.name}{adapter}: {len(self.layers)} layers x {self.width}, {dtype}, {self.device})"

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder blocks, first to last."""
        return decoder_layers(self.model)

    @cached_property
    def layer_paths(self) -> list[str]:
        """Their paths in `network`."""
        paths = {module: path for path, module in self.network.named_modules()}
        return [paths[block] for block in self.layers]

    @cached_property
    def decoder(self) -> nn.Module:
        """The text decoder: embeddings, blocks and final norm, without the language-model head."""
        return text_decoder(self.model)

    @property
    def network(self) -> Any:
        """The transformers model, below PEFT's wrapper; paths of modules are paths in it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where token ids must be put."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def is_switched_off(self) -> bool:
        """Whether the model is its base for now, as inside of `as_base`."""
        if self.base and not self._has_adapter:
            return self.base.is_in_place
        # A network of transformers has a method of the name.
        return any(getattr(module, "disable_adapters", None) is True for module in self.network.modules())

    @property
    def _has_adapter(self) -> bool:
        """Whether PEFT's wrapper is around the network."""
        return hasattr(self.model, "disable_adapter")

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Be the base for the length of the context, to the last bit; nothing to do for a model without adapter.

        Raises `InputError` for a whole fine-tune that was loaded without its base.
        """
        if self.adapter and not (self._has_adapter or self.base):
            raise InputError(f"{self.adapter}: its base is not in memory: give it as the adapter of its base")
        with contextlib.ExitStack() as stack:
            if self.adapter and self._has_adapter:
                stack.enter_context(self.model.disable_adapter())
            if self.base:
                stack.enter_context(self.base.in_place())
            yield

    def without_adapter(self) -> "ChatModel":
        """Take the adapter off for good: the base, to the last bit. This object is of no use afterwards."""
        if not self.adapter:
            return self
        network = self.network
        # Some kinds of adapters cannot be unloaded, but what they put into the base can be taken out.
        if self._has_adapter and hasattr(self.model.base_model, "unload"):
            network = self.model.unload()
        if self.base:
            self.base.restore()
        return replace(self, model=network, adapter=None, base=None)
