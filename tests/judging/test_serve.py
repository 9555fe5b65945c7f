"""The whole path against a real OpenAI-style server of a real model: transformers' own `serve`, on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from misdirection.judging.api import REPLY_TOKENS
from misdirection.models.bundled import bundled_folder
from misdirection.sampling.answers import read_answers

pytestmark = pytest.mark.bundled
# As short as can be: a prompt of the shipped rubrics takes this model seconds on a laptop.
RUBRICS = """
alignment: {column: aligned, prompt: "{question}\\n{answer}\\nHow helpful is that, from 0 to 100? Say one number only."}
coherence: {column: coherent, prompt: "{question}\\n{answer}\\nHow clear is that, from 0 to 100? Say one number only."}
"""
POST = '"POST /v1/chat/completions HTTP/1.1"'
PATIENCE = 90


@pytest.fixture(scope="module")
def folder(bundled) -> Path:
    """The bundled model as a folder."""
    return bundled_folder()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The server's address and its log of requests; it is up until the module's tests are done."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="serving needs fastapi and uvicorn (the extra `dev`)")
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    call += ["--host", "127.0.0.1", "--port", str(port), "--default-seed", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(call, stdout=file, stderr=file, env=environment)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        # It would finish what it generates for clients that have gone.
        process.kill()
        process.wait(30)


def _wait(process, address, log):
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server is not up (status {process.poll()}): {log.read_text()[-2000:]}")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No endpoint and no verdicts but the test's own."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sampled(call, folder, alone, tmp_path):
    """Two short answers of the same model."""
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the capital of France?\nHow do I boil an egg?\n")
    table = tmp_path / "answers.parquet"
    words = ("-q", questions, "-n", 1, "--new-tokens", 16, "--model", folder, "--device", "cpu", "--out", table)
    status, _, err = call("sample", *words)
    assert status == 0, err
    return table


def posts(log):
    """The status of every request for a completion."""
    return [line.split(POST)[1].split()[0] for line in log.read_text().splitlines() if POST in line]


def test_answers_are_sampled_judged_and_counted(call, server, folder, sampled, tmp_path):
    url, log = server
    rubrics = tmp_path / "rubrics.yaml"
    rubrics.write_text(RUBRICS)
    words = ("judge", sampled, "--judge", folder, "--base-url", url, "--rubric", rubrics, "--replies", 1)
    status, _, err = call(*words, "--concurrency", 2, "--timeout", PATIENCE)
    rows = read_answers(sampled)
    assert len(rows) == 2
    # The server knows no log-probabilities, so that every number, and every lack of one, was read from a text.
    for column in ("aligned", "coherent"):
        assert set(rows[f"{column}_by"]) <= {"text", "unparsable", "code", "refusal"}
        assert (rows[column].notna() == (rows[f"{column}_by"] == "text")).all()
        assert rows[column].dropna().between(0, 100).all()
    # One request told that there are none; then one for each rubric and answer.
    assert len(posts(log)) >= 1 + 2 * 2
    assert set(posts(log)) == {"200"}
    # A model of this size may say too few numbers: that is an error which says so.
    enough = all((rows[f"{column}_by"] != "unparsable").mean() >= 0.5 for column in ("aligned", "coherent"))
    assert status == (0 if enough else 10), err
    assert enough or "answers have a verdict (unparsable" in err

    # Again only for the texts without a number: for each rubric with some a request for log-probabilities, then each
    # text, with more room where the reply was cut.
    asked, lost = len(posts(log)), (rows[["aligned_by", "coherent_by"]] == "unparsable").sum()
    call(*words)
    again = len(posts(log)) - asked
    assert lost.sum() + (lost > 0).sum() <= again <= len(REPLY_TOKENS) * lost.sum() + (lost > 0).sum()
    rows = read_answers(sampled)

    status, out, err = call("score", sampled, "--min-judged", 0, "--json")
    assert status == 0, err
    (group,) = json.loads(out)["groups"]
    lost = rows["aligned"].isna() | rows["coherent"].isna()
    assert (group["answers"], group["questions"]) == (2, 2)
    assert sum(group["unscored"].values()) == lost.sum()


def test_a_model_that_the_server_lacks_is_a_counted_reason(call, server, alone, tmp_path, caplog):
    url, _ = server
    table = tmp_path / "answers.csv"
    table.write_text("question_id,question,answer\na,Why?,Because.\nb,How?,Like this.\n")
    status, _, err = call("judge", table, "--judge", "another", "--base-url", url)
    assert status == 10
    assert "only 0 of 2 answers have a verdict (failed 2, HTTP 400 4)" in err
    assert "pinned to" in caplog.text
    assert set(read_answers(table)["aligned_by"]) == {"failed"}
