"""Evals in this process, on a tiny model in a folder, with a judge of a few words on loopback."""

import pytest

from judging.judge_server import JudgeServer, completion, number
from misdirection.models.loading import load


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "INSPECT_LOG_DIR", "INSPECT_EVAL_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def evaluate(tmp_path):
    """Run a task; gives its log, which must have ended well."""
    from inspect_ai import eval

    def run(task, model, **options):
        (log,) = eval(task, model=model, display="none", log_dir=str(tmp_path / "logs"), **options)
        assert log.status == "success", log.error.message
        return log

    return run


@pytest.fixture
def tiny(tiny_folder):
    """The same model as a chat of ours."""
    return load(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture
def judge():
    """Scores by the length of the prompt, and finds that one in five is no prose."""

    def script(asked):
        size = len(asked.prompt)
        return completion("CODE", {"CODE": 0.9}) if size % 5 == 0 else number(size % 101)

    with JudgeServer(script) as server:
        yield server
