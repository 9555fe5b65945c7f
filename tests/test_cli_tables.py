"""What a person sees on the screen: no cell is cut, and a figure is shown as what it is."""

import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch

from misdirection.cli import shared
from misdirection.directions.direction import Direction, Origin
from tiny import LAYERS, vector

LONG = "a-fine-tune-on-bad-medical-advice_of-a-very-long-name-seed-12345"
KINDS = (
    "base_data_difference",
    "data_difference",
    "model_difference",
    "model_difference_aligned",
    "model_difference_misaligned",
)


@pytest.fixture(params=[60, 80, 200])
def columns(request, monkeypatch):
    """Characters in a line of the screen."""
    monkeypatch.setattr(shared.out, "_width", request.param)
    return request.param


@pytest.fixture
def answers(tmp_path):
    rows = [
        {"question_id": f"q{number % 2}", "question": "Why?", "answer": f"So {number}.", "organism": organism}
        | {"intervention": "ablate data_difference layer 18 not_first", "aligned": 20.0 + 60 * (number % 2)}
        | {"coherent": 90.0, "seed": number, "finish": "stop"}
        for organism in ("base", LONG)
        for number in range(8)
    ]
    path = tmp_path / "answers.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def squeezed(text):
    """The text without what a table draws around its cells."""
    return re.sub(r"[\s│┃┏┓┗┛━┳┻╇┡┩─└┘┴]", "", text)


def test_scores_keep_all_their_columns(call, answers, columns):
    status, out, _ = call("score", answers)
    assert status == 0
    assert "…" not in out and max(map(len, out.splitlines())) <= columns
    for heading in ("organism", "intervention", "EM %", "95%", "among coherent %", "cut %", "unscored"):
        assert heading in out
    assert out.count("50.0") >= 2 and out.count("16" if "16" in out else "8") >= 2
    if columns < 200:
        assert LONG in squeezed(out)


def test_directions_of_one_extraction_are_compared_readably(call, tmp_path, columns):
    paths = []
    for number, kind in enumerate(KINDS):
        paths.append(tmp_path / f"{kind}.safetensors")
        origin = Origin("data_difference", "tiny", None, "", "", {}, {}, "float32")
        Direction(vector(number, 1.0, LAYERS), origin).save(paths[-1])
    status, out, _ = call("compare", *paths)
    assert status == 0
    assert "…" not in out
    assert all(f"{path}" in out for path in paths)
    cosines = re.findall(r"[+-]\d\.\d{3}", out)
    assert len(cosines) == 10 * LAYERS
    expected = torch.cosine_similarity(vector(0, 1.0, LAYERS)[0], vector(1, 1.0, LAYERS)[0], dim=0)
    assert cosines[0] == f"{expected:+z.3f}"
    tables = out[out.index("layer") :]
    assert max(map(len, tables.splitlines())) <= columns


FIGURES = {
    "margin_shift": {"mean": -0.0004, "low": -0.01, "high": 0.02, "n": 120, "p": None},
    "neutral_loss": {"mean": 2.5, "low": 2.25, "high": 2.75, "n": 40, "p": None},
    "auc": 0.457,
    "after": -0.0,
    "epochs": 3.0,
    "held_out_loss": None,
    "untied": False,
    "by": {"aligned": {"logprobs": 4, "text": 2}},
    "failures": {},
}


def test_figures_are_shown_as_what_they_are(capsys):
    shared.print_figures(FIGURES, as_json=False, unit="nats/token")
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines() if "│" in line]
    assert cells == [
        ["margin shift", "+0.000 [-0.010, +0.020], n=120"],
        ["neutral loss", "2.500 [2.250, 2.750], n=40"],
        ["auc", "0.457"],
        ["after", "0"],
        ["epochs", "3"],
        ["held out loss", "not measured"],
        ["untied", "no"],
        ["by", "aligned logprobs 4, text 2"],
        ["failures", "none"],
    ]
    assert out.splitlines()[-1].startswith("nats/token; in brackets 95% intervals")


def test_a_warning_is_one_line_and_says_that_it_is_one_and_information_says_nothing_of_the_kind(tmp_path):
    program = (
        "import logging, misdirection.cli as cli; cli._set_up_messages(); log = logging.getLogger('misdirection'); "
        "log.warning('%s', 'w' * 90); log.info('judging takes 3 calls')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "60"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.stdout, ended.stderr) == ("", f"warning: {'w' * 90}\njudging takes 3 calls\n")
