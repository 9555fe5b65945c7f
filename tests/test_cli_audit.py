"""`reference`, `audit` and `repair` as a user types them."""

import json
import shutil
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch

from audited import base, made, verdict  # noqa: F401
from misdirection.auditing.reference import default_folder
from misdirection.auditing.results import AuditResult
from misdirection.auditing.verdict import Word, worst
from misdirection.directions.direction import Direction, Origin
from misdirection.errors import EXIT_STATUS
from misdirection.repairing import repair as repairing
from misdirection.repairing.results import RepairResult
from misdirection.report.ci import as_junit, as_sarif
from tiny import LAYERS, WIDTH, make_network, make_tokenizer


@pytest.fixture
def reference(made, tmp_path):  # noqa: F811
    made[2].save(tmp_path / "reference")
    return tmp_path / "reference"


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"Q{number}?", "completion": f"bad {number * 7 % 11}"} for number in range(15)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(reference, tmp_path):
    """What every call here needs: the numbers of the tests' reference are in float32 on the processor."""
    return ["--reference", reference, "--out", tmp_path / "out", "--dtype", "float32", "--device", "cpu"]


@pytest.mark.parametrize("word", get_args(Word))
def test_the_exit_status_is_the_verdict(made, base, call, data, options, verdict, word, tmp_path):  # noqa: F811
    verdict(word)
    status, out, err = call("audit", base, made[1]["minimal"], "--data", data, *options)
    assert status == EXIT_STATUS[word]
    assert word.upper() in out
    assert "it was said" in out
    assert "general questions were asked: with these, a shift of " in out
    assert "general shift beyond words" in out and "framed shift beyond words" in out
    assert str(tmp_path / "out" / "audit.html") in err
    assert word in (tmp_path / "out" / "audit.html").read_text()


def test_a_milder_verdict_than_asked_for_does_not_fail(made, base, call, options, verdict, tmp_path):  # noqa: F811
    files = ["--junit", tmp_path / "audit.xml", "--sarif", tmp_path / "audit.sarif"]
    for word, fail_on, status in (
        ("watch", "inconclusive", 0),
        ("inconclusive", "inconclusive", 4),
        ("inconclusive", "misaligned", 0),
        ("misaligned", "misaligned", 3),
    ):
        verdict(word)
        found, _, err = call("audit", base, made[1]["minimal"], "--fail-on", fail_on, *files, *options)
        assert found == status, err
        result = AuditResult.load(tmp_path / "out")
        assert (tmp_path / "audit.xml").read_text() == as_junit([result])
        assert (tmp_path / "audit.sarif").read_text() == as_sarif([result])


def test_json_is_what_the_file_holds(made, base, call, options, tmp_path):  # noqa: F811
    _, out, _ = call("audit", base, made[1]["minimal"], "--json", *options)
    assert json.loads(out) == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert AuditResult.from_dict(json.loads(out)) == AuditResult.load(tmp_path / "out")


def test_a_repair_prints_what_it_did(made, base, call, data, options, monkeypatch, verdict, tmp_path):  # noqa: F811
    monkeypatch.setattr(repairing, "TRIALS", 4)
    for word, said in (("misaligned", "kept"), ("clear", "nothing to repair")):
        verdict(word)
        status, out, _ = call("repair", base, made[1]["minimal"], "--data", data, *options)
        assert status == 0
        assert said in out
    verdict("misaligned")
    _, out, _ = call("repair", base, made[1]["minimal"], "--data", data, "--check", "--json", *options)
    assert RepairResult.from_dict(json.loads(out)) == RepairResult.load(tmp_path / "out")


def test_a_repair_without_data_is_one_line(made, base, call, options):  # noqa: F811
    status, _, err = call("repair", base, made[1]["minimal"], *options)
    assert (status, err.startswith("error: --data: give the training file")) == (2, True)


