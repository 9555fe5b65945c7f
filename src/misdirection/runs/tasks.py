"""Pieces of a run: some artifacts that are made together, by any process, from nothing but what the piece holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from misdirection.runs.folder import RunFolder
from misdirection.runs.worker import Worker

Compute = Callable[[Any, Mapping[str, Path]], None]
"""Called with the `Worker` where it is done and a folder to fill for each stage that is wanted, which may be some of
the task's. Pickled with all that it holds, where another process does it."""


@dataclass(frozen=True)
class Task:
    """Work that waits for nothing.

    Attributes:
        stages: the inputs of each artifact, by the stage's name.
        model: which model it needs, so that a process which has that model takes it first.
        compute: makes the artifacts.
        adapters: folders of the adapters that it needs, by the names under which it finds them at its place.
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
    """Makes pieces."""

    def make(self, pieces: Sequence[Task]) -> None:
        """Make those stages of the pieces that have no artifact that holds."""


@dataclass(frozen=True)
class LocalRunner:
    """Makes pieces in this process, one after another.

    Attributes:
        run: where the artifacts are kept.
        place: what the pieces are computed with.
    """

    run: RunFolder
    place: Worker

    def make(self, pieces: Sequence[Task]) -> None:
        """Make those stages of the pieces that have no artifact that holds."""
        for piece in pieces:
            self.place.adapters.update(piece.adapters)
            self.run.stages(piece.stages, partial(piece.compute, self.place))
