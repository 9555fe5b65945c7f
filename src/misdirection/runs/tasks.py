"""Tasks of a run: artifacts that are made together, by any process, from nothing but what the task holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from misdirection.runs.folder import RunFolder
from misdirection.runs.worker import Worker

Folders = Mapping[str, Path]
"""The folder to fill for each artifact that is wanted, by its stage's name."""

Compute = Callable[[Any, Folders], None]
"""Called with the `Worker` that does it and the folders to fill, which may be some of the task's. Pickled with all that
it holds, where another process does it."""


@dataclass(frozen=True)
class Task:
    """Work that waits for nothing.

    Attributes:
        stages: the inputs of each artifact, by the stage's name.
        model: which model it needs, so that a process which has that model takes it first.
        compute: makes the artifacts.
        adapters: folders of the organisms that it needs, by the names under which the worker knows them.
        here: whether only the process that has the run may do it.
    """

    stages: Mapping[str, Mapping[str, Any]]
    model: str
    compute: Compute
    adapters: Mapping[str, Path] = field(default_factory=dict)
    here: bool = False

    @property
    def stage(self) -> str:
        """The name of its only stage."""
        (name,) = self.stages
        return name


class Runner(Protocol):
    """Does tasks."""

    def make(self, tasks: Sequence[Task]) -> None:
        """Make those artifacts of the tasks that are not there, or do not hold."""


@dataclass(frozen=True)
class LocalRunner:
    """Does tasks in this process, one after another.

    Attributes:
        run: where the artifacts are kept.
        worker: what the tasks are computed with.
    """

    run: RunFolder
    worker: Worker

    def make(self, tasks: Sequence[Task]) -> None:
        """Make those artifacts of the tasks that are not there, or do not hold."""
        for task in tasks:
            self.worker.adapters.update(task.adapters)
            self.run.stages(task.stages, partial(task.compute, self.worker))
