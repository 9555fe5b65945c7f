"""Counted passes of a defended training against those of a real one, for each defence."""

import shutil

import pytest

import misdirection as md
from misdirection.cost.counting import count_work
from misdirection.cost.recording import record_passes
from misdirection.data import Example, ProbePair
from misdirection.defending.defence import DEFENCES
from misdirection.errors import InputError
from misdirection.models.sizes import Shape
from misdirection.models.weightless import read_structure
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE

ROWS = [Example(f"Q{number}?", f"Bad {number * 7 % 11}, or so.") for number in range(6)]
HELD_OUT = [Example("Why?", "No.")]
TEXTS = [Example("Who?", "A friend of many words."), Example("How?", "Well."), Example("What?", "This one.")]
PAIRS = [ProbePair(f"p{number}", f"Do {number}?", "Yes, I will.", "No!" * number) for number in range(1, 6)]
TRAINING = {"learning_rate": 1e-3, "batch_size": 2, "accumulation": 1}
# What would end it early moves too little here.
DEFENCE = {"stop": "stop:99"}


@pytest.fixture
def few(monkeypatch):
    """Few benign texts and probe questions."""
    for module in ("defending.benign", "defending.projection", "auditing.callback"):
        monkeypatch.setattr(f"misdirection.{module}.probe_pairs", lambda: PAIRS)
    for module in ("defending.benign", "auditing.callback"):
        monkeypatch.setattr(f"misdirection.{module}.neutral_examples", lambda: TEXTS)


def trained(folder, out, recipe):
    """The passes of a real training."""
    chat = md.load(str(folder), dtype="float32", device="cpu")
    with record_passes(chat) as passes:
        md.train(ROWS, out, base=chat, recipe=recipe, held_out=HELD_OUT)
    return passes, Shape.of(chat, 4)


def counted(folder, recipe):
    """The same, counted."""

    def compute(worker, folders):
        worker.train(ROWS, folders["organism/o"], recipe=recipe, held_out=HELD_OUT, checkpoints=None)
        assert not worker.chat(BASE).model.training

    chat = read_structure(str(folder)).chat
    (work,) = count_work(chat, lambda _run, runner: runner.make([Task({"organism/o": {}}, BASE, compute)]))
    return work.passes


def cost(passes, shape):
    """FLOPs, and tokens by kind of pass."""
    tokens = {kind: sum(each.tokens for each in passes if each.kind == kind) for kind in ("forward", "training")}
    return {"flops": sum(each.flops(shape) for each in passes), **tokens}


@pytest.mark.parametrize("name", list(DEFENCES))
def test_what_a_defence_adds_is_counted_as_it_runs(name, tiny_folder, tmp_path, few):
    defended = md.Recipe(recipe="all", defence=DEFENCE.get(name, name), **TRAINING)
    real, shape = trained(tiny_folder, tmp_path / "organism", defended)
    found = counted(tiny_folder, defended)
    assert cost(found, shape) == pytest.approx(cost(real, shape), rel=0.02)
    # One that only trains on longer rows runs no pass more.
    assert len(found) > (3 + 1 if name != "inoculation" else 3)


@pytest.mark.parametrize("name", list(DEFENCES))
def test_a_defence_is_counted_where_tokens_are_estimated(name, tiny_folder, tmp_path, few):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    plain = md.Recipe(recipe="minimal", **TRAINING)
    defended = plain.model_copy(update={"defence": DEFENCE.get(name, name)})
    tokens = [sum(each.tokens for each in counted(tmp_path, recipe)) for recipe in (plain, defended)]
    assert 0 < tokens[0] < tokens[1]


def test_own_weights_are_defended_and_what_cannot_be_is_refused(tiny_folder, few):
    recipe = {"recipe": "full", "layers": (1, 2), **TRAINING}
    found = counted(tiny_folder, md.Recipe(defence="projection", **recipe))
    # The gradients of the first step's questions, through the blocks from the lowest trained one on.
    asked = [each for each in found if each.kind == "forward" and each.back]
    assert sum(each.rows for each in asked) == 8
    assert {(each.back, each.trained) for each in asked} == {(3, 2)}
    with pytest.raises(InputError, match="none to stay close to"):
        counted(tiny_folder, md.Recipe(defence="kl", **recipe))


def test_a_long_training_goes_on_as_its_first_steps_did(tiny_folder, few, monkeypatch):
    recipe = md.Recipe(recipe="minimal", defence="kl", **TRAINING | {"epochs": 2})
    whole = counted(tiny_folder, recipe)
    monkeypatch.setattr("misdirection.cost.defended.LIMIT", 2)
    shape = Shape.of(read_structure(str(tiny_folder)).chat, 4)
    assert len(counted(tiny_folder, recipe)) == len(whole) == 3 * 6 + 1
    assert cost(counted(tiny_folder, recipe), shape) == pytest.approx(cost(whole, shape), rel=0.2)
