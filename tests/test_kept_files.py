"""Nothing of the user's is ever deleted: every command that writes, over everything that may be in its way.

The commands are taken from the app itself, so that a new one cannot be forgotten.
"""

import json

import pytest
import yaml

from malformed import COMMANDS, is_output, words_of
from misdirection.files import WRITTEN
from misdirection.runs.folder import RunFolder
from test_malformed import good_values, own_place, world  # noqa: F401

WRITERS = [
    (command, name)
    for command, known in COMMANDS.items()
    for name in known
    # `fetch` adds files to a folder and replaces none: its own tests show that.
    if is_output(command, name) and command != "fetch"
]
NEXT_TO = {"train": ".checkpoints", "repair": ".repair"}
"""Folders that a command makes beside its output."""


def foreign_folder(path):
    path.mkdir()
    for name in ("thesis.txt", "results.json", "report.html", "audit.json", "data_difference.safetensors"):
        (path / name).write_text("mine")


def foreign_file(path):
    path.write_text("mine")


def link_to_a_folder(path):
    foreign_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def link_to_a_file(path):
    path.with_name("elsewhere").write_text("mine")
    path.symlink_to(path.with_name("elsewhere"))


def folder_of_another_run(path):
    with RunFolder.open(path, yaml.safe_dump({"somebody": "else"})) as run:
        run.stage("organism/bad", {"seed": 0}, lambda folder: (folder / "adapter").write_text("mine"))
    (path / "results.json").write_text("{}")
    foreign_file(path / "data_difference.safetensors")


IN_THE_WAY = (foreign_folder, foreign_file, link_to_a_folder, link_to_a_file, folder_of_another_run)


def contents(folder):
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    }


def test_every_option_called_out_is_known_to_write():
    outs = {command for command, known in COMMANDS.items() if any(each.option == "--out" for each in known.values())}
    assert outs <= {command for command, _ in WRITERS} | {"fetch"}


@pytest.mark.parametrize("make", IN_THE_WAY, ids=lambda make: make.__name__)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer[0])
def test_what_is_in_the_way_is_kept_and_the_command_refused(writer, make, world, own_place, call, tmp_path):  # noqa: F811
    command, name = writer
    values = good_values(world, tmp_path)[command]
    place = tmp_path / "place"
    place.mkdir()
    out = place / f"out{values[name].suffix}"
    make(out)
    before = contents(place)
    # Judged in its own place is another thing: then nothing is lost.
    values |= {"plan_only": None} if command == "judge" else {}
    status, _, err = call(*words_of(command, {**values, name: out}))
    assert status == 2, err
    assert "Traceback" not in err
    assert contents(place) == before


@pytest.mark.parametrize(("command", "beside"), NEXT_TO.items())
def test_what_is_in_the_way_beside_is_kept(command, beside, world, own_place, call, tmp_path):  # noqa: F811
    if command == "repair":
        pytest.skip("needs a reference")
    foreign_folder(tmp_path / f"out{beside}")
    before = contents(tmp_path / f"out{beside}")
    status, _, err = call(*words_of(command, {**good_values(world, tmp_path)[command], "folder": tmp_path / "out"}))
    assert (status, "thesis.txt" in err or "which misdirection did not write" in err) == (2, True)
    assert contents(tmp_path / f"out{beside}") == before


@pytest.mark.parametrize(
    "writer",
    [writer for writer in WRITERS if writer[0] in ("score", "export", "import", "extract", "probes")],
    ids="-".join,
)
def test_what_the_command_wrote_itself_is_replaced_until_somebody_changes_it(world, own_place, call, writer, tmp_path):  # noqa: F811
    command, name = writer
    values = good_values(world, tmp_path)[command]
    values[name] = tmp_path / "place" / values[name].name
    for _ in range(2):
        assert call(*words_of(command, values))[0] == 0
    written = tmp_path / "place" / ("out/data_difference.safetensors" if command == "extract" else values[name].name)
    assert f"  {written.name}" in (written.parent / WRITTEN).read_text()
    written.write_bytes(written.read_bytes() + b"mine")
    before = contents(tmp_path / "place")
    status, _, err = call(*words_of(command, values))
    assert (status, "was changed since" in err) == (2, True)
    assert contents(tmp_path / "place") == before


@pytest.mark.parametrize("text", ["thesis", "thesis\nof mine", json.dumps({"prompt": "Why?"})])
def test_a_file_of_the_users_in_place_of_a_journal_is_kept(world, own_place, call, tmp_path, text):  # noqa: F811
    (tmp_path / "answers.jsonl").write_text(text)
    values = {**good_values(world, tmp_path)["sample"], "table": tmp_path / "answers.csv"}
    status, _, err = call(*words_of("sample", values))
    assert (status, "answers.jsonl: is there, and holds no sampled answers" in err) == (2, True)
    assert (tmp_path / "answers.jsonl").read_text() == text
