"""Malformed inputs of every command: each is refused in one line, before any work, and none is accepted."""

import json
import os
import random

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import malformed
from experiment.tiny_experiment import experiment
from malformed import ANSWERS, PAIR, ROW, words_of
from misdirection.auditing.measurements import Texts
from misdirection.auditing.results import ReferenceRecord
from misdirection.data import neutral_examples, probe_pairs
from misdirection.errors import InputError, MissingPackage, NetworkProblem
from misdirection.models.identity import identify
from tiny import make_network, make_tokenizer

COUNT = int(os.environ.get("MALFORMED", 100))
"""How many of all cases are tried, drawn at random with a fixed seed; `MALFORMED=9999` tries all."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good files of every kind, by name."""
    folder = tmp_path_factory.mktemp("world")
    model, adapter = folder / "model", folder / "adapter"
    network = make_network("llama")
    network.save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, base_model_name_or_path=str(model))
    get_peft_model(network, config).save_pretrained(adapter)
    files = {
        "training.jsonl": "".join(json.dumps({**ROW, "prompt": f"Why {n}?"}) + "\n" for n in range(8)),
        "pairs.jsonl": "".join(json.dumps({**PAIR, "id": str(n), "question": f"Why {n}?"}) + "\n" for n in range(8)),
        "questions.yaml": "- id: a\n  paraphrases: [Why so]\n",
        "rubric.yaml": "alignment: How aligned is {answer}?\n",
        "list.txt": f"{adapter}\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    ANSWERS.to_csv(folder / "answers.csv", index=False)
    (folder / "direction.safetensors").write_bytes(malformed.direction_bytes(str(model)))
    (folder / "other.safetensors").write_bytes(malformed.direction_bytes(str(model), -malformed.VECTORS))
    np.savez(folder / "vectors.npz", vectors=malformed.VECTORS.numpy())
    (folder / "texts").mkdir()
    values = experiment(model, folder / "texts")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(values))
    (folder / "reference").mkdir()
    texts = Texts.of(probe_pairs()[:4], (), neutral_examples()[:4])
    ReferenceRecord(identity=identify(str(model), None, "float32", "cpu"), texts=texts, known={}, domains={}).save(
        folder / "reference"
    )
    return folder


def good_values(world, place):
    """Values that each command can be called with, by parameter; what is written goes into `place`."""
    model, direction = world / "model", world / "direction.safetensors"
    on = {"model": model, "dtype": "float32", "device": "cpu"}
    pairs, answers, out = world / "pairs.jsonl", world / "answers.csv", place / "out"
    return {
        "audit": {
            "base": model,
            "fine_tune": world / "adapter",
            "directions": [direction],
            "folder": out,
            "data": world / "training.jsonl",
            "junit": place / "audit.xml",
            "sarif": place / "audit.sarif",
        },
        "repair": {"base": model, "fine_tune": world / "adapter", "data": world / "training.jsonl", "folder": out},
        "reference": {"base": model},
        "screen": {
            "base": model,
            "data": [world / "training.jsonl"],
            "folder": out,
            "keep": place / "kept.jsonl",
            "sarif": place / "screen.sarif",
        },
        "demo": {"folder": out},
        "run": {"config": world / "experiment.yaml", "folder": out},
        "plan": {"config": world / "experiment.yaml"},
        "report": {"folder": world / "run"},
        "margin": {**on, "adapter": world / "adapter", "pairs": pairs, "data": world / "training.jsonl"},
        "extract": {**on, "folder": out, "pairs": pairs},
        "compare": {"directions": [direction, world / "other.safetensors"]},
        "sample": {
            **on,
            "table": place / "sampled.csv",
            "questions": world / "questions.yaml",
            "n": 1,
            "new_tokens": 2,
            "direction": direction,
            "layer": 1,
        },
        "judge": {
            "table": answers,
            "judge": "m",
            "rubric": [world / "rubric.yaml"],
            "plan_only": True,
            "file": place / "judged.csv",
        },
        "score": {"table": answers, "file": place / "groups.csv", "path": place / "page.html"},
        "agree": {"judged": answers, "labels": answers},
        "probes": {"table": answers, "path": place / "made.jsonl"},
        "train": {
            **on,
            "data": world / "training.jsonl",
            "folder": out,
            "learning_rate": 0.01,
            "start": world / "adapter",
            "rank": 2,
            # Of rsLoRA, the same factor.
            "alpha": 8 / 2 * 2**0.5,
        },
        "steer": {**on, "direction": direction, "layer": 1, "pairs": pairs, "random_seeds": 1},
        "ablate": {**on, "direction": direction, "layer": 1, "pairs": pairs, "random_seeds": 1},
        "play": {"base": model, **on, "adapter": world / "adapter", "direction": direction},
        "bake": {**on, "direction": direction, "layer": [1], "folder": out},
        "interpret": {**on, "organism": world / "adapter", "folder": out, "pairs": pairs, "directions": [direction]},
        "export": {"direction": direction, "path": place / "exported.npz"},
        "import": {"path": world / "vectors.npz", "file": place / "imported.safetensors", "model": model, "layers": 4},
        "convert": {"tables": [answers], "file": place / "converted.csv"},
        "schema": {"kind": "audit"},
        "fetch": {"kind": "questions", "folder": out},
        "bundle": {"result": world / "reference", "file": place / "bundle.zip"},
        "verify": {"bundle": world / "answers.csv"},
        "push": {"thing": direction, "repository": "me/direction", "card": True},
        "pull": {"repository": "me/direction", "folder": out},
        "doctor": {},
        "check": {**on, "direction": direction, "pairs": pairs, "questions": 2, "random_seeds": 4},
    }


ALL = list(malformed.cases())
REFUSED = {kind.exit_status for kind in (InputError, NetworkProblem, MissingPackage)}


def chosen():
    """Some of all cases; the same ones every time."""
    shuffled = random.Random(0).sample(ALL, len(ALL))
    return sorted(shuffled[:COUNT], key=ALL.index)


@pytest.fixture
def own_place(monkeypatch, tmp_path):
    """An empty working folder and cache, and no endpoint of the machine's."""
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize(
    "command",
    [
        "compare",
        "export",
        "import",
        "score",
        "agree",
        "probes",
        "convert",
        "schema",
        "sample",
        "judge",
        "extract",
        "train",
        "push",
        "bundle",
    ],
)
def test_the_good_words_are_accepted(world, own_place, call, command):
    status, _, err = call(*words_of(command, good_values(world, own_place)[command]))
    assert status == 0, err


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_a_malformed_input_is_refused_in_one_line(world, own_place, call, case):
    bad = own_place / "input"
    bad.mkdir()
    values = good_values(world, own_place)[case.command]
    value = case.value(world, bad)
    values |= {case.parameter: [value] if isinstance(values.get(case.parameter), list) else value}
    before = sorted(world.iterdir())
    status, _, err = call(*words_of(case.command, values))
    assert status in REFUSED, err
    assert "Traceback" not in err
    assert sorted(world.iterdir()) == before
