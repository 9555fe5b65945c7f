"""A key-value cache whose rows come and go while the others stay where they are.

Rows end in the same column, the newest one, and so have padding on their left only. A sliding window over columns is
then a window over each row's own tokens. Storage is larger than what is in use: a pass writes one column and copies
nothing, and columns that no row needs any more fall off on the left.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from misdirection.models.caching import keeps_columns
from misdirection.models.chat_model import ChatModel
from misdirection.models.transfer import put_numbers

ROOM = 64
"""Columns that storage grows by."""


@dataclass
class _Window:
    """The part of the storage in use: rows [0, rows), columns [start, stop)."""

    rows: int
    start: int
    stop: int


class Columns:
    """What a pass of one token a row sees of a layer, [rows, heads, columns, size]; the last column is new."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new column and gives all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


class _Layer(DynamicLayer):
    """One layer's keys and values, [rows, heads, columns, size], of which a pass sees the window."""

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self._window = window

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.columns().update(key_states, value_states)

    def columns(self) -> Columns:
        window = self._window
        seen = (slice(window.rows), slice(None), slice(window.start, window.stop + 1))
        return Columns(self.keys[seen], self.values[seen])

    def get_seq_length(self) -> int:
        return self._window.stop - self._window.start


class RowCache:
    """Room for `rows` rows, whose prompts have up to `prompt` tokens.

    Sliding-window layers keep all columns: the model's own mask hides what is outside of the window.

    Args:
        few_sizes: a pass sees a multiple of `ROOM` columns; those on the left that are nobody's must be masked.

    Attributes:
        state: what a pass takes as its cache.
    """

    mixes = True
    """Rows of different prompts may be together."""

    def __init__(self, rows: int, prompt: int, few_sizes: bool = False) -> None:
        self.state = Cache(layers=[])
        self._capacity = rows
        self._few_sizes = few_sizes
        self._prompt = self._first(self._before_new(prompt))
        self._window = _Window(0, self._prompt, self._prompt)

    def enter(self, prefix: Cache, count: int) -> None:
        """`count` more rows, each with the keys and values of `prefix`, which has one row."""
        window = self._window
        if not self.state.layers:
            self.state.layers = [_Layer(window) for _ in prefix.layers]
        new = slice(window.rows, window.rows + count)
        for layer, source in zip(self.state.layers, prefix.layers, strict=True):
            if source.keys is None:
                # Of a layer that reads an image and does not run on text.
                continue
            if layer.keys is None:
                layer.keys = self._storage(source.keys, window.stop + ROOM)
                layer.values = self._storage(source.values, window.stop + ROOM)
            # A sliding-window layer of the prefix may hold fewer columns than others.
            columns = slice(window.stop - source.keys.shape[-2], window.stop)
            layer.keys[new, :, columns] = source.keys
            layer.values[new, :, columns] = source.values
        window.rows += count

    def keep(self, rows: list[int]) -> None:
        """Row i is from now on what row `rows[i]` was; only those that move are copied."""
        moves = [(new, old) for new, old in enumerate(rows) if new != old]
        self._window.rows = len(rows)
        if moves:
            columns = slice(self._window.start, self._window.stop)
            numbers = put_numbers(moves, self._used[0].keys.device)
            for layer in self._used:
                # Layers may be on several devices.
                new, old = numbers.to(layer.keys.device).unbind(-1)
                layer.keys[new, :, columns] = layer.keys[old, :, columns]
                layer.values[new, :, columns] = layer.values[old, :, columns]

    def make_room(self, longest: int) -> int:
        """Makes ready for a pass of one token per row; `longest` is the most tokens that a row has so far.

        Gives how many columns the pass sees before its own.
        """
        window, before = self._window, self._before_new(longest)
        if window.stop == self._used[0].keys.shape[-2] or window.stop < self._first(before):
            used, stop = slice(window.stop - longest, window.stop), max(self._first(before), self._prompt)
            for layer in self._used:
                layer.keys = self._moved(layer.keys, used, stop)
                layer.values = self._moved(layer.values, used, stop)
            window.stop = stop
        window.start = window.stop - before
        return before

    def advance(self) -> None:
        """A pass has run: its column is in use."""
        self._window.stop += 1

    def _before_new(self, columns: int) -> int:
        """So many columns; or so many more that with a new one they are a multiple."""
        return columns + (-(columns + 1) % ROOM if self._few_sizes else 0)

    def _first(self, before: int) -> int:
        """Which column may be the new one at first: to a compiler a view from the start of storage is another kind."""
        return before + 1 if self._few_sizes else before

    @property
    def _used(self) -> list[Any]:
        return [layer for layer in self.state.layers if layer.keys is not None]

    def _moved(self, old: Tensor, used: slice, stop: int) -> Tensor:
        new, rows = self._storage(old, stop + ROOM), self._window.rows
        new[:rows, :, stop - (used.stop - used.start) : stop] = old[:rows, :, used]
        return new

    def _storage(self, like: Tensor, columns: int) -> Tensor:
        # Zeros: a masked column has weight 0, and 0 times whatever the memory held need not be 0.
        return like.new_zeros(self._capacity, like.shape[1], columns, like.shape[-1])


class GroupCache:
    """The same for models whose layers keep more than columns (recurrent states): rows of one prompt at a time.

    All rows then have the same length, so that nothing is padded.
    """

    mixes = False

    def __init__(self, device: torch.device) -> None:
        self.state: Any = None
        self._device = device

    def enter(self, prefix: Cache | None, count: int) -> None:
        """`count` rows, each with the state of `prefix`, which has one row, if any; no other row may be here."""
        self.state = copy.deepcopy(prefix)
        self.keep([0] * count)

    def keep(self, rows: list[int]) -> None:
        """Row i is from now on what row `rows[i]` was."""
        if self.state is not None:
            self.state.reorder_cache(put_numbers(rows, self._device))

    def make_room(self, longest: int) -> int:
        """Nothing to do: the layers grow by themselves."""
        return longest

    def advance(self) -> None:
        """Nothing to do: the layers count by themselves."""


def row_cache(chat: ChatModel, rows: int, prompt: int, few_sizes: bool = False) -> RowCache | GroupCache:
    """The cache that fits a model; see `RowCache` for the other arguments."""
    return RowCache(rows, prompt, few_sizes) if keeps_columns(chat) else GroupCache(chat.device)
