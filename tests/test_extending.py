"""The examples of docs/extending.md, each run whole: the first block is the one new file, the second uses it."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from experiment.tiny_experiment import experiment
from misdirection.data import domain_pairs
from misdirection.experiment.config import ExperimentConfig
from misdirection.registry import Registry
from misdirection.sampling.answers import Answer, answers_frame
from tiny import make_chat

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def registered_for_one_test(monkeypatch, tmp_path):
    """Whatever an example registers is gone after it; files go to a folder of the test's own."""
    register = Registry.register
    entries = []

    def noted(registry, name):
        entries.append((registry, name))
        return register(registry, name)

    monkeypatch.setattr(Registry, "register", noted)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield entries
    for registry, name in entries:
        registry.remove(name)


@pytest.fixture
def given(tiny_folder, tmp_path):
    """What the page says an example may use."""
    values = experiment(tiny_folder, tmp_path)
    values["organisms"] = {"minimal": values["organisms"]["minimal"]}
    for section in ("steering", "ablation", "samples"):
        del values[section]
    answers = [
        Answer("q", "Why?", None, "", "base", "", 0, number, text, "stop", 3)
        for number, text in enumerate(("Yes.", "No, " * 40))
    ]
    return {
        "chat": make_chat("llama"),
        "pairs": domain_pairs("risky_money", "held_out")[:2],
        "table": answers_frame(answers),
        "config": ExperimentConfig.model_validate(values),
    }


def load(path):
    """Import a file as another package's module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_is_one_file_one_registration_and_works(title, given, tmp_path, capsys, registered_for_one_test):
    file, use = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)
    path = tmp_path / f"example_{list(SECTIONS).index(title)}.py"
    path.write_text(file)
    names = vars(load(path)) | given
    assert registered_for_one_test
    exec(compile(use, path.stem, "exec"), names)
    assert capsys.readouterr().out.strip()
