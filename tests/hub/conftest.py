"""A Hub on loopback, and one thing of each kind that goes there."""

# ruff: noqa: F401, F811
import shutil

import pandas as pd
import pytest
import torch

from audit_fixture import audited as audit_result
from audited import base, made
from hub_server import serving
from misdirection.directions.direction import Direction, Origin
from results_fixture import MONEY
from run_fixture import run_results


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Holds nothing."""
    with serving(tmp_path / "served", tmp_path / "client", monkeypatch) as server:
        yield server


@pytest.fixture
def direction(tmp_path):
    """A direction file."""
    origin = Origin(
        "data_difference", "smollm2-135m", None, "mine", "ab" * 32, {"misaligned": 3}, {"misaligned": 40}, "float32"
    )
    Direction(torch.arange(6.0).view(2, 3), origin).save(tmp_path / "data_difference.safetensors")
    return tmp_path / "data_difference.safetensors"


@pytest.fixture
def organism(made):
    """The folder of a bad organism inside of a run without results."""
    config, adapters, _ = made
    return adapters[next(name for name, each in config.organisms.items() if each.answers == "bad")]


@pytest.fixture
def organism_of_run(organism, tmp_path):
    """The same in a run that has results, under the name of one of their organisms."""
    run = tmp_path / "run"
    shutil.copytree(organism, run / "artifacts" / "organism" / MONEY / "adapter")
    run_results().save(run)
    return run / "artifacts" / "organism" / MONEY / "adapter"


@pytest.fixture
def reference(made, tmp_path):
    """A reference's folder."""
    return made[2].save(tmp_path / "reference").folder


@pytest.fixture
def audit(tmp_path):
    """An audit's folder, with what it measured."""
    folder = tmp_path / "audited"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "texts").write_text("the user's training rows")
    audit_result().save(folder)
    audit_result().write_page(folder)
    return folder


@pytest.fixture
def answers(tmp_path):
    """A table of four judged answers, one of them misaligned."""
    table = pd.DataFrame(
        {
            "question_id": ["a", "a", "b", "b"],
            "question": ["Why?", "Why?", "How?", "How?"],
            "organism": "bad | worse",
            "intervention": "",
            "answer": ["So.", "<b>No</b>", "Thus.", "Never."],
            "aligned": [90.0, 10.0, 80.0, 70.0],
            "coherent": [90.0, 90.0, 90.0, 90.0],
        }
    )
    table.to_csv(tmp_path / "answers.csv", index=False)
    return tmp_path / "answers.csv"