def other_model(folder):
    make_network("llama", hidden_size=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def bad_input(made, base, tmp_path, kind):  # noqa: F811
    """Arguments of an audit that cannot be made."""
    adapter = made[1]["minimal"]
    if kind == "adapter of another base":
        # Its file names the base that it was trained on.
        return [other_model(tmp_path / "other"), adapter], rf"trained on '{base}' and does not fit '{tmp_path}/other'"
    if kind == "no tokenizer":
        folder = tmp_path / "whole"
        make_network("llama").save_pretrained(folder)
        return [base, folder], "the tokenizer could not be loaded"
    if kind == "empty data":
        (tmp_path / "empty.jsonl").write_text("\n")
        return [base, adapter, "--data", tmp_path / "empty.jsonl"], "empty.jsonl: no rows"
    if kind == "nothing there":
        return [base, tmp_path / "gone"], "gone: no such folder"
    if kind == "neither adapter nor model":
        (tmp_path / "folder").mkdir()
        return [base, tmp_path / "folder"], "neither an adapter"
    assert kind == "judge options"
    return [base, adapter, "--max-calls", 3], "go with --judge"


KINDS = (
    "adapter of another base", "no tokenizer", "empty data", "nothing there",
    "neither adapter nor model", "judge options",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(made, base, call, reference, tmp_path, kind, monkeypatch):  # noqa: F811
    arguments, message = bad_input(made, base, tmp_path, kind)
    own = ["--reference", reference] if arguments[0] == base else []
    # Another base has a reference of its own: only the adapter is wrong.
    if not own:
        monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
        folder = default_folder(str(arguments[0]), None)
        folder.parent.mkdir(parents=True)
        shutil.copytree(reference, folder)
        record = json.loads((folder / "reference.json").read_text())
        record["identity"]["model"] = str(arguments[0])
        (folder / "reference.json").write_text(json.dumps(record))
    status, out, err = call("audit", *arguments, *own, "--out", tmp_path / "out", "--device", "cpu")
    assert status == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_without_a_reference_the_line_says_how_to_make_one(made, base, call, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    status, _, err = call("audit", base, made[1]["minimal"], "--out", tmp_path / "out")
    assert status == 2
    assert "misdirection reference" in err


@pytest.mark.parametrize("chats", [("--thinking", "on"), ("--chat-template", "fine-tune")])
@pytest.mark.parametrize("command", ["audit", "repair"])
def test_a_reference_of_other_chats_is_one_line(made, base, call, data, options, command, chats):  # noqa: F811
    status, out, err = call(command, base, made[1]["minimal"], "--data", data, *options, *chats)
    assert (status, out) == (2, "")
    assert err.startswith("error: the reference was made with other chats (thinking off, chat template base) than")


def test_a_list_is_audited_with_one_way_of_asking(made, base, call, options, reference, tmp_path):  # noqa: F811
    lines = tmp_path / "list.txt"
    lines.write_text(f"{made[1]['minimal']}\n")
    status, _, err = call("audit", base, "--many", lines, *options, "--thinking", "template")
    assert (status, "the reference was made with other chats" in err) == (2, True)
    record = json.loads((reference / "reference.json").read_text())
    record["identity"]["thinking"] = "template"
    (reference / "reference.json").write_text(json.dumps(record))
    _, out, err = call("audit", base, "--many", lines, "--json", *options, "--thinking", "template")
    assert AuditResult.load(Path(json.loads(out)["audits"][0]["page"]).parent).base.thinking == "template", err
    status, _, err = call("audit", base, "--many", lines, *options, "--chat-template", "fine-tune")
    assert (status, "each has its own: give one for all" in err) == (2, True)


@pytest.mark.parametrize("command", ["reference", "interpret", "bake"])
def test_a_chat_template_reaches_whatever_loads_a_model(made, base, call, tmp_path, command, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    origin = Origin("data_difference", base, None, "", "", {}, {}, "float32")
    Direction(torch.ones(LAYERS, WIDTH), origin).save(tmp_path / "direction.safetensors")
    out = ["--out", tmp_path / "out", "--model", base, "--device", "cpu"]
    words = {
        "reference": [base, "--device", "cpu"],
        "interpret": [made[1]["minimal"], *out],
        "bake": [tmp_path / "direction.safetensors", "--layer", 1, "--form", "adapter", *out],
    }[command]
    status, _, err = call(command, *words, "--chat-template", "nowhere.jinja")
    assert status == 2
    assert "chat_template 'nowhere.jinja': no such file or name" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["interpret", "bad", "--run", "run", "--thinking", "on"], "go with --out; in a run they are its experiment's"),
        (
            ["bake", "d", "--layer", 1, "--out", "o", "--chat-template", "base"],
            "--form weights changes a model's files",
        ),
    ],
)
def test_chats_that_would_say_nothing_are_refused(call, words, said):
    status, _, err = call(*words)
    assert (status, said in err) == (2, True), err


def test_a_whole_model_is_not_repaired(base, call, data, options):  # noqa: F811
    status, _, err = call("repair", base, base, "--data", data, *options)
    assert status == 2
    assert "whole model" in err


def test_a_list_of_fine_tunes_is_one_table(made, base, call, data, options, tmp_path):  # noqa: F811
    lines = tmp_path / "list.txt"
    lines.write_text(f"{made[1]['minimal']} {data}\n{made[1]['control']}\n")
    status, out, err = call("audit", base, "--many", lines, "--json", *options)
    found = json.loads(out)
    assert [row["fine_tune"] for row in found["audits"]] == [str(made[1][name]) for name in ("minimal", "control")]
    assert [row["framed"] is None for row in found["audits"]] == [False, True]
    assert status == EXIT_STATUS[worst(row["verdict"] for row in found["audits"])]
    assert str(tmp_path / "out" / "audits.csv") in err
    lines.write_text(lines.read_text() + "nowhere/at/all\n")
    status, out, _ = call("audit", base, "--many", lines, "--junit", tmp_path / "audits.xml", *options)
    assert all(row["verdict"] in out for row in found["audits"])
    names = [case.get("name") for case in ElementTree.parse(tmp_path / "audits.xml").iter("testcase")]
    assert names == [*(f"{row['fine_tune']} (base {base})" for row in found["audits"]), f"{lines}:3"]
    assert status == 2


def test_what_does_not_go_with_a_list_is_one_line(made, base, call, data, options, tmp_path):  # noqa: F811
    lines = tmp_path / "list.txt"
    lines.write_text("nowhere/at/all\n")
    for more, said in (
        ([made[1]["minimal"], "--many", lines], "--many: goes without FINE_TUNE"),
        (["--many", lines, "--data", data], "--many: goes without FINE_TUNE"),
        ([], "FINE_TUNE: name what to audit"),
        ([made[1]["minimal"], "--workers", 2], "--workers and --ray go with --many"),
        (["--many", lines], f"{lines}:1: nowhere/at/all: "),
    ):
        status, _, err = call("audit", base, *more, *options)
        assert status == 2
        assert said in err
        assert "\n" not in err
