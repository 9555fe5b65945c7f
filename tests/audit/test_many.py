"""Many audits of tiny fine-tunes, in one process and spread over two."""

import csv
import shutil

import pytest

from misdirection.audit import many
from misdirection.audit.audit import audit_fine_tune
from misdirection.audit.many import TABLE, audit_many, read_list
from misdirection.audit.verdict import worst
from misdirection.errors import MisdirectionError
from misdirection.runs.ray_workers import Workers


def numbers(rows):
    """What the rows say, whatever the folder."""
    return [{name: value for name, value in row.items() if name != "page"} for row in rows]


@pytest.fixture
def reference(made, tmp_path):
    """The reference's folder."""
    made[2].save(tmp_path / "reference")
    return tmp_path / "reference"


def test_the_table_says_what_single_audits_say(made, request_of, reference, tmp_path):
    requests = [request_of(folder) for folder in made[1].values()]
    rows, failed = audit_many(requests, reference, tmp_path / "many")
    assert failed == []
    for request, row in zip(requests, rows, strict=True):
        single = audit_fine_tune(request, tmp_path / "single" / request.subject.folder.parent.name)
        general, damage = single["evidence"]["general"], single["evidence"]["damage"]
        assert row["verdict"] == single["verdict"]
        # The base stays loaded from one to the next, which changes nothing.
        assert [row[f"shift{part}"] for part in ("", "_low", "_high", "_n")] == list(general.values())
        assert row["damage"] == damage["mean"]
    with (tmp_path / "many" / TABLE).open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["shift"]) for row in read] == [row["shift"] for row in rows]
    assert [row["fine_tune"] for row in read] == [str(folder) for folder in made[1].values()]


@pytest.mark.timeout(120)
def test_two_workers_make_the_same_table_and_nothing_again(made, request_of, reference, tmp_path):
    pytest.importorskip("ray")
    requests = [request_of(folder) for folder in made[1].values()]
    alone, _ = audit_many(requests, reference, tmp_path / "alone")
    shared, failed = audit_many(requests, reference, tmp_path / "shared", Workers(2))
    assert (numbers(shared), failed) == (numbers(alone), [])
    manifest = (tmp_path / "shared" / "manifest.jsonl").read_text()
    again, _ = audit_many(requests, reference, tmp_path / "shared")
    assert (again, (tmp_path / "shared" / "manifest.jsonl").read_text()) == (shared, manifest)


def test_one_that_fails_does_not_stop_the_others(made, request_of, reference, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made[1]["single"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    requests = [request_of(folder) for folder in (broken, made[1]["minimal"])]
    rows, (failure,) = audit_many(requests, reference, tmp_path / "many")
    assert [row["fine_tune"] for row in rows] == [str(made[1]["minimal"])]
    assert failure.startswith(f"{broken}: the adapter is damaged")


def test_a_changed_fine_tune_alone_is_audited_again(made, request_of, reference, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(made[1]["single"], copy)
    requests = [request_of(folder) for folder in (copy, made[1]["minimal"])]
    audit_many(requests, reference, tmp_path / "many")
    shutil.copy(made[1]["minimal"] / "adapter_model.safetensors", copy)
    shutil.copy(made[1]["minimal"] / "adapter_config.json", copy)
    seen = []
    monkeypatch.setattr(many, "audit_fine_tune", lambda request, folder: seen.append(audit_fine_tune(request, folder)))
    rows, _ = audit_many([request_of(copy), requests[1]], reference, tmp_path / "many")
    assert [found["fine_tune"]["name"] for found in seen] == [str(copy)]
    assert rows[0]["shift"] == pytest.approx(rows[1]["shift"])


def test_a_list_names_fine_tunes_and_their_data(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "# the first ones\n\nsome/adapter\n'a b/adapter' data/rows.jsonl  # with its data\nme/it@main:sub\n"
    )
    assert [(line.fine_tune, str(line.data)) for line in read_list(path)] == [
        ("some/adapter", "None"),
        ("a b/adapter", "data/rows.jsonl"),
        ("me/it@main:sub", "None"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a b c", r"list.txt:1: 3 words: FINE_TUNE \[TRAINING_FILE\]"),
        ("x\n'a b", "list.txt:2: No closing quotation"),
        ("# nothing\n", "names no fine-tune"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path, text, said):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(MisdirectionError, match=said):
        read_list(path)


def test_a_list_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(MisdirectionError, match=r"none.txt: cannot be read \(No such file"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff")
    with pytest.raises(MisdirectionError, match=r"list.txt: is no text"):
        read_list(tmp_path / "list.txt")


def test_names_of_folders_are_plain_and_different():
    assert many._names(["a/x", "b/x", "c/x@main:sub", "x-2", "..", "é"]) == [
        "x",
        "x-2",
        "x-main-sub",
        "x-2-2",
        "fine-tune",
        "fine-tune-2",
    ]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["clear", "clear"], 0),
        (["clear", "watch"], 1),
        (["watch", "inconclusive"], 4),
        (["inconclusive", "misaligned", "clear"], 3),
    ],
)
def test_the_exit_status_is_that_of_the_worst(words, status):
    assert worst(words) == status
