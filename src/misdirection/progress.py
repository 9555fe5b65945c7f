"""Progress with rate and time left, on standard error, so that standard output stays clean for figures.

A terminal and a notebook show a bar; anything else, such as a file or a job's log, gets a plain line now and then.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

# Names and paths are text, whatever brackets they hold.
console = Console(stderr=True, markup=False)


def notice(text: str, style: str | None = None) -> None:
    """Tell the user one line on standard error, however long, as it stands."""
    console.print(text, style=style, highlight=False, soft_wrap=True)


EVERY = 30.0
"""Seconds between two plain lines, whatever they are about: many short parts of a long work are told of, too."""

_last_line = time.monotonic()


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress over `total` items; the context gives the function to call with the number just done."""
    with _shown(label, total) as show:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(label, done, total)

        yield advance


Advance = Callable[[int], None]
"""Called with the number of items just done."""


def untold(_done: int) -> None:
    """The `Advance` of work whose progress somebody else shows."""


def shown(progress: Advance | None, label: str, total: int) -> AbstractContextManager[Advance]:
    """The caller's own `progress`; where there is none, `track`."""
    return track(label, total) if progress is None else contextlib.nullcontext(progress)


@contextlib.contextmanager
def track_steps(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """Progress over optimiser steps; the context gives the function to call with (step, steps, loss)."""
    with _shown(label, None) as show:
        yield lambda step, steps, loss: show(f"{label} (loss {loss:.2f})", step, steps)


Show = Callable[[str, int, int], None]
"""Called with the label, the number done and the number in all."""


@contextlib.contextmanager
def _shown(label: str, total: int | None) -> Iterator[Show]:
    if not (console.is_terminal or console.is_jupyter):
        yield _plain_lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Times())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _plain_lines() -> Show:
    """Prints a line where the last one is `EVERY` seconds ago, and one at the end of work that had a line before."""
    started = time.monotonic()
    is_told = False

    def show(label: str, done: int, total: int) -> None:
        nonlocal is_told
        global _last_line
        now = time.monotonic()
        if now - _last_line >= EVERY or (is_told and done >= total):
            _last_line, is_told = now, True
            times = _times(now - started, done / max(now - started, 1e-9), total - done)
            notice(f"{label}: {done} of {total}, {times}")

    return show


class _Times(ProgressColumn):
    """Rate, time so far and time left; at the end the time it took."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed if task.finished else task.speed
        return Text(_times(task.elapsed or 0.0, speed, task.remaining), style="progress.remaining")


def _times(elapsed: float, speed: float | None, remaining: float | None) -> str:
    rate = f"{speed:.1f}/s, " if speed else ""
    if remaining is not None and remaining <= 0:
        return f"{rate}took {_clock(elapsed)}"
    left = f", {_clock(remaining / speed)} left" if speed and remaining else ""
    return f"{rate}{_clock(elapsed)}{left}"


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Neither progress nor warnings of this package, for work that only looks like what it is named after."""
    log = logging.getLogger("misdirection")
    quiet, level = console.quiet, log.level
    console.quiet = True
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        console.quiet = quiet
        log.setLevel(level)
