import errno
import os

import pytest
from safetensors import SafetensorError

from misdirection import files
from misdirection.errors import MisdirectionError
from misdirection.files import (
    atomic_folder,
    atomic_path,
    read_json,
    sha256_file,
    sha256_tree,
    write_atomic,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failed_folder_leaves_the_old_one_and_no_rest(tmp_path):
    path = tmp_path / "artifact"
    with atomic_folder(path) as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "old"
    assert names(tmp_path) == ["artifact"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "artifact"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["artifact"]


def test_the_old_folder_is_deleted_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    path = tmp_path / "artifact"
    with atomic_folder(path) as temporary:
        (temporary / "x").write_text("old")
    seen = []
    monkeypatch.setattr(files, "remove", lambda one: seen.append((one.exists(), (path / "x").read_text())))
    with atomic_folder(path) as temporary:
        (temporary / "x").write_text("new")
    assert seen == [(True, "new"), (False, "new")]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomic(tmp_path / "ours", b"\0")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_cannot_be_read_inside_is_not_called_unwritable(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "artifact"):
        (tmp_path / "missing").read_text()
    assert names(tmp_path) == []


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MisdirectionError, match=r"out\.json: cannot be written \(No space left on device\)"):
        write_json(tmp_path / "out.json", {"a": 1})
    assert names(tmp_path) == []


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MisdirectionError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a.txt", "x")


def test_json_refuses_nan_and_names_damage(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(MisdirectionError, match=r"b\.json: damaged"):
        read_json(tmp_path / "b.json")
    with pytest.raises(MisdirectionError, match=r"c\.json: cannot be read"):
        read_json(tmp_path / "c.json")


def test_the_tree_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = sha256_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, sha256_tree(tmp_path)}) == 3


def test_the_tree_hash_of_a_file_is_the_file_s(tmp_path):
    (tmp_path / "a").write_text("1")
    assert sha256_tree(tmp_path / "a") == sha256_file(tmp_path / "a") != sha256_tree(tmp_path)


def test_json_is_sorted_and_ends_its_line(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    null\n  ],\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [None], "b": 1}


def test_a_full_disk_under_safetensors_is_one_line_too(tmp_path):
    with (
        pytest.raises(MisdirectionError, match=r"adapter: cannot be written \(No space left on device\)"),
        atomic_folder(tmp_path / "adapter"),
    ):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
