import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from misdirection import files
from misdirection.errors import MisdirectionError
from misdirection.files import MADE, TEMPORARY, remove, sha256_tree
from misdirection.runs import folder as store
from misdirection.runs.folder import RunFolder

# Five stages, each from the one before; a line is printed at every step, so that a test knows where to kill it.
STAGES = """
import sys, time
from pathlib import Path
from misdirection.runs.folder import RunFolder

with RunFolder.open(Path(sys.argv[1]), "name: x") as run:
    before = ""
    for number in range(5):
        def compute(folder, number=number, before=before):
            for step in range(5):
                (folder / f"{step}.txt").write_text(f"{number} {before}")
                print(number, step, flush=True)
                time.sleep(0.005)
        run.stage(f"s/{number}", {"number": number, "before": before}, compute)
        before = run.digest(f"s/{number}")
"""

# A finished stage, then one that never ends.
STUCK = """
import sys, time
from pathlib import Path
from misdirection.runs.folder import RunFolder

def stick(folder):
    (folder / "out.txt").write_text("half")
    (run.partial("two") / "step-1").write_text("x")
    print("stuck", flush=True)
    time.sleep(600)

with RunFolder.open(Path(sys.argv[1]), "x") as run:
    run.stage("one", {}, lambda folder: (folder / "out.txt").write_text("a"))
    run.stage("two", {}, stick)
"""


def write(text):
    return lambda folder: (folder / "out.txt").write_text(text)


def never(_folder):
    raise AssertionError("the stage was run again")


def start(script, folder):
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)


def kill(process):
    process.kill()
    return process.wait()


def leftovers(folder):
    return list(folder.rglob(f"{TEMPORARY}*"))


@pytest.fixture
def stuck(tmp_path):
    """A process that has the run folder and is in the middle of its stage `two`."""
    process = start(STUCK, tmp_path / "run")
    assert process.stdout.readline() == "stuck\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_stage_with_unchanged_inputs_is_not_run_again(tmp_path):
    for compute in (write("a"), never):
        with RunFolder.open(tmp_path / "run", "x") as run:
            artifact = run.stage("one/two", {"a": 1}, compute)
    assert (artifact / "out.txt").read_text() == "a"


def test_changed_inputs_run_it_again(tmp_path):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {"a": 1}, write("a"))
        artifact = run.stage("one", {"a": 2}, write("b"))
    assert (artifact / "out.txt").read_text() == "b"


def test_inputs_are_compared_by_value_whatever_their_order(tmp_path):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {"a": 1, "b": [2]}, write("a"))
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {"b": (2,), "a": 1}, never)


def contents(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != MADE)


@pytest.mark.parametrize("damage", ["flip", "delete", "add"])
def test_a_damaged_artifact_is_named_and_made_again(tmp_path, damage):
    with RunFolder.open(tmp_path / "run", "x") as run:
        artifact = run.stage("one", {}, write("good"))
        run.stage("two", {}, write("other"))
    file = artifact / "out.txt"
    if damage == "flip":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    elif damage == "delete":
        file.unlink()
    else:
        (artifact / "more.txt").write_text("")
    notices = []
    with RunFolder.open(tmp_path / "run", "x", notices.append) as run:
        run.stage("one", {}, write("good"))
        run.stage("two", {}, never)
    assert len(notices) == 1
    assert notices[0].startswith(f"{artifact}: damaged")
    assert contents(artifact) == ["out.txt"]
    # What the user put there is kept.
    assert (
        contents(tmp_path / "run" / "damaged" / "one-1")
        == {"flip": ["out.txt"], "delete": [], "add": ["more.txt", "out.txt"]}[damage]
    )
    assert file.read_text() == "good"


DAMAGED = ["[]", '{"stage": "two"}', '{"stage": 3, "key": "k"}', '{"sta', "\udcff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_line_of_the_manifest_is_named_and_its_stage_run_again(tmp_path, text):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, write("a"))
        run.stage("two", {}, write("a"))
    manifest = tmp_path / "run" / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines()
    manifest.write_bytes(lines[0] + b"\n" + text.encode("utf-8", "surrogateescape") + b"\n")
    notices = []
    with RunFolder.open(tmp_path / "run", "x", notices.append) as run:
        run.stage("one", {}, never)
        artifact = run.stage("two", {}, write("b"))
    assert notices == [f"{manifest}: 1 lines are damaged; their stages are run again"]
    assert (artifact / "out.txt").read_text() == "b"
    assert [json.loads(line)["stage"] for line in manifest.read_text().splitlines()] == ["one", "two"]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_a_kill_cut_is_no_damage(tmp_path, cut):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, write("a"))
        run.stage("two", {}, write("a"))
    manifest = tmp_path / "run" / "manifest.jsonl"
    first, last = manifest.read_bytes().splitlines()
    manifest.write_bytes(first + b"\n" + last[:cut])
    notices = []
    for compute in (write("b"), never):
        with RunFolder.open(tmp_path / "run", "x", notices.append) as run:
            run.stage("one", {}, never)
            run.stage("two", {}, compute)
    assert notices == []


