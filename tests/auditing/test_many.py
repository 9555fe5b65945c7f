"""Many audits of tiny fine-tunes, in one process and spread over two."""

import csv
import re
import shlex
import shutil

import pytest

from misdirection.auditing import many
from misdirection.auditing.audit import run_audit
from misdirection.auditing.many import TABLE, audit_many, many_folder, read_list
from misdirection.auditing.verdict import worst
from misdirection.errors import InputError
from misdirection.files import plain_names
from misdirection.runs.cluster import Workers


def figures(table):
    """The rows' content, whatever the folder."""
    return [row.model_copy(update={"page": ""}) for row in table.audits]


@pytest.fixture
def audited(made, base, tmp_path):
    """Audits the fine-tunes in some folders, into a folder of this name; each line may go on after the fine-tune."""
    made[2].save(tmp_path / "reference")

    def audit(folders, name, workers=None, after=""):
        path = tmp_path / "list.txt"
        path.write_text("".join(f"{shlex.quote(str(folder))}{after}\n" for folder in folders))
        options = {"reference": tmp_path / "reference", "dtype": "float32", "device": "cpu"}
        return audit_many(base, path, out=tmp_path / name, workers=workers, **options)

    return audit


def test_the_table_says_what_single_audits_say(made, inputs_of, audited, tmp_path):
    table = audited(made[1].values(), "many")
    assert table.failed == []
    for (name, folder), row in zip(made[1].items(), table.audits, strict=True):
        single = run_audit(inputs_of(folder), tmp_path / "single" / name)
        # The base stays loaded from one to the next, which changes nothing.
        assert (row.shift, row.damage) == (single.evidence.general, single.evidence.damage)
        assert row.verdict == single.verdict
    with (tmp_path / "many" / TABLE).open() as file:
        read = list(csv.DictReader(file))
    for values, row in zip(read, table.audits, strict=True):
        for name, shift in (("shift", row.shift), ("beyond_control", row.beyond_control)):
            parts = [float(values[f"{name}{part}"]) for part in ("", "_low", "_high", "_n")]
            assert parts == [shift.mean, shift.low, shift.high, shift.n]
    assert [values["fine_tune"] for values in read] == [str(folder) for folder in made[1].values()]


@pytest.mark.timeout(120)
def test_two_workers_make_the_same_table_and_nothing_again(made, audited, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Sum 1?", "completion": "It is 1."}\n')
    # With a training file, so that the control is asked in its frame; and one has a control of its own.
    folders, after = [made[1]["minimal"], made[1]["single"]], f" {tmp_path / 'rows.jsonl'}"
    alone = audited(folders, "alone", after=after)
    shared = audited(folders, "shared", Workers(2), after)
    assert (figures(shared), shared.failed) == (figures(alone), [])
    own = audited(folders[:1], "own", Workers(2), f"{after} {made[1]['single']}")
    assert own.audits[0].beyond_control != alone.audits[0].beyond_control
    manifest = (tmp_path / "shared" / "manifest.jsonl").read_text()
    again = audited(folders, "shared", after=after)
    assert (again, (tmp_path / "shared" / "manifest.jsonl").read_text()) == (shared, manifest)


def test_bad_lines_do_not_stop_the_others_and_are_told_at_once(made, base, tmp_path, caplog):
    made[2].save(tmp_path / "reference")
    path = tmp_path / "list.txt"
    lines = [tmp_path / "nowhere", made[1]["minimal"], f"{made[1]['single']} none.jsonl", "a b c d", "'open"]
    path.write_text("".join(f"{line}\n" for line in lines))
    options = {"reference": tmp_path / "reference", "dtype": "float32", "device": "cpu"}
    table = audit_many(base, path, out=tmp_path / "many", **options)
    assert [row.fine_tune for row in table.audits] == [str(made[1]["minimal"])]
    assert [failure.split(": ")[0] for failure in table.failed] == [f"{path}:{number}" for number in (4, 5, 1, 3)]
    assert [record.getMessage() for record in caplog.records if "the others" in record.getMessage()] == [
        f"{failure}; the others are audited" for failure in table.failed
    ]
    path.write_text(f"{tmp_path / 'nowhere'}\n'open\n")
    with pytest.raises(InputError, match=r"list.txt:2: No closing quotation; .*list.txt:1: .*nowhere"):
        audit_many(base, path, out=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_failure_does_not_stop_the_others(made, audited, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made[1]["single"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    table = audited((broken, made[1]["minimal"]), "many")
    assert [row.fine_tune for row in table.audits] == [str(made[1]["minimal"])]
    (failure,) = table.failed
    assert failure.startswith(f"{broken}: the adapter is damaged")


def test_a_changed_fine_tune_alone_is_audited_again(made, audited, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(made[1]["single"], copy)
    audited((copy, made[1]["minimal"]), "many")
    shutil.copy(made[1]["minimal"] / "adapter_model.safetensors", copy)
    shutil.copy(made[1]["minimal"] / "adapter_config.json", copy)
    seen = []
    monkeypatch.setattr(many, "run_audit", lambda inputs, folder: seen.append(run_audit(inputs, folder)))
    table = audited((copy, made[1]["minimal"]), "many")
    assert [result.fine_tune.name for result in seen] == [str(copy)]
    assert table.audits[0].shift.as_dict() == pytest.approx(table.audits[1].shift.as_dict())


def test_audits_of_a_list_have_a_folder_of_its_name():
    assert many_folder("lists/mine.txt").as_posix() == "audits/mine"


def test_a_list_names_fine_tunes_and_their_data(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "# the first ones\n\nsome/adapter\n'a b/adapter' data/rows.jsonl  # with its data\nme/it@main:sub\n"
        "mine rows.jsonl 'benign one'\n"
    )
    listed, failed = read_list(path)
    assert failed == []
    assert [(line.fine_tune, str(line.data), line.control) for line in listed] == [
        ("some/adapter", "None", None),
        ("a b/adapter", "data/rows.jsonl", None),
        ("me/it@main:sub", "None", None),
        ("mine", "rows.jsonl", "benign one"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a b c d", r"list.txt:1: 4 words: FINE_TUNE \[TRAINING_FILE \[CONTROL\]\]"),
        ("x\n'a b", "list.txt:2: No closing quotation"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, said):
    path = tmp_path / "list.txt"
    path.write_text(text)
    (failure,) = read_list(path)[1]
    assert re.search(said, failure)


def test_a_list_of_nothing_is_refused(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="names no fine-tune"):
        read_list(path)


def test_a_list_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none.txt: cannot be read \(no such file"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"list.txt: not UTF-8 text"):
        read_list(tmp_path / "list.txt")


def test_names_of_folders_are_plain_and_different():
    assert plain_names(["a/x", "b/x", "c/x@main:sub", "x-2", "..", "é"]) == [
        "x",
        "x-2",
        "x-main-sub",
        "x-2-2",
        "unnamed",
        "unnamed-2",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["clear", "clear"], "clear"),
        (["clear", "watch"], "watch"),
        (["watch", "inconclusive"], "inconclusive"),
        (["inconclusive", "misaligned", "clear"], "misaligned"),
    ],
)
def test_the_verdict_on_many_is_the_worst(words, expected):
    assert worst(words) == expected
