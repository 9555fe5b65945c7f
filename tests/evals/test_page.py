"""What docs/inspect.md shows: its task runs, and its commands name options that there are."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from inspect_ai.model import get_model

from misdirection.cli.shared import app
from misdirection.evals import tasks
from misdirection.evals.provider import ModelOptions

PAGE = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]


def test_its_task_runs_on_our_model(evaluate, tiny_folder, tmp_path):
    (tmp_path / "task.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    model = get_model(f"misdirection/{tiny_folder}", dtype="float32", device="cpu", memoize=False)
    log = evaluate("task.py", model, max_tokens=4)
    assert log.results.completed_samples == 3 and "accuracy" in log.results.scores[0].metrics


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("misdirection ")])
def test_our_commands_parse(line):
    _, name, *words = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, words)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("inspect eval")])
def test_the_options_of_evals_are_known(line):
    words = shlex.split(line)
    given = {
        flag: dict(word.split("=", 1) for before, word in pairwise(words) if before == flag) for flag in ("-M", "-T")
    }
    assert given["-M"].keys() <= ModelOptions.model_fields.keys()
    if words[2].startswith("misdirection/"):
        known = getattr(tasks, words[2].removeprefix("misdirection/")).__wrapped__.__code__.co_varnames
        assert given["-T"].keys() <= set(known)
