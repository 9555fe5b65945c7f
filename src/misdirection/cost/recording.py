"""The passes that a model really runs, seen from outside: hooks on its decoder, its blocks and its head.

The same hooks record a real model and its stand-in, so that whatever runs a model can be counted on either.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from misdirection.cost.model_cost import Kind, Pass
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import decoder_layers, stream_of, text_decoder

Note = Callable[[Pass], None]
"""Takes a pass when it has run."""


class PassRecorder:
    """Watches a model, whatever adapter comes upon it later.

    Args:
        chat: the model.
        sizes: rows + columns of the weight that a module stands for, where its own is another.

    Attributes:
        passes: what has run since the list was last replaced.
    """

    def __init__(self, chat: ChatModel, sizes: Mapping[nn.Module, int] | None = None) -> None:
        self.passes: list[Pass] = []
        self._sizes = sizes or {}
        self._decoder = text_decoder(chat.model)
        self._blocks = decoder_layers(chat.model)
        self._adaptable = adaptable(self._decoder)
        self._running: Pass | None = None
        self._run = self._back = self._again = 0
        self._handles = [
            self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(block.register_forward_hook(self._block(block.__dict__.get("forward"))) for block in self._blocks),
            self._decoder.register_forward_hook(self._end),
        ]
        if (head := chat.model.get_output_embeddings()) is not None:
            self._handles.append(head.register_forward_hook(self._head))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def adapter_weights(self) -> int:
        """How many weights the adapters that act now have."""
        layers = [layer for layer in lora_layers(self._adaptable) if not layer.disable_adapters]
        return sum(
            layer.r[name] * (self._sizes.get(layer.base_layer) or sum(layer.base_layer.weight.shape))
            for layer in layers
            for name in layer.active_adapters
            if name in layer.lora_A
        )

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, columns = (kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]).shape
        keys = kwargs.get("cache")
        seen = keys.get_seq_length() if keys is not None else 0
        kind: Kind = "training" if decoder.training else "forward"
        self._running = Pass(rows, columns, seen, lora=self.adapter_weights(), kind=kind)
        self._run = self._back = self._again = 0

    def _block(self, own: Any) -> Callable[..., None]:
        def ran(block: nn.Module, _args: Any, output: Any) -> None:
            # A pass that is resumed has another forward in the blocks that it skips.
            if block.__dict__.get("forward") is not own or self._running is None:
                return
            residual = stream_of(output)
            self._run += 1
            self._back += residual.requires_grad
            # A checkpointed block runs again in the backward pass, inside of its own forward.
            self._again += residual.requires_grad and block.training and getattr(block, "gradient_checkpointing", False)

        return ran

    def _end(self, _decoder: nn.Module, _args: Any, _output: Any) -> None:
        assert self._running is not None, "the pass has begun"
        self.passes.append(replace(self._running, blocks=self._run, back=self._back, recomputed=self._again))
        self._running = None

    def _head(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        # Where a head is looked through alone, nothing has run before it.
        if self.passes:
            self.passes[-1] = replace(self.passes[-1], head=args[0].shape[:-1].numel())


@contextlib.contextmanager
def record_passes(chat: ChatModel) -> Iterator[list[Pass]]:
    """The passes that `chat` runs inside of the context."""
    recorder = PassRecorder(chat)
    try:
        yield recorder.passes
    finally:
        recorder.close()


Sites = list[tuple[nn.Module, str]]
"""Modules that an adapter may come upon, each as its parent and its name there."""


def adaptable(module: nn.Module) -> Sites:
    """All modules below this one that have a matrix; for one that is adapted already, the adapted one."""
    return [
        (parent, name)
        for parent in module.modules()
        if not isinstance(parent, LoraLayer)
        for name, child in parent.named_children()
        if isinstance(child, LoraLayer) or getattr(getattr(child, "weight", None), "ndim", 0) == 2
    ]


def modules_at(sites: Sites) -> list[Any]:
    """The modules that are there now."""
    # Not by `get_submodule`, which takes most of a pass: this is asked for every block of every pass.
    return [getattr(parent, name) for parent, name in sites]


def lora_layers(sites: Sites) -> list[Any]:
    """The adapted modules among them, as PEFT's layers."""
    return [module for module in modules_at(sites) if _is_lora(module.__class__)]


@cache
def _is_lora(kind: Any) -> bool:
    """PEFT's classes are abstract ones, whose own question takes longer."""
    return issubclass(kind, LoraLayer)
