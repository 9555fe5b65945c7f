import logging
import random
import subprocess
import sys
import time

import pytest

from misdirection.errors import MisdirectionError
from misdirection.experiment.store import Run
from misdirection.files import sha256_tree

# Five stages, each from the one before, slow enough to be killed in the middle.
SCRIPT = """
import sys, time
from pathlib import Path
from misdirection.experiment.store import Run

with Run.open(Path(sys.argv[1]), "name: x") as run:
    before = ""
    for number in range(5):
        def compute(folder, number=number, before=before):
            for step in range(5):
                (folder / f"{step}.txt").write_text(f"{number} {before}")
                time.sleep(0.01)
        run.stage(f"s/{number}", {"number": number, "before": before}, compute)
        before = run.digest(f"s/{number}")
"""


def write(text):
    return lambda folder: (folder / "out.txt").write_text(text)


def never(_folder):
    raise AssertionError("the stage was run again")


def start(folder):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])


def test_a_stage_with_unchanged_inputs_is_not_run_again(tmp_path):
    for compute in (write("a"), never):
        with Run.open(tmp_path / "run", "x") as run:
            artifact = run.stage("one/two", {"a": 1}, compute)
    assert (artifact / "out.txt").read_text() == "a"


def test_changed_inputs_run_it_again(tmp_path):
    with Run.open(tmp_path / "run", "x") as run:
        run.stage("one", {"a": 1}, write("a"))
        artifact = run.stage("one", {"a": 2}, write("b"))
    assert (artifact / "out.txt").read_text() == "b"


def test_a_damaged_artifact_is_named_and_made_again(tmp_path, caplog):
    with Run.open(tmp_path / "run", "x") as run:
        artifact = run.stage("one", {}, write("good"))
    (artifact / "out.txt").write_text("goof")
    with caplog.at_level(logging.WARNING), Run.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, write("good"))
    assert str(artifact) in caplog.text
    assert (artifact / "out.txt").read_text() == "good"


def test_a_damaged_manifest_runs_every_stage_again(tmp_path, caplog):
    with Run.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, write("a"))
    (tmp_path / "run" / "manifest.json").write_text('{"sta')
    with caplog.at_level(logging.WARNING), Run.open(tmp_path / "run", "x") as run:
        artifact = run.stage("one", {}, write("b"))
    assert "manifest.json: damaged" in caplog.text
    assert (artifact / "out.txt").read_text() == "b"


def test_working_files_outlive_a_failure_and_go_with_changed_inputs(tmp_path):
    def fail(_folder):
        (run.partial("one") / "step-1").write_text("x")
        raise RuntimeError

    def look(_folder):
        found.append([path.name for path in run.partial("one").iterdir()])

    found = []
    with Run.open(tmp_path / "run", "x") as run:
        with pytest.raises(RuntimeError):
            run.stage("one", {"a": 1}, fail)
        run.stage("one", {"a": 1}, look)
        with pytest.raises(RuntimeError):
            run.stage("one", {"a": 2}, fail)
        run.stage("one", {"a": 3}, look)
    assert found == [["step-1"], []]
    assert not (tmp_path / "run" / "partial" / "one").exists()


def test_a_second_process_is_refused(tmp_path):
    holder = start(tmp_path / "run")
    try:
        while not (tmp_path / "run" / "experiment.yaml").exists():
            time.sleep(0.01)
        with pytest.raises(MisdirectionError, match="another run is at work here"), Run.open(tmp_path / "run", "x"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MisdirectionError, match="cannot be used"), Run.open(tmp_path / "run", "x"):
        pass


def test_killed_at_any_moment_it_ends_with_the_same_artifacts(tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    chance = random.Random(0)
    for _ in range(8):
        process = start(tmp_path / "killed")
        time.sleep(0.1 + chance.random() * 0.5)
        process.kill()
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (sha256_tree(tmp_path / name / "artifacts") for name in ("whole", "killed"))
    assert whole == killed
    assert not list((tmp_path / "killed").rglob(".tmp-*"))
