"""Planned tokens against those that a real run of a tiny experiment puts through the model."""

from collections import Counter

import pytest
from transformers import LlamaModel

from experiment.tiny_experiment import experiment
from misdirection.cost.source import read_source
from misdirection.cost.stages import pieces
from misdirection.cost.work import Subject
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.runner import run_experiment
from misdirection.runs.folder import RunFolder


@pytest.fixture
def counted(monkeypatch):
    """Tokens by kind of stage, padding included, that any tiny model runs."""
    tokens: Counter[str] = Counter()
    current = []
    make, forward = RunFolder._make, LlamaModel.forward

    def noted(self, missing, *args):
        current.append(next(iter(missing)).partition("/")[0])
        make(self, missing, *args)
        current.pop()

    def counting(self, input_ids=None, **inputs):
        tokens[current[-1]] += input_ids.numel()
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(RunFolder, "_make", noted)
    monkeypatch.setattr(LlamaModel, "forward", counting)
    return tokens


def planned(config, **how):
    """Tokens by kind of stage."""
    found: Counter[str] = Counter()
    for piece in pieces(Subject(config, read_source(config.model).chat, **how)):
        found[piece.stage] += sum(one.tokens for one in piece.passes)
    return found


def test_every_stage_is_planned_as_it_runs(counted, tiny_folder, tmp_path):
    config = ExperimentConfig.model_validate(experiment(tiny_folder, tmp_path))
    run_experiment(config, tmp_path / "run")
    found = planned(config)
    for stage in ("organism", "margin", "means"):
        assert found[stage] == counted[stage], stage
    assert found["cell"] == pytest.approx(counted["cell"], rel=0.05)
    # Answers may end early.
    assert 0.5 * found["sampled"] <= counted["sampled"] <= found["sampled"]


def test_alternating_controls_steered_layers_and_several_epochs_are_planned_as_they_run(counted, tiny_folder, tmp_path):
    values = experiment(tiny_folder, tmp_path)
    values["random_controls"] = "alternating"
    values["steering"] |= {"layers": [0, 1, 2], "scales": [1.0, 2.0]}
    values["organisms"] = {"minimal": values["organisms"]["minimal"] | {"epochs": 2.5, "accumulation": 2}}
    config = ExperimentConfig.model_validate(values)
    run_experiment(config, tmp_path / "run")
    found = planned(config)
    assert found["organism"] == pytest.approx(counted["organism"], rel=0.05)
    assert found["cell"] == pytest.approx(counted["cell"], rel=0.05)


def test_answers_and_interpretation_are_planned_as_they_run(counted, tiny_folder, tmp_path):
    values = experiment(tiny_folder, tmp_path)
    questions = tmp_path / "questions.txt"
    questions.write_text("Why?\nHow come?\n")
    values["organisms"]["minimal"] |= {"keep_checkpoints": True, "checkpoint_steps": 1}
    values["interpretation"] = {"organism": "minimal", "pairs": 4, "causal_pairs": 4, "splits": 2, "checkpoints": 3}
    values["sampling"] = {"questions": [str(questions)], "n": 3, "new_tokens": 8, "ablate": "minimal"}
    for part in ("steering", "samples"):
        del values[part]
    config = ExperimentConfig.model_validate(values)
    run_experiment(config, tmp_path / "run")
    found = planned(config)
    assert 0.8 * found["answers"] <= counted["answers"] <= found["answers"]
    # At most: not every role has adapters here.
    assert 0.8 * found["interpretation"] <= counted["adapters"] <= 1.02 * found["interpretation"]
