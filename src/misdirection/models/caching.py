"""What a model keeps of the tokens that have run, and whether rows of unequal length can go on from it."""

import inspect

from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import text_config

_BY_TOKEN = {DynamicLayer, DynamicSlidingWindowLayer}
"""Kinds of cache layers that hold keys and values by token and nothing else: no state into which padding would run."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


def new_cache(chat: ChatModel) -> DynamicCache:
    """An empty cache for the passes of `chat`."""
    return DynamicCache(config=text_config(chat.model))


def goes_on(chat: ChatModel) -> bool:
    """Whether each row of a batch can go on where its own tokens end, whatever padding the others need.

    It cannot where a layer keeps a recurrent state, where a block keeps more than the cache, or where positions are
    counted by the model and not given: rows are then run as a whole, padded on the right, where padding changes nothing
    that comes before it.
    """
    kinds = {type(layer) for layer in new_cache(chat).layers}
    return takes_positions(chat) and kinds <= {*_BY_TOKEN, DummyLayer}


def takes_positions(chat: ChatModel) -> bool:
    """Whether the caller says each token's place in its row."""
    return "position_ids" in inspect.signature(chat.decoder.forward).parameters


def keeps_columns(chat: ChatModel) -> bool:
    """Whether rows `goes_on` and every layer has keys and values of its own, by token."""
    return goes_on(chat) and {type(layer) for layer in new_cache(chat).layers} <= _BY_TOKEN


def window(chat: ChatModel) -> int | None:
    """How many tokens back the attention of some layer looks; None where all look back to the first."""
    config = text_config(chat.model)
    sizes = (getattr(config, name, None) for name in _WINDOWS)
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)
