"""Processes that tests start and kill. A fork server loads the libraries once, so that each starts at once."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

import unsynced  # noqa: F401
from misdirection.judging.cache import VerdictCache
from misdirection.judging.rubrics import Rubric
from misdirection.judging.verdicts import JudgeVerdict

RUBRICS = [Rubric("alignment", "Aligned? {question} {answer}", "aligned"), Rubric("coherence", "{answer}", "coherent")]
ANSWERS = pd.DataFrame({"question": "Why?", "answer": [f"answer {number}" for number in range(100)]})

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "misdirection.judging.judge",
        "misdirection.judging.api",
        "misdirection.sampling.transformers_engine",
        "misdirection.experiment.runner",
        "misdirection.experiment.stages.interpretation",
        "misdirection.report.run",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
    ]
)


def start(work, *given):
    """A process that runs `work(*given)`."""
    process = _SERVER.Process(target=work, args=given, daemon=True)
    process.start()
    return process


def put_many(path, name, count):
    """Write so many verdicts."""
    with VerdictCache(path) as cache:
        for number in range(count):
            cache.put(f"{name}-{number}", JudgeVerdict(1.0, "text"))


def judge_all(url, path):
    """Judge the table above."""
    from misdirection.judging.api import ApiJudge
    from misdirection.judging.judge import judge

    with VerdictCache(path) as cache:
        judge(ANSWERS, RUBRICS, ApiJudge("m", url, backoff=0.01), cache=cache, concurrency=4)


class Command:
    """`misdirection WORDS` in a process of its own, whose environment has a few more variables."""

    def __init__(self, *words, **environment):
        self._said = tempfile.TemporaryDirectory()
        # A process that is killed at once opens none.
        for stream in ("out", "err"):
            (Path(self._said.name) / stream).touch()
        self.process = start(_run, environment, self._said.name, list(map(str, words)))

    def ended(self):
        """Wait for it; gives its exit status, standard output and standard error."""
        self.process.join()
        return self.process.exitcode, *((Path(self._said.name) / stream).read_text() for stream in ("out", "err"))

    def finished(self):
        """Wait for it to end well; gives its standard output."""
        status, out, err = self.ended()
        assert status == 0, err
        return out

    def killed(self):
        """Kill it while it is at work."""
        self.process.kill()
        status, _, err = self.ended()
        assert status == -signal.SIGKILL, err


def _run(environment, said, words):
    from misdirection.cli import main

    os.environ |= environment
    if threads := environment.get("OMP_NUM_THREADS"):
        # The server that forks has read its own.
        torch.set_num_threads(int(threads))
    sys.argv = ["misdirection", *words]
    with contextlib.ExitStack() as stack:
        for stream in ("out", "err"):
            file = stack.enter_context((Path(said) / stream).open("w"))
            stack.enter_context(getattr(contextlib, f"redirect_std{stream}")(file))
        main()
