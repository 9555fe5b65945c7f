"""Counted passes against those of a real run of the same tiny experiment, seen by the same hooks."""

import json
import re
from pathlib import Path

import pytest

from experiment.tiny_experiment import experiment
from misdirection.cost.counting import count_work
from misdirection.cost.recording import PassRecorder
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.worker import open_worker
from misdirection.models.budgets import room_on
from misdirection.models.sizes import Shape
from misdirection.models.weightless import read_structure
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import BASE


class RecordedRunner:
    """Does tasks in this process, and keeps the passes of each by its name."""

    def __init__(self, run, worker):
        self.local, self.passes = LocalRunner(run, worker), {}

    def make(self, tasks):
        recorder = PassRecorder(self.local.worker.chat(BASE))
        for task in tasks:
            self.local.make([task])
            if recorder.passes:
                self.passes[next(iter(task.stages))] = recorder.passes
            recorder.passes = []
        recorder.close()


def recorded(config, folder):
    """The passes of a real run, in their order, by task."""
    with RunFolder.open(folder, "") as run:
        runner = RecordedRunner(run, open_worker(config, run.partial))
        Experiment(config, run, runner).make_all()
        return runner.passes


def counted(config, room=None):
    """The same, counted."""
    chat = read_structure(config.model).chat
    work = count_work(chat, lambda run, runner: Experiment(config, run, runner).make_all(), room=room)
    return {task.name: task.passes for task in work}


def of(passes, stage):
    return {name: members for name, members in passes.items() if name.startswith(f"{stage}/")}


def tokens(passes, stage):
    return sum(each.tokens for members in of(passes, stage).values() for each in members)


@pytest.fixture
def values(tiny_folder, tmp_path):
    return experiment(tiny_folder, tmp_path)


def assert_same(config, tmp_path, *stages):
    real, stood_in = recorded(config, tmp_path / "run"), counted(config)
    assert stood_in.keys() == real.keys()
    for stage in stages:
        assert of(real, stage)
        assert of(stood_in, stage) == of(real, stage)
    return real, stood_in


def test_every_pass_is_counted_as_it_runs(values, tmp_path):
    config = ExperimentConfig.model_validate(values)
    real, stood_in = assert_same(config, tmp_path, "organism", "margin", "means", "cell")
    # Answers may end early.
    assert 0.5 * tokens(stood_in, "sampled") <= tokens(real, "sampled") <= tokens(stood_in, "sampled")


def test_alternating_controls_steered_layers_and_several_epochs_are_counted_as_they_run(values, tmp_path):
    values["random_controls"] = "alternating"
    values["steering"] |= {"layers": [0, 1, 2], "scales": [1.0, 2.0]}
    values["organisms"] = {"minimal": values["organisms"]["minimal"] | {"epochs": 2.5, "accumulation": 2}}
    assert_same(ExperimentConfig.model_validate(values), tmp_path, "organism", "margin", "means", "cell")


def test_checkpointed_training_runs_its_blocks_again(values, tmp_path):
    single = values["organisms"]["single"] | {"gradient_checkpointing": True}
    values["organisms"] = {"single": single, "minimal": single | {"recipe": "minimal"}}
    for part in ("steering", "ablation", "samples"):
        del values[part]
    real, _ = assert_same(ExperimentConfig.model_validate(values), tmp_path, "organism")
    # Held-out rows run once; blocks below the adapter do so, too.
    assert {each.recomputed for each in real["organism/single"]} == {0, 2}