def test_the_manifest_keeps_one_line_for_each_stage(tmp_path):
    for number in range(3):
        with RunFolder.open(tmp_path / "run", "x") as run:
            run.stage("one", {"a": number}, write("a"))
    assert len((tmp_path / "run" / "manifest.jsonl").read_text().splitlines()) == 2
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {"a": 2}, never)
    assert len((tmp_path / "run" / "manifest.jsonl").read_text().splitlines()) == 1


def test_stages_that_are_made_together_are_computed_once_and_those_that_hold_are_left(tmp_path):
    def compute(folders):
        calls.append(sorted(folders))
        for name, folder in folders.items():
            (folder / "out.txt").write_text(name)

    calls = []
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("s/two", {}, write("before"))
        run.stages({f"s/{name}": {} for name in ("one", "two", "three")}, compute)
        run.stages({"s/one": {}, "s/three": {"new": 1}}, compute, seconds=8)
        assert calls == [["s/one", "s/three"], ["s/three"]]
        assert [(run.artifact(f"s/{name}") / "out.txt").read_text() for name in ("one", "two")] == ["s/one", "before"]
        assert run.seconds()["s/three"] == 8


@pytest.fixture
def company(tmp_path):
    """A run whose stages `a`, `b` and `c` were made together, then `c` and `d`, and a function that asks for some."""

    def ask(wanted, *, version="1"):
        def compute(folders):
            for name, folder in folders.items():
                # What a stage gives depends on what shares its passes.
                (folder / "out.txt").write_text(f"{name} of {' '.join(folders)}")

        before = made_of(tmp_path / "run")
        with RunFolder.open(tmp_path / "run", "x", lambda _line: None) as run:
            run.stages({name: {"version": version if name == "c" else "1"} for name in wanted}, compute)
        after = made_of(tmp_path / "run")
        return {name for name in after if after[name] != before.get(name)}

    def made_of(run):
        return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("artifacts/*/out.txt")}

    assert ask("abc") == set("abc")
    assert ask("abcd", version="2") == set("cd")
    return ask, lambda name: tmp_path / "run" / "artifacts" / name / "out.txt"


def drop_last_line(manifest, name):
    lines = manifest.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if json.loads(line)["stage"] == name)
    manifest.write_text("".join(lines[:last] + lines[last + 1 :]))


DAMAGE = {
    "deleted": lambda file: remove(file.parent),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "changed": lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
    "line lost": lambda file: drop_last_line(file.parents[2] / "manifest.jsonl", file.parent.name),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("name", "again"), [("a", "ab"), ("b", "ab"), ("c", "cd"), ("d", "cd")])
def test_what_was_made_together_is_made_again_together(company, damage, name, again):
    ask, file = company
    before = {each: file(each).read_text() for each in "cd"}
    DAMAGE[damage](file(name))
    assert ask("abcd", version="2") == set(again)
    assert {each: file(each).read_text() for each in "cd"} == before
    assert ask("abcd", version="2") == set()


def test_what_has_lost_its_company_by_other_inputs_or_is_not_asked_for_is_left(company):
    ask, file = company
    assert ask("abc", version="3") == {"c"}
    remove(file("a").parent)
    assert ask("b") == set()
    assert ask("ab") == {"a", "b"}


def test_a_failure_leaves_none_of_the_stages_made_together(tmp_path):
    def fail(folders):
        (folders["one"] / "out.txt").write_text("half")
        raise RuntimeError

    with RunFolder.open(tmp_path / "run", "x") as run:
        with pytest.raises(RuntimeError):
            run.stages({"one": {}, "two": {}}, fail)
        assert set(run.missing({"one": {}, "two": {}})) == {"one", "two"}
    assert not leftovers(tmp_path)
    assert not (tmp_path / "run" / "artifacts" / "one").exists()


def test_notices_go_to_the_log_by_default(tmp_path, caplog):
    with RunFolder.open(tmp_path, "x"):
        (tmp_path / "manifest.jsonl").write_text("{}\n")
    with caplog.at_level(logging.WARNING, "misdirection"), RunFolder.open(tmp_path, "x"):
        pass
    assert "manifest.jsonl: 1 lines are damaged" in caplog.text


def test_a_stage_runs_again_when_the_manifest_was_not_written(tmp_path, monkeypatch):
    def crash(_path, _value):
        raise RuntimeError

    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {"a": 1}, write("a"))
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(store, "append", crash)
            run.stage("one", {"a": 2}, write("b"))
    with RunFolder.open(tmp_path / "run", "x") as run:
        artifact = run.stage("one", {"a": 1}, write("a"))
        assert run.digest("one") == sha256_tree(artifact)
    assert (artifact / "out.txt").read_text() == "a"


