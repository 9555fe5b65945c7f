"""Timing of several ways to do one thing, side by side in one process."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way over so many rounds, in turn; run each once before, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(way: Callable[[], object]) -> float:
    """Seconds of one run, until a GPU has done all of it."""
    finish()
    started = time.perf_counter()
    way()
    finish()
    return time.perf_counter() - started


def finish() -> None:
    """Wait until a GPU, if there is one, has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
