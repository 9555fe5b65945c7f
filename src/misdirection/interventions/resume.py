"""Start a pass in the middle: what lies below an intervention is the same with and without it.

`record` keeps what some blocks give, `resume` gives it again in another pass over the same tokens and skips the blocks
below. A sweep over layers then computes each setting's own blocks only.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers.cache_utils import Cache

from misdirection.models.caching import keeps_columns, new_cache
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, replaced_forward, stream_of, stream_output

Recorded = dict[int, Any]
"""The output of a block by layer: a tensor [rows, tokens, width] or a tuple that begins with one; before any hook."""

_SKIPPED: WeakSet[nn.Module] = WeakSet()
"""Blocks that do not run now."""


def is_skipped(block: nn.Module) -> bool:
    """Whether a pass is resumed above this block, so that nothing inside of it runs."""
    return block in _SKIPPED


@contextlib.contextmanager
def record(chat: ChatModel, layers: Sequence[int]) -> Iterator[Recorded]:
    """Keep what the blocks of `layers` give in the one pass inside of the context."""
    kept: Recorded = {}

    def keep(layer: int) -> Callable[..., None]:
        def remember(module: nn.Module, _args: Any, output: Any) -> None:
            stream_output(module, output, (None, None, chat.width))
            kept[layer] = output

        return remember

    with hook_handles() as handles:
        for layer in layers:
            # First of all hooks: an intervention on this block acts again when the pass is resumed.
            handles.callback(chat.layers[layer].register_forward_hook(keep(layer), prepend=True).remove)
        yield kept


@contextlib.contextmanager
def resume(chat: ChatModel, layer: int, output: Any) -> Iterator[None]:
    """Passes inside of the context begin with `output`, as block `layer` gave it; the blocks below do not run.

    Hooks on these blocks do run. With a key-value cache, the skipped blocks keep its length and store nothing else.
    """
    with hook_handles() as undo:
        for number, block in enumerate(chat.layers[: layer + 1]):
            undo.enter_context(replaced_forward(block, _skip(number, output)))
            undo.callback(_SKIPPED.discard, block)
            _SKIPPED.add(block)
        yield


def repeated(output: Any, rows: int) -> Any:
    """`output` with all its rows again and again, to `rows` of them: the first, ..., the last, the first, ..."""
    if isinstance(output, tuple):
        return (repeated(output[0], rows), *output[1:])
    return output if len(output) == rows else output.repeat(rows // len(output), 1, 1)


def can_resume(chat: ChatModel) -> bool:
    """Whether every block has a layer of the cache of its own, which knows its length without having run."""
    return keeps_columns(chat) and len(new_cache(chat).layers) == len(chat.layers)


def _skip(number: int, output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # A block's parameter for it goes by several names; a decoder that was given no cache may have made one.
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            residual = stream_of(output)
            # The smallest keys and values there are: masks and positions come from the number of columns.
            nothing = torch.zeros(len(residual), 1, residual.shape[1], 1, dtype=residual.dtype, device=residual.device)
            cache.update(nothing, nothing, number)
        return output

    return forward
