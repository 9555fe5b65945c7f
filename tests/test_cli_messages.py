"""Standard error belongs to us: no line of another library's in a whole experiment."""

import os
import subprocess
import sys

import yaml

from experiment.tiny_experiment import experiment


def test_a_whole_run_says_nothing_foreign(tiny_folder, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(experiment(tiny_folder, tmp_path)))
    command = [sys.executable, "-m", "misdirection.cli", "run", str(config), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MISDIRECTION_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if not ours(line)] == []


def ours(line):
    """A line of progress."""
    return " of " in line and ("/s, " in line or "left" in line or "took" in line)
