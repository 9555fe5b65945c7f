"""Many who ask one at a time, answered together: Inspect runs samples side by side, models and judges take batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Generic, TypeVar, cast

import anyio
from anyio import to_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

PAUSE = 0.05
"""Seconds without another item after which a batch is begun."""


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    result: Result | None = None
    error: Exception | None = None
    is_done: bool = False


class Gatherer(Generic[Item, Result]):
    """Gathers what is asked for at the same time, and has it answered in one call, in a thread of its own.

    Whoever asks first leads: it waits until nothing more comes in, and answers for all. What is asked meanwhile is the
    next batch.

    Args:
        answer: gives the result of each item, in their order; what it raises, everybody in the batch gets.
    """

    def __init__(self, answer: Callable[[list[Item]], Sequence[Result]]) -> None:
        self._answer = answer
        self._waiting: list[_Entry[Item, Result]] = []
        self._turn = anyio.Lock()
        # A leader that is cancelled leaves its thread behind, which must end before the next one begins.
        self._work = Lock()

    async def ask(self, item: Item) -> Result:
        """The result of one item."""
        entry: _Entry[Item, Result] = _Entry(item)
        self._waiting.append(entry)
        try:
            async with self._turn:
                if not entry.is_done:
                    await self._lead()
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.error is not None:
            raise entry.error
        return cast(Result, entry.result)

    async def _lead(self) -> None:
        """Answers all that wait; of a leader that is cancelled meanwhile, they wait for the next one."""
        size = 0
        while len(self._waiting) > size:
            size = len(self._waiting)
            await anyio.sleep(PAUSE)
        batch = list(self._waiting)
        await to_thread.run_sync(partial(self._run, batch), abandon_on_cancel=True)
        self._waiting = [entry for entry in self._waiting if not entry.is_done]

    def _run(self, batch: list[_Entry[Item, Result]]) -> None:
        with self._work:
            batch = [entry for entry in batch if not entry.is_done]
            try:
                results = self._answer([entry.item for entry in batch])
            except Exception as error:
                for entry in batch:
                    entry.error = error
            else:
                for entry, result in zip(batch, results, strict=True):
                    entry.result = result
            for entry in batch:
                entry.is_done = True