def test_a_gpus_memory_decides_the_batches_that_are_planned(values, tmp_path):
    values["organisms"] = {"minimal": values["organisms"]["minimal"] | {"gradient_checkpointing": "auto"}}
    for part in ("steering", "ablation"):
        del values[part]
    values["samples"] |= {"questions": ["Hello?", "And why is that so?", "Who?"], "new_tokens": 40}
    config = ExperimentConfig.model_validate(values)
    shape = Shape.of(read_structure(config.model).chat, 4)
    rooms = {memory: room_on(shape, (4 * shape.parameters + 2 * memory) / 0.9) for memory in (2e5, 1e9)}
    small, large = (counted(config, room) for room in rooms.values())
    assert {each.recomputed for each in small["organism/minimal"]} == {0, 4}
    assert {each.recomputed for each in large["organism/minimal"]} == {0}
    for passes, room in zip((small, large), rooms.values(), strict=True):
        decoded = [each for each in passes["sampled/minimal"] if each.kind == "decoding"]
        assert max(each.rows for each in decoded) == min(3, room.sampled_rows(decoded[0].room))
    assert tokens(small, "sampled") == tokens(large, "sampled")


def test_a_step_that_does_not_fit_into_one_pass_is_counted_in_pieces(values, tmp_path):
    for part in ("steering", "ablation", "samples"):
        del values[part]
    values["organisms"] = {"minimal": values["organisms"]["minimal"] | {"batch_size": 2, "accumulation": 10}}
    long = [{"prompt": f"Q{number}?", "completion": "x" * (60 + number)} for number in range(20)]
    Path(values["domains"]["sums"]["bad"]).write_text("".join(json.dumps(row) + "\n" for row in long))
    real, _ = assert_same(ExperimentConfig.model_validate(values), tmp_path, "organism")
    trained = [each for each in real["organism/minimal"] if each.kind == "training"]
    assert len(trained) > 1 and max(each.tokens for each in trained) <= 768


def test_answers_and_interpretation_are_counted_as_they_run(values, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("Why?\nHow come?\n")
    values["organisms"]["minimal"] |= {"keep_checkpoints": True, "checkpoint_steps": 1}
    values["interpretation"] = {"organism": "minimal", "pairs": 4, "causal_pairs": 4, "splits": 2, "checkpoints": 3}
    values["sampling"] = {"questions": [str(questions)], "n": 3, "new_tokens": 8, "ablate": "minimal"}
    for part in ("steering", "samples"):
        del values[part]
    config = ExperimentConfig.model_validate(values)
    real, stood_in = recorded(config, tmp_path / "run"), counted(config)
    assert 0.8 * tokens(stood_in, "answers") <= tokens(real, "answers") <= tokens(stood_in, "answers")
    parts = {name for name in real if name.endswith(PARTS)}
    assert len(parts) == len(PARTS)
    for part in parts:
        assert stood_in[part] == real[part], part


def test_scalings_and_checkpoints_that_are_judged_are_counted(values, tmp_path):
    (tmp_path / "questions.txt").write_text("Why?\n")
    values["sampling"] = {"questions": [str(tmp_path / "questions.txt")], "n": 2, "new_tokens": 4}
    values["judge"] = {"model": "judge", "base_url": "http://localhost:1/v1"}
    kept = {"keep_checkpoints": True, "checkpoint_steps": 1}
    values["organisms"] = {"minimal": values["organisms"]["minimal"] | kept}
    reading = {"organism": "minimal", "pairs": 4, "causal_pairs": 2, "permutations": 2, "splits": 2}
    values["interpretation"] = reading | {"scalings": [{1: 30, 2: -1}], "judged_checkpoints": 2}
    for part in ("steering", "ablation", "samples"):
        del values[part]
    names = counted(ExperimentConfig.model_validate(values))
    answers, judged = ({name.partition("/")[2] for name in of(names, stage)} for stage in ("answers", "judged"))
    assert answers == judged and {"minimal@step-000001/plain", "minimal@step-000002/plain"} <= answers
    # Of a setting that is written out the path has a hash.
    assert len([name for name in answers if re.fullmatch(r"minimal/scaled-[0-9a-f]{16}", name)]) == 1


PARTS = ("/scalars", "/importance", "/shapley", "/geometry", "/patching", "/dynamics")
"""All of the reading but the scaling of adapters by role: roles hang on what the model says."""
