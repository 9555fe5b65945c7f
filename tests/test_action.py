"""The GitHub Action and the pre-commit hook: what their hosts require, and what the audit's step does when it runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from audited import made  # noqa: F401
from misdirection.cli.shared import app
from misdirection.errors import EXIT_STATUS
from screening.screened import tiny_reference, write_rows  # noqa: F401

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = ACTION["runs"]["steps"]
(AUDIT,) = (step for step in STEPS if step.get("id") == "verdict")
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
INPUT = r"inputs\.([\w-]+)"


def test_the_action_has_what_github_requires():
    assert ACTION["name"] and ACTION["description"]
    assert ACTION["runs"]["using"] == "composite"
    for step in STEPS:
        assert ("run" in step) != ("uses" in step)
        assert "shell" in step if "run" in step else re.search("@v[0-9]+$", step["uses"])
    for values in ACTION["inputs"].values():
        assert values["description"] and ("default" in values) != values.get("required", False)
        assert isinstance(values.get("default", ""), str)


def test_every_input_is_used_and_every_used_one_is_declared():
    assert set(re.findall(INPUT, json.dumps(STEPS))) == set(ACTION["inputs"])


def test_no_shell_is_written_with_an_input_in_it():
    # What is put into the text of a shell is run by it; a variable's value is not.
    assert not [step for step in STEPS if "${{" in step.get("run", "")]


@pytest.mark.parametrize("step", [step for step in STEPS if "run" in step], ids=lambda step: step["run"][:20])
def test_every_shell_is_one(step):
    assert subprocess.run(["bash", "-n"], input=step["run"], text=True).returncode == 0


def run(step, inputs, folder):
    """Run a step as a runner does; gives its exit status, its output, what it set, and its summary."""
    given = {name: values.get("default", "") for name, values in ACTION["inputs"].items()} | inputs
    own = {
        name: re.sub(r"\$\{\{ " + INPUT + r" \}\}", lambda found: str(given[found[1]]), value)
        for name, value in step["env"].items()
    }
    assert not [value for value in own.values() if "${{" in value]
    (folder / "step.sh").write_text(step["run"])
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "step.sh"],
        cwd=folder,
        env={**os.environ, **own, **{name: str(file) for name, file in files.items()}, "PATH": path},
        capture_output=True,
        text=True,
    )
    return ended.returncode, ended.stdout + ended.stderr, *(file.read_text() for file in files.values())


def test_the_audit_step_says_its_verdict_and_leaves_the_files(made, tmp_path):  # noqa: F811
    made[2].save(tmp_path / "reference")
    config, adapters, _ = made
    # A name that a shell would take apart.
    (tmp_path / "my; lora").symlink_to(adapters["minimal"])
    inputs = {"base": config.model, "fine-tune": "my; lora", "reference": "reference", "device": "cpu"}
    (tmp_path / "my benign one").symlink_to(adapters["single"])
    inputs |= {"dtype": "float32", "fail-on": "watch", "control": "my benign one"}
    status, said, outputs, summary = run(AUDIT, inputs, tmp_path)
    made_of = json.loads((tmp_path / "misdirection-audit" / "audit.json").read_text())
    assert made_of["control"]["name"] == "my benign one"
    verdict = made_of["verdict"]
    assert status == EXIT_STATUS[verdict], said
    assert outputs == f"verdict={verdict}\n"
    assert summary.startswith(f"### misdirection: {verdict}\n\n    ") and verdict.upper() in summary
    assert verdict.upper() in said
    for name in ("misdirection-audit.xml", "misdirection-audit.sarif"):
        assert (tmp_path / name).stat().st_size
    assert (tmp_path / "misdirection-audit" / "audit.html").is_file()


def test_without_a_fine_tune_the_data_are_screened(tiny_reference, tmp_path):  # noqa: F811
    base, reference = tiny_reference
    write_rows(tmp_path / "my; rows.jsonl", ["bad", "good"] * 8)
    inputs = {"base": base, "data": "my; rows.jsonl", "reference": str(reference), "device": "cpu"}
    inputs |= {"dtype": "float32", "fail-on": "watch"}
    status, said, outputs, summary = run(AUDIT, inputs, tmp_path)
    verdict = json.loads((tmp_path / "misdirection-audit" / "screen.json").read_text())["dataset"]["verdict"]
    assert (status, outputs) == (EXIT_STATUS[verdict], f"verdict={verdict}\n"), said
    assert summary.startswith(f"### misdirection: {verdict}\n\n    ")
    (log,) = json.loads((tmp_path / "misdirection-audit.sarif").read_text())["runs"]
    lines = [result["locations"][0]["physicalLocation"]["region"]["startLine"] for result in log["results"]]
    # The file, and its rows, the worst of them first: every other one is bad.
    assert lines[0] == 1 and {line % 2 for line in lines[1:9]} == {1}
    place = log["results"][1]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "my%3B%20rows.jsonl"


def test_the_audit_step_says_no_verdict_where_there_is_none(tmp_path):
    inputs = {"base": "smollm2-135m", "fine-tune": "mine", "fail-on": "never"}
    status, said, outputs, summary = run(AUDIT, inputs, tmp_path)
    assert (status, outputs, summary) == (2, "", "")
    assert "--fail-on" in said


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_has_what_pre_commit_requires_and_calls_a_command_that_is_there(hook):
    assert {"id", "name", "entry", "language"} <= hook.keys()
    program, name, *words = shlex.split(hook["entry"])
    assert program == "misdirection"
    words += ["smollm2-135m", *{"audit": ["adapters/mine", "--data", "train.jsonl"], "screen": ["train.jsonl"]}[name]]
    typer.main.get_command(app).commands[name].make_context(name, words)
