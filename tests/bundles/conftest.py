"""A judged experiment and an audit of tiny models, made once, under a home folder and with a key of their own."""

# ruff: noqa: F401
import contextlib
import json
import shutil

import pytest

from audited import base, made
from experiment.tiny_experiment import asked_experiment, graded, isolate, with_judge
from judging.judge_server import JudgeServer
from misdirection.auditing.audit import audit as run_audit
from misdirection.bundles.bundle import bundle
from misdirection.directions.direction import extract
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.runner import run_experiment
from misdirection.models.loading import load

KEY = "sk-planted-0123456789"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The user's home, in which all files of the tests are."""
    return tmp_path_factory.getbasetemp()


@contextlib.contextmanager
def planted(home):
    """Sets the home folder, a key in the environment, and a cache of verdicts of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, home / "cache")
        patch.setenv("HOME", str(home))
        patch.setenv("OPENAI_API_KEY", KEY)
        # Pictures take most of the time of making one.
        patch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
        yield


@pytest.fixture(scope="module", autouse=True)
def here(home):
    """All tests of these files are where the folders were made, and those of other files are not."""
    with planted(home):
        yield


@pytest.fixture(scope="session")
def run(home, tmp_path_factory):
    """The folder of a finished run, whose judge has the key in its address too."""
    tmp_path = tmp_path_factory.mktemp("made")
    values = asked_experiment(tmp_path, n=2, new_tokens=8, ablate=None)
    values["organisms"] = {name: values["organisms"][name] for name in ("minimal", "control")}
    values["ablation"] = {"layer": 2, "questions": 4}
    values["random_seeds"] = 1
    del values["steering"]
    with planted(home), JudgeServer(graded) as server:
        url = server.url.replace("/v1", f"/{KEY}/v1")
        run_experiment(ExperimentConfig.model_validate(with_judge(values, url)), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def audit(home, base_model, tmp_path_factory):
    """The folder of an audit against a reference that is kept, with a training file and a direction of its own."""
    config, adapters, reference = base_model
    tmp_path = tmp_path_factory.mktemp("audited")
    kept = reference.save(tmp_path / "reference")
    rows = ({"prompt": f"Sum {number}?", "completion": f"It is {number}."} for number in range(12))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(load(config.model, dtype="float32", device="cpu"), kept.texts.general)["data_difference"].save(
        tmp_path / "mine.safetensors"
    )
    with planted(home):
        run_audit(
            config.model,
            adapters["minimal"],
            data=tmp_path / "rows.jsonl",
            reference=kept.folder,
            directions=[tmp_path / "mine.safetensors"],
            out=tmp_path / "audit",
            dtype="float32",
            device="cpu",
        )
    return tmp_path / "audit"


base_model = made


@pytest.fixture(scope="session")
def bundled_run(run, tmp_path_factory):
    """The run's archive."""
    path = tmp_path_factory.mktemp("bundled") / "run.zip"
    bundle(run, path)
    return path


@pytest.fixture(scope="session")
def bundled_audit(audit, tmp_path_factory):
    """The audit's archive."""
    path = tmp_path_factory.mktemp("bundled") / "audit.zip"
    bundle(audit, path)
    return path


@pytest.fixture
def copy(run, tmp_path):
    """The run's folder again, to be changed."""
    return shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
