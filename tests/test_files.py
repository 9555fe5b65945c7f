import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from misdirection import files
from misdirection.errors import MisdirectionError
from misdirection.files import (
    MADE,
    atomic_folder,
    atomic_path,
    empty_working_folder,
    list_made,
    read_json,
    require_replaceable,
    sha256_file,
    sha256_tree,
    write_atomic,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != MADE)


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
    # The old folder, then the temporary name of the new one.
    assert [one for one in seen if one[1] == "new"] == [(True, "new"), (False, "new")]


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


def written(path, **contents):
    with atomic_folder(path) as temporary:
        for name, text in contents.items():
            (temporary / name).write_text(text)


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def foreign_file_among_ours(path):
    written(path, a="1")
    (path / "thesis.txt").write_text("mine")


def ours_but_changed(path):
    written(path, thesis="1")
    (path / "thesis").write_text("mine")


def foreign_link_among_ours(path):
    written(path, a="1")
    (path / "thesis.txt").symlink_to(path / "a")


def foreign_file_deep_inside(path):
    written(path, a="1")
    (path / "b").mkdir()
    (path / "b" / "thesis.txt").write_text("mine")


def plain_file(path):
    path.write_text("thesis: mine")


def link_to_a_foreign_folder(path):
    foreign_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


FOREIGN = (foreign_folder, foreign_file_among_ours, ours_but_changed, foreign_link_among_ours, foreign_file_deep_inside,
           plain_file, link_to_a_foreign_folder)  # fmt: skip


def contents(folder):
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("make", FOREIGN)
def test_what_the_user_wrote_is_never_replaced(make, tmp_path):
    path = tmp_path / "out"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(MisdirectionError, match=r"thesis|is a file"):
        written(path, new="2")
    with pytest.raises(MisdirectionError, match=r"thesis|is a file"):
        require_replaceable(path)
    assert contents(tmp_path) == before


def test_a_file_that_came_while_we_computed_is_kept(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(MisdirectionError, match="thesis"), atomic_folder(path) as temporary:
        (temporary / "new").write_text("2")
        foreign_folder(path)
    assert (path / "thesis.txt").read_text() == "mine" and names(tmp_path) == ["out"]


def test_a_file_of_ours_that_we_write_again_is_still_ours(tmp_path):
    path = tmp_path / "out"
    written(path, record="1")
    write_atomic(path / "record", "2")
    written(path, new="3")
    assert not (path / "record").exists()


def test_a_link_to_a_folder_of_ours_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    written(tmp_path / "out", a="1")
    written(tmp_path / "out", a="2")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a").read_text() == "2"


def test_a_working_folder_is_emptied_for_another_key_alone(tmp_path):
    folder = tmp_path / "work"
    for key, kept in (({"a": 1}, []), ({"a": 1}, ["step-1"]), ({"a": 2}, [])):
        empty_working_folder(folder, key, own=(r"step-\d+",))
        assert [name for name in names(folder) if name.startswith("step")] == kept
        (folder / "step-1").mkdir(exist_ok=True)


@pytest.mark.parametrize("ours", [False, True])
def test_a_working_folder_with_foreign_files_is_refused(ours, tmp_path):
    if ours:
        empty_working_folder(tmp_path, 1)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MisdirectionError, match=r"holds thesis.txt, which misdirection did not write"):
        empty_working_folder(tmp_path, 2, own=(r"step-\d+",))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_copy_and_a_note_in_a_working_folder_are_kept(tmp_path):
    empty_working_folder(tmp_path, 1)
    (tmp_path / "step-1").mkdir()
    list_made(tmp_path / "step-1")
    for kept, named in ((tmp_path / "step-1-mine", "step-1-mine"), (tmp_path / "step-1" / "notes", "step-1/notes")):
        kept.write_text("mine")
        with pytest.raises(MisdirectionError, match=f"holds {named}, which misdirection did not write"):
            empty_working_folder(tmp_path, 2, own=(r"step-\d+",))
        assert kept.read_text() == "mine"
        kept.unlink()
    empty_working_folder(tmp_path, 2, own=(r"step-\d+",))
    assert not (tmp_path / "step-1").exists()


@pytest.mark.parametrize("inside", ["", "below"])
def test_the_folder_that_the_user_is_in_is_not_replaced(tmp_path, monkeypatch, inside):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / inside)
    for path in (Path(".."), tmp_path) if inside else (Path(), tmp_path):
        with pytest.raises(MisdirectionError, match="you are in this folder"), atomic_folder(path):
            raise AssertionError("begun")
    assert list(tmp_path.iterdir()) == [tmp_path / "below"]


def test_a_copy_of_a_folder_of_ours_gets_a_list_of_its_own(tmp_path):
    with atomic_folder(tmp_path / "first") as folder:
        (folder / "a").write_text("a")
    with atomic_folder(tmp_path / "second") as folder:
        shutil.copytree(tmp_path / "first", folder, dirs_exist_ok=True)
        (folder / "b").write_text("b")
    assert read_json(tmp_path / "second" / MADE).keys() == {"a", "b"}
    require_replaceable(tmp_path / "second")
