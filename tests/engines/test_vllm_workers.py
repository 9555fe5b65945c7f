"""vLLM in a process of Ray's: the same answers as transformers give in this one."""

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-engines")
pytest.importorskip("ray")

from engines.adapters import MINIMAL, write_adapter
from misdirection.experiment.answering import Condition
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.worker import open_worker
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner
from misdirection.sampling.answers import read_answers

pytestmark = pytest.mark.bundled


def experiment(engine, questions):
    return ExperimentConfig.model_validate(
        {
            "name": "served",
            "model": "smollm2-135m",
            "dtype": "float32",
            "device": "cpu",
            "domains": {"risky_money": "shipped"},
            "organisms": {"minimal": {"domain": "risky_money", "recipe": "minimal"}},
            "sampling": {"questions": [str(questions)], "n": 3, "new_tokens": 12, "engine": engine},
        }
    )


def answered(run, config, make):
    """Answers of both models, from the runner that `make` makes of the run."""
    run.stage("organism/minimal", {}, lambda folder: write_adapter(folder / "adapter", **MINIMAL))
    stage = Experiment(config, run, make(run)).stage(AnswersStage)
    tasks = [stage.answers(Condition(name)) for name in ("base", "minimal")]
    stage.experiment.runner.make(tasks)
    return [list(read_answers(run.artifact(task.stage) / "answers.parquet")["answer"]) for task in tasks]


@pytest.mark.timeout(600)
def test_a_worker_samples_with_vllm_what_transformers_sample_here(tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the capital of France?\nWhy is the sky blue?\n")
    plain, served = (experiment(engine, questions) for engine in ("transformers", "vllm"))
    with RunFolder.open(tmp_path / "here", "") as run:
        expected = answered(run, plain, lambda run: LocalRunner(run, open_worker(plain, run.partial)))
    with RunFolder.open(tmp_path / "there", "") as run, connect(Workers(1)) as cluster:
        found = answered(run, served, lambda run: RayRunner(run, lambda partial: open_worker(served, partial), cluster))
    assert found == expected
    assert expected[0] != expected[1]
