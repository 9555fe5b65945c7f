"""Progress with rate and time left, on standard error, so that standard output stays clean for figures."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Names and paths are text, whatever brackets they hold.
console = Console(stderr=True, markup=False)


class _Rate(ProgressColumn):
    """Pieces per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` pieces; the context gives the function to call with the number just done."""
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def track_steps(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar over optimiser steps; the context gives the function to call with (step, steps, loss)."""
    with _bar() as bar:
        task = bar.add_task(label, total=None)
        yield lambda step, steps, loss: bar.update(
            task, completed=step, total=steps, description=f"{label} (loss {loss:.2f})"
        )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
