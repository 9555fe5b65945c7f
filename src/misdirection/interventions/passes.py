"""Passes one after another over the same rows, on a growing key-value cache, each row with its own interventions.

What many prompts begin with, such as a system turn, then runs once.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from misdirection.interventions.hooks import Setting, intervene_rows
from misdirection.models.attention import changing_shapes
from misdirection.models.caching import goes_on, new_cache
from misdirection.models.chat import pad
from misdirection.models.chat_model import ChatModel
from misdirection.models.transfer import put_numbers

Phase = Callable[[int, int], contextlib.AbstractContextManager[None]]
"""Gives the context of the forward pass of a phase (0 the shared start, 1 what follows, ...) with so many rows."""


@dataclass(frozen=True)
class Rows:
    """Token ids of each row of a pass, what is done to it if anything, and then how many tokens its prompt has."""

    ids: Sequence[Sequence[int]]
    settings: Sequence[Setting] = ()
    answer_starts: Sequence[int] = ()


class Passes:
    """The key-value cache of what has run, and which of its columns hold a real token.

    Of a model that does not `goes_on` from a cache there is one pass, without one. Padding on the right leaves column 0
    every row's first token, so that no query sees an empty row; on the left, the last column every row's last.
    """

    def __init__(
        self, chat: ChatModel, phase: Phase = lambda _number, _rows: contextlib.nullcontext(), side: str = "right"
    ) -> None:
        self.cache = new_cache(chat) if goes_on(chat) else None
        self._chat = chat
        self._phase, self._side = phase, side
        self._real: Tensor | None = None

    def run(self, number: int, network: Any, rows: Rows) -> tuple[Any, Tensor]:
        """Run `rows` after what has run; gives the network's output and which of the rows' tokens are real."""
        ids, mask = pad(rows.ids, self._chat.tokenizer.pad_token_id, self._chat.device, self._side)
        seen = mask[:, :0] if self._real is None else self._real
        self._real = torch.cat([seen, mask], -1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._real, "use_cache": self.cache is not None}
        if self.cache is not None:
            positions = (self._real.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs |= {"cache": self.cache, "position_ids": positions}
        with (
            changing_shapes(ids.device),
            self._phase(number, len(ids)),
            intervene_rows(self._chat, rows.settings, answer_starts=rows.answer_starts),
        ):
            return network(**inputs), mask

    def run_start(self, ids: Sequence[int], settings: Sequence[Setting]) -> None:
        """Run what all rows begin with, once for each distinct setting, and go on with a row for each of `settings`."""
        distinct = {id(setting): setting for setting in settings}
        # All of it belongs to the prompt, whichever row's answer comes first.
        start = Rows([ids] * len(distinct), list(distinct.values()), [len(ids)] * len(distinct))
        self.run(0, self._chat.decoder, start)
        self.select([list(distinct).index(id(setting)) for setting in settings])

    def select(self, rows: list[int]) -> None:
        """Go on with these rows of what has run; a row may come several times."""
        assert self._real is not None and self.cache is not None, "nothing has run yet on a cache"
        numbers = put_numbers(rows, self._real.device)
        # Unlike `batch_select_indices` it takes the numbers to the layers, which may be on several devices.
        self.cache.reorder_cache(numbers)
        self._real = self._real[numbers]


def shared_start(rows: Sequence[Sequence[int]], own: int) -> int:
    """How many first tokens all rows share, leaving each at least `own` of its own."""
    limit = min(len(row) for row in rows) - own
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return max(0, min(limit, sum(1 for _ in itertools.takewhile(bool, same))))
