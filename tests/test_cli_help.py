"""What `--help` and `--version` say, and how soon."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from misdirection.cli.groups import GROUPS, command_name
from misdirection.cli.shared import app

EXAMPLES = {name: example for commands in GROUPS.values() for name, example in commands.items()}


def test_every_command_is_in_a_group():
    assert {command_name(command) for command in app.registered_commands} == EXAMPLES.keys()


def test_help_shows_the_groups_in_their_order(call):
    status, out, _ = call("--help")
    assert status == 0
    shown = [out.index(f"─ {group} ─") for group in GROUPS]
    assert shown == sorted(shown)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_commands_own_help_has_an_example_that_parses(call, name):
    status, out, _ = call(name, "--help")
    assert status == 0
    shown = " ".join(out.replace("│", " ").split())
    assert f"Example: {EXAMPLES[name]}" in shown
    program, *words = shlex.split(EXAMPLES[name])
    assert (program, words[0]) == ("misdirection", name)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, words[1:])


def test_the_version_is_the_packages(call):
    assert call("--version")[:2] == (0, f"misdirection {version('misdirection')}\n")


def imported_by(code):
    script = f"import json, sys; {code}; print(json.dumps(sorted(sys.modules)))"
    return json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("code", ["import misdirection", "import misdirection.cli"])
def test_neither_help_nor_the_package_imports_what_is_slow(code):
    heavy = {"torch", "transformers", "pydantic", "pandas", "numpy", "scipy", "sklearn"}
    assert heavy.isdisjoint(imported_by(code))


@pytest.mark.parametrize("module", ["runs.actor", "runs.ray_workers", "organisms.recipe", "judging.config"])
def test_a_worker_and_a_configuration_begin_without_the_model_libraries(module):
    assert {"torch", "transformers", "peft", "scipy"}.isdisjoint(imported_by(f"import misdirection.{module}"))
