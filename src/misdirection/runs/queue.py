"""Tasks on their way to workers: which is next for whom, and what is tried again."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE

TRIES = 3
"""So often is a task tried before it is given up."""


@dataclass
class Share:
    """Some stages of a task, on their way to a worker.

    Attributes:
        task: the task.
        names: the stages.
        causes: why each try failed.
        failed_on: the worker of the last try.
    """

    task: Task
    names: tuple[str, ...]
    causes: list[str] = field(default_factory=list)
    failed_on: object = None

    def retries(self, cause: str, worker: object) -> list["Share"]:
        """The next tries after a failure: the same; then each of its stages alone; then none."""
        self.causes.append(cause)
        self.failed_on = worker
        if len(self.causes) < TRIES:
            return [self]
        return [Share(self.task, (name,)) for name in self.names] if len(self.names) > 1 else []


class Queue:
    """Shares that wait, by the model that they need."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Share]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, share: Share) -> None:
        """Put a share behind those of its model."""
        self._waiting.setdefault(share.task.model, deque()).append(share)

    def take(self, worker: "ActorHandle", alone: bool) -> Share | None:
        """The next share for a worker: of the model that it has, else of the one that most shares need.

        None when all that wait have failed on this worker and there are others.
        """
        own = self._waiting.get(worker.model, deque())
        others = sorted((shares for shares in self._waiting.values() if shares is not own), key=len, reverse=True)
        for shares in (own, *others):
            # Shares that failed here stand at the end, so that this looks at few.
            for number, share in enumerate(shares):
                if alone or share.failed_on is not worker:
                    del shares[number]
                    return share
        return None


@dataclass(eq=False)
class ActorHandle:
    """An actor, the model that it has loaded and the adapters that it has."""

    actor: Any
    model: str = BASE
    has: set[tuple[str, Path]] = field(default_factory=set)
