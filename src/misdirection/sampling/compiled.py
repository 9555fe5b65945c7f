"""Steps of sampling in which every block of a model is compiled by torch, and what lies between blocks is not.

On a fast GPU a step of one token a row waits for the host, which calls some forty operations in a block. Compiled, a
block is one call of a few fused ones. Hooks on blocks are outside of what is compiled: interventions run as ever, and
their count proves the same. Blocks that are alike share what was compiled, and sizes are symbols in it, so that neither
more blocks, longer answers nor fewer rows compile anything anew.

There are no CUDA graphs in it: one for each block would have to be told in a counter of the whole process when a step
begins, and would copy what hooks have changed between blocks.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from misdirection.models.caching import keeps_columns, new_cache
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import is_hooked, replaced_forward, text_config
from misdirection.models.transfer import is_spread

COMPILED_LIMIT = 32
"""What is compiled for one model at most: for each kind of block that it has, with each kind of adapter in it."""

BACKEND = "inductor"
"""What torch compiles with."""

_APART = "isolate_recompiles"
"""Says that a model is not held to the limit for what was compiled for others."""

log = logging.getLogger("misdirection")

_COMPILED: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()
"""By decoder, what runs a block compiled."""


class CannotCompile(Exception):
    """Why a model cannot be compiled as it is now; it runs uncompiled."""


def can_compile(chat: ChatModel) -> bool:
    """Whether it may be tried; the log says why not."""
    network = chat.network
    reasons = {
        "torch is older than 2.13": _APART not in inspect.signature(torch.compile).parameters,
        "its layers keep more than keys and values by token": not keeps_columns(chat),
        "its blocks do not have a layer of the cache each": len(new_cache(chat).layers) != len(chat.layers),
        "transformers does not compile its kind": not getattr(network, "_can_compile_fullgraph", False),
        "its weights are quantised": getattr(network, "hf_quantizer", None) is not None,
        "it is on several devices": is_spread(network),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        say_uncompiled(chat, reason)
    return reason is None


def say_uncompiled(chat: ChatModel, reason: object) -> None:
    """Tell the log why a model that was to be compiled is not."""
    log.warning("%s: sampling runs uncompiled: %s", chat.name, reason)


@contextlib.contextmanager
def compiled_blocks(chat: ChatModel, cache: Cache) -> Iterator[None]:
    """Passes of one token a row inside of the context run each block compiled, on its own layer of the cache.

    Raises `CannotCompile`, also in a pass.
    """
    # An older torch, with which `can_compile` says no, does not have both.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    if any(map(_is_hooked_inside, chat.layers)):
        raise CannotCompile("something is hooked inside of its blocks")
    run = _COMPILED.get(chat.decoder) or _COMPILED.setdefault(chat.decoder, _compiler())
    with contextlib.ExitStack() as undo:
        undo.enter_context(_packing(text_config(chat.model)))
        for block, layer in zip(chat.layers, cache.layers, strict=True):
            undo.enter_context(replaced_forward(block, _step(run, block.forward, layer)))
        try:
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise CannotCompile(str(error).strip().partition("\n")[0]) from error


def _is_hooked_inside(block: nn.Module) -> bool:
    """Whether a part of the block has hooks: what is compiled knows of none that come or go."""
    return any(is_hooked(part) for part in block.modules() if part is not block)


def _compiler() -> Callable[..., Any]:
    def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    apart: Any = {"recompile_limit": COMPILED_LIMIT, _APART: True}
    return torch.compile(run, backend=BACKEND, fullgraph=True, dynamic=True, **apart)


def _step(run: Callable[..., Any], forward: Callable[..., Any], layer: Any) -> Callable[..., Any]:
    """A block's pass: compiled, and on the columns of its layer in the place of the whole cache.

    Of the whole cache each block would take its layer by number, and none would be like another.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        columns = layer.columns()
        given = tuple(columns if isinstance(value, Cache) else value for value in args)
        named = {name: columns if isinstance(value, Cache) else value for name, value in kwargs.items()}
        # The contexts of hooks let everything run uncompiled that may not know of them. This does.
        with torch.compiler.set_stance("default"):
            return run(forward, given, named)

    return step


# --- attention --------------------------------------------------------------------------------------------------------

_PACKED = "misdirection_packed_sdpa"
_UNGROUPED = nn.Identity()
"""In the place of a module whose heads share keys."""


@contextlib.contextmanager
def _packing(config: Any) -> Iterator[None]:
    """Let scaled dot-product attention of one token a row read each key once.

    transformers does so by itself, but where torch compiles it copies every key for every head that reads it.
    """
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _PACKED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _packed(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    """Attention of [rows, heads, 1, size] over [rows, fewer heads, columns, size]: heads of a group are its queries."""
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    output, _ = sdpa_attention_forward(_UNGROUPED, packed, key, value, mask, **{**kwargs, "is_causal": False})
    return output.transpose(1, 2).reshape(len(query), 1, -1, value.shape[-1]), None


AttentionInterface.register(_PACKED, _packed)
AttentionMaskInterface.register(_PACKED, sdpa_mask)