def test_seconds_are_those_of_the_first_time(tmp_path):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, lambda _folder: time.sleep(0.05))
        first = run.seconds()
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one", {}, never)
        assert run.seconds() == first
    assert first["one"] >= 0.05


@pytest.mark.parametrize("name", ["../out", "a//b", "", "one/two/three", "one"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("one/two", {}, write("a"))
        with pytest.raises(MisdirectionError):
            run.stage(name, {}, never)


def test_working_files_outlive_a_failure_and_go_with_changed_inputs(tmp_path):
    def fail(_folder):
        (run.partial("one") / "step-1").write_text("x")
        raise RuntimeError

    def look(_folder):
        found.append([path.name for path in run.partial("one").iterdir()])

    found = []
    with RunFolder.open(tmp_path / "run", "x") as run:
        with pytest.raises(RuntimeError):
            run.stage("one", {"a": 1}, fail)
        run.stage("one", {"a": 1}, look)
        with pytest.raises(RuntimeError):
            run.stage("one", {"a": 2}, fail)
        run.stage("one", {"a": 3}, look)
    assert found == [["step-1"], []]
    assert not (tmp_path / "run" / "partial" / "one").exists()


def test_working_files_half_deleted_by_a_kill_are_not_taken_up(tmp_path, monkeypatch):
    def killed(path):
        if path.name == "work":
            raise KeyboardInterrupt
        remove(path)

    with RunFolder.open(tmp_path / "run", "x") as run:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "remove", killed)
            run.stage("one", {}, lambda _folder: (run.partial("one") / "step-1").write_text("x"))
        (run.artifact("one") / "damage").write_text("")
    with RunFolder.open(tmp_path / "run", "x") as run:
        found = []
        run.stage("one", {}, lambda _folder: found.append(list(run.partial("one").iterdir())))
    assert found == [[]]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, stuck):
    folder = tmp_path / "run"
    with pytest.raises(MisdirectionError, match=f"another run is using {folder};"), RunFolder.open(folder, "x"):
        pass
    assert kill(stuck) == -signal.SIGKILL
    with RunFolder.open(folder, "x"):
        pass


def test_a_stage_killed_in_the_middle_is_made_again_from_its_working_files(tmp_path, stuck):
    folder = tmp_path / "run"
    kill(stuck)
    assert leftovers(folder)
    assert not (folder / "artifacts" / "two").exists()
    found = []
    with RunFolder.open(folder, "x") as run:
        assert not leftovers(folder)
        run.stage("one", {}, never)
        run.stage("two", {}, lambda _folder: found.extend(path.name for path in run.partial("two").iterdir()))
    assert found == ["step-1"]


def test_only_the_run_s_own_leftovers_are_removed(tmp_path):
    with RunFolder.open(tmp_path, "x") as run:
        run.stage("one", {}, write("a"))
    kept = tmp_path / "mine" / f"{TEMPORARY}x"
    kept.mkdir(parents=True)
    (tmp_path / ".tmp-mine").write_text("")
    with RunFolder.open(tmp_path, "x"):
        pass
    assert kept.exists()
    assert (tmp_path / ".tmp-mine").exists()


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MisdirectionError, match="run: is a file"), RunFolder.open(tmp_path / "run", "x"):
        pass


def test_a_disk_full_in_a_stage_is_one_line_and_the_run_goes_on_later(tmp_path):
    def full(_folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder.open(tmp_path / "run", "x") as run:
        with pytest.raises(MisdirectionError, match=r"artifacts/one: cannot be written \(No space left on device\)"):
            run.stage("one", {}, full)
        assert not leftovers(tmp_path)
        run.stage("one", {}, write("a"))


def test_killed_at_random_moments_it_ends_with_the_same_artifacts(tmp_path):
    process = start(STAGES, tmp_path / "whole")
    assert len(process.communicate()[0].splitlines()) == 25
    chance = random.Random(0)
    codes = []
    for _ in range(10):
        process = start(STAGES, tmp_path / "killed")
        for _ in range(chance.randint(1, 6)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.02)
        codes.append(kill(process))
    assert codes.count(-signal.SIGKILL) >= 5
    process = start(STAGES, tmp_path / "killed")
    process.communicate()
    assert process.returncode == 0
    whole, killed = (sha256_tree(tmp_path / name / "artifacts") for name in ("whole", "killed"))
    assert whole == killed
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["experiment.yaml", "manifest.jsonl", "artifacts"])
def test_a_folder_of_the_users_own_is_not_written_to(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(MisdirectionError, match=f"holds {name}, which misdirection did not write"),
        RunFolder.open(tmp_path, "x"),
    ):
        pass
    assert (tmp_path / name).read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_copy_of_a_run_without_its_lock_is_known_by_its_manifest(tmp_path):
    with RunFolder.open(tmp_path / "run", "x") as run:
        run.stage("a", {"seed": 0}, lambda folder: (folder / "out").write_text("text"))
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    with RunFolder.open(tmp_path / "run", "x") as run:
        assert not run.missing({"a": {"seed": 0}})
