"""Processes that tests start and kill. A fork server loads the libraries once, so that each starts at once."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import pandas as pd

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


def command(environment, said, words):
    """Run `misdirection WORDS`; what it prints goes to the file `said`."""
    from misdirection.cli import main

    os.environ |= environment
    sys.argv = ["misdirection", *words]
    with Path(said).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        main()
