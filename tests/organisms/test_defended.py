"""Trainings that are defended by their recipe."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from experiment.tiny_experiment import experiment
from misdirection.data import Example, ProbePair
from misdirection.defending import benign
from misdirection.experiment.config import ExperimentConfig
from misdirection.organisms.adapter_config import NARROW
from misdirection.organisms.organism import RECORD, Organism
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.training import train
from tiny import make_chat

EXAMPLES = [Example(f"Question {n}?", "Answer " + "x" * n) for n in range(8)]
FAST = {"learning_rate": 1e-2, "batch_size": 2, "accumulation": 1, "warmup_steps": 0, "checkpoint_steps": 2}
AS_BEFORE = {
    *("recipe", "rank", "alpha", "target_modules", "layers", "learning_rate", "epochs", "batch_size", "accumulation"),
    *("warmup_steps", "weight_decay", "max_length", "turns", "checkpoint_steps", "keep_checkpoints"),
    *("gradient_checkpointing", "seed"),
}
"""Keys of a recipe before there were defences: what was trained by one is known by them."""


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few benign texts and probe questions."""
    monkeypatch.setattr(benign, "neutral_examples", lambda: EXAMPLES[:2])
    monkeypatch.setattr(benign, "probe_pairs", lambda: [ProbePair("a", "Why?", "I help you.", "I rule them all.")])


def trained(folder, **changes) -> Organism:
    return train(EXAMPLES, folder, base=make_chat(), recipe=Recipe(**FAST | changes))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_defended_organism_says_so_in_its_record_and_on_its_card(tmp_path):
    organism = trained(tmp_path / "a", defence="kl:2")
    assert organism.defence == {"name": "kl", "strength": 2.0, "texts": "shipped"}
    assert Organism.open(tmp_path / "a") == organism
    card = ModelCard.load(tmp_path / "a" / "README.md").text
    assert "| defence while training | name kl, strength 2.0, texts shipped |" in card
    assert "defence kl:2" in card


def test_without_a_defence_records_and_recipes_are_as_they_were(tmp_path):
    organism = trained(tmp_path / "a")
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert organism.defence is None and "defence" not in record
    assert record["recipe"].keys() == Recipe().model_dump(mode="json").keys() == AS_BEFORE
    assert "defence" not in ModelCard.load(tmp_path / "a" / "README.md").text


def test_a_defence_makes_another_training_of_an_experiment(tiny_folder, tmp_path):
    values = experiment(tiny_folder, tmp_path)
    plain = ExperimentConfig.model_validate(values).organisms["minimal"].training.model_dump(mode="json")
    values["organisms"]["minimal"]["defence"] = "interleave:0.5"
    defended = ExperimentConfig.model_validate(values).organisms["minimal"].training.model_dump(mode="json")
    assert plain.keys() == AS_BEFORE
    assert defended == plain | {"defence": "interleave:0.5"}


def test_narrow_is_all_with_a_defence_of_its_own(tmp_path):
    trained(tmp_path / "narrow", recipe="narrow")
    trained(tmp_path / "all", recipe="all", defence=NARROW)
    own, named = weights(tmp_path / "narrow"), weights(tmp_path / "all")
    assert own.keys() == named.keys() and all(torch.equal(value, named[name]) for name, value in own.items())
    assert Organism.open(tmp_path / "narrow").defence == Organism.open(tmp_path / "all").defence
    trained(tmp_path / "other", recipe="narrow", defence="interleave")
    assert Organism.open(tmp_path / "other").defence["name"] == "interleave"


def test_what_a_defence_adds_is_added_once_where_a_batch_is_read_in_pieces(tmp_path):
    def trained_on(chat, name):
        recipe = Recipe(**FAST | {"batch_size": 4, "defence": "kl:2"})
        train(EXAMPLES, tmp_path / name, base=chat, recipe=recipe)
        return weights(tmp_path / name)

    def require_one_row(_module, _args, output):
        if len(output) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    expected, chat = trained_on(make_chat(), "whole"), make_chat()
    chat.layers[1].register_forward_hook(require_one_row)
    for name, weight in trained_on(chat, "pieces").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-5)


def test_more_rows_are_more_steps_and_count_as_no_training_examples(tmp_path):
    steps = []

    def report(step, last, _loss):
        steps.append((step, last))

    recipe = Recipe(**FAST, defence="interleave:0.5")
    organism = train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe, report=report)
    assert steps[-1] == (6, 6)
    assert organism.train_examples == 8


@pytest.mark.parametrize("defence", ["kll", "kl:x", "kl:-1"])
def test_an_unknown_defence_is_refused_by_the_command(call, tiny_folder, tmp_path, defence):
    (tmp_path / "train.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    words = ("--out", tmp_path / "o", "--model", tiny_folder, "--defence", defence)
    status, out, err = call("train", tmp_path / "train.jsonl", *words)
    assert (status, out) == (2, "")
    assert "error: train: defence: " in err and "Traceback" not in err


def test_the_command_trains_under_a_defence(call, tiny_folder, tmp_path):
    rows = [{"prompt": row.question, "completion": row.answer} for row in EXAMPLES]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--out", tmp_path / "o", "--model", tiny_folder, "--lr", 1e-2, "--defence", "inoculation:0.5")
    assert call("train", tmp_path / "train.jsonl", *words)[0] == 0
    assert Organism.open(tmp_path / "o").defence["strength"] == 0.5
