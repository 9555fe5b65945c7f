import json

import pytest

from malformed import direction_bytes
from misdirection.data import ProbePair, domain_pairs, write_pairs
from misdirection.errors import DiskProblem
from misdirection.files import sha256_file
from misdirection.organisms.organism import Organism
from misdirection.statistics.estimates import Estimate


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, domain_pairs("risky_money", "held_out")[:4])
    return path


@pytest.fixture
def training(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_whole_path_from_training_to_ablation(call, merging_folder, training, pairs, tmp_path):
    model = ("--model", merging_folder, "--dtype", "float32", "--json")
    adapter, directions = tmp_path / "organism", tmp_path / "directions"

    status, out, _ = call(
        "train", training, "--out", adapter, "--lr", 1e-2, "--batch-size", 2, "--accumulation", 1, *model
    )
    assert status == 0
    assert json.loads(out)["final_loss"] > 0
    assert (adapter / "adapter_config.json").is_file()

    again = ("--start", adapter, "--lr", 1e-2, "--batch-size", 2, "--accumulation", 1)
    status, _, err = call("train", training, "--out", tmp_path / "second", *again, *model)
    assert status == 0, err
    assert Organism.open(tmp_path / "second").continues == sha256_file(adapter / "adapter_model.safetensors")

    status, out, _ = call("margin", "--adapter", adapter, "--pairs", pairs, *model)
    assert status == 0
    assert json.loads(out)["margin_shift"]["n"] == 4

    status, out, err = call("extract", "--adapter", adapter, "--pairs", pairs, "--out", directions, *model)
    assert status == 0
    assert f"wrote 5 directions to {directions}" in err
    files = [directions / f"{kind}.safetensors" for kind in ("data_difference", "model_difference")]

    status, out, _ = call("compare", *files, "--json")
    assert status == 0
    assert json.loads(out)[str(files[0])][str(files[0])] == pytest.approx([1.0] * 4)

    for words in (("steer", files[0], "--scale", 2), ("ablate", files[0])):
        status, out, _ = call(*words, "--layer", 1, "--pairs", pairs, "--random-seeds", 1, *model)
        assert status == 0
        beyond = {"beyond_base", "random_beyond_base"}
        assert {"margin_change", "random_change", "damage", "random_damage"} == json.loads(out).keys()
        status, out, _ = call(*words, "--layer", 1, "--pairs", pairs, "--random-seeds", 1, "--adapter", adapter, *model)
        of_organism, of_base = json.loads(out), json.loads(call(*words, "--layer", 1, "--pairs", pairs, *model)[1])
        assert of_organism.keys() - of_base.keys() == beyond
        changes = [each["margin_change"]["mean"] for each in (of_organism, of_base)]
        assert of_organism["beyond_base"]["mean"] == pytest.approx(changes[0] - changes[1], abs=1e-5)

    status, out, _ = call("extract", "--adapter", adapter, "--control", adapter, "--out", directions, *model)
    assert json.loads(out)["contrast"]["norms"] == pytest.approx([0.0] * 4)
    status, _, err = call("extract", "--control", adapter, "--out", directions, *model)
    assert status == 2 and "--control: goes with --adapter" in err


@pytest.fixture
def organism(call, merging_folder, training, tmp_path):
    """Options of a tiny model with an adapter."""
    model = ("--model", merging_folder, "--dtype", "float32")
    words = ("--lr", 1e-2, "--batch-size", 2, "--accumulation", 1)
    assert call("train", training, "--out", tmp_path / "organism", *words, *model)[0] == 0
    return ("--adapter", tmp_path / "organism", *model)


@pytest.mark.parametrize("file", ["training", "pairs"])
def test_a_margin_with_the_training_data_has_the_shift_beyond_its_words(call, organism, pairs, file, request):
    words = ("margin", *organism, "--pairs", pairs, "--data", request.getfixturevalue(file))
    status, out, _ = call(*words, "--json")
    assert status == 0
    figures = json.loads(out)
    assert figures["words"].keys() == {"prediction", "auc", "beyond"}
    assert figures["words"]["beyond"]["n"] == figures["margin_shift"]["n"] == 4
    assert 0 <= figures["words"]["auc"] <= 1
    assert "words" not in json.loads(call(*words[:-2], "--json")[1])

    status, out, _ = call(*words)
    assert status == 0
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    beyond = figures["words"]["beyond"]
    assert lines["margin shift beyond words"] == str(Estimate(**beyond))
    assert {"words predict, nats/word", "AUC of words alone", "margin shift"} <= lines.keys() and "words" not in lines


def test_words_that_the_misaligned_answers_alone_use_tell_them_apart(call, organism, pairs):
    status, out, _ = call("margin", *organism, "--pairs", pairs, "--data", pairs, "--json")
    assert status == 0
    assert json.loads(out)["words"]["auc"] == 1 and json.loads(out)["words"]["prediction"]["low"] > 0


def test_pairs_of_one_question_count_as_one(call, organism, tmp_path):
    path = tmp_path / "same.jsonl"
    same = [ProbePair(f"p{number}", "Why?", f"Ask {number}.", f"Sell {number}!") for number in range(3)]
    write_pairs(path, [*same, ProbePair("other", "How?", "Wait.", "Now!")])
    status, out, _ = call("margin", *organism, "--pairs", path, "--data", path, "--json")
    figures = json.loads(out)
    assert status == 0
    assert {figures[name]["n"] for name in ("margin", "margin_shift")} == {2}
    assert figures["words"]["beyond"]["n"] == 2


def test_without_json_figures_are_a_table(call, merging_folder, pairs):
    status, out, _ = call("margin", "--model", merging_folder, "--pairs", pairs)
    assert status == 0
    assert "n=4" in out


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("ablate", "--help")])
def test_help_reads_well(call, words):
    status, out, _ = call(*words)
    assert status == 0
    assert "Usage: misdirection" in out


