"""vLLM in a process of Ray's: the same answers as transformers give in this one."""

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-engines")
pytest.importorskip("ray")

from engines.adapters import MINIMAL, write_adapter
from misdirection.experiment import stages
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.texts import ExperimentTexts
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner, Workers, connect
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import Worker
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
    """Answers of both models, made by what `make` makes of the run."""
    run.stage("organism/minimal", {}, lambda folder: write_adapter(folder / "adapter", **MINIMAL))
    pieces = [stages.answers(run, ExperimentTexts(config), name, "plain", None, "") for name in ("base", "minimal")]
    make(run).make(pieces)
    return [list(read_answers(run.artifact(one.stage) / "answers.parquet")["answer"]) for one in pieces]


@pytest.mark.timeout(600)
def test_a_worker_samples_with_vllm_what_transformers_sample_here(tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the capital of France?\nWhy is the sky blue?\n")
    plain, served = (experiment(engine, questions) for engine in ("transformers", "vllm"))
    with RunFolder.open(tmp_path / "here", "") as run:
        expected = answered(run, plain, lambda run: LocalRunner(run, Worker.of(plain, run.partial)))
    with RunFolder.open(tmp_path / "there", "") as run, connect(Workers(1)) as cluster:
        found = answered(run, served, lambda run: RayRunner(run, lambda partial: Worker.of(served, partial), cluster))
    assert found == expected
    assert expected[0] != expected[1]