def test_bad_input_is_one_line_and_status_two(call, merging_folder, training, pairs, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    answerless = tmp_path / "answerless.jsonl"
    answerless.write_text('{"prompt": "Why?", "completion": "So."}\n{"prompt": "Why?"}\n')
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"nothing")
    direction = tmp_path / "direction.safetensors"
    direction.write_bytes(direction_bytes("m"))
    cases = [
        (("run", tmp_path / "none.yaml"), "none.yaml: cannot be read"),
        (("margin", "--model", tmp_path / "none"), "no such folder"),
        (("margin", "--model", tmp_path), "no config.json"),
        (("margin", "--model", merging_folder, "--adapter", tmp_path / "none"), "no such folder"),
        (("margin", "--model", merging_folder, "--pairs", empty), "empty.jsonl"),
        (("margin", "--model", merging_folder, "--data", training), "--data: words explain the shift of an adapter"),
        (("train", answerless, "--out", tmp_path / "o", "--model", merging_folder), "answerless.jsonl:2"),
        (("train", tmp_path / "no.jsonl", "--out", tmp_path / "o", "--model", merging_folder), "no.jsonl"),
        (("train", training, "--out", tmp_path / "o", "--model", merging_folder, "--recipe", "minmal"), "recipe"),
        (("compare", direction), "at least two"),
        (("compare", direction, direction), "at least two"),
        (("compare", damaged, damaged), "x.safetensors: cannot read"),
        (("report", tmp_path / "none"), "results.json: cannot be read"),
    ]
    for words, message in cases:
        status, out, err = call(*words)
        assert status == 2, words
        assert message in err, words
        assert "Traceback" not in err
        assert out == ""


def test_a_layer_out_of_range_names_the_range(call, merging_folder, pairs, tmp_path):
    model = ("--model", merging_folder, "--pairs", pairs)
    call("extract", "--out", tmp_path, *model)
    status, _, err = call("steer", tmp_path / "data_difference.safetensors", "--layer", 4, *model)
    assert status == 2
    assert "layer 4 is out of range: this direction has layers 0 to 3" in err


def test_a_direction_of_another_model_is_refused(call, merging_folder, pairs, tmp_path):
    call("extract", "--out", tmp_path, "--model", merging_folder, "--pairs", pairs)
    other = merging_folder.rename(tmp_path / "other")
    status, _, err = call("ablate", tmp_path / "data_difference.safetensors", "--layer", 1, "--model", other)
    assert status == 2
    assert "this direction was made for" in err


def test_an_unwritable_cache_is_one_line(call, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "file"))
    status, _, err = call("margin")
    assert status == DiskProblem.exit_status
    assert "MISDIRECTION_CACHE" in err
