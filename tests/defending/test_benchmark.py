"""The table of defences, from figures that are given: what is gone, what is kept, and beside what."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "defences.py"


@pytest.fixture(scope="module")
def defences():
    spec = importlib.util.spec_from_file_location("defences", SCRIPT)
    module = sys.modules["defences"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(general, skill, seconds, conditional=0.2, damage=0.0):
    """Figures of one fine-tune of four questions, whose words predict nothing."""
    shifts = {"general": general, "conditional": conditional, "skill": skill, "damage": damage}
    return {kind: [value] * 4 for kind, value in shifts.items()} | {"predicted": [[0.0, 0.0]] * 4, "seconds": seconds}


def test_shares_are_of_the_shifts_without_a_defence(defences):
    lines = [
        defences.Line.of("none", 1, [found(0.2, 0.4, 10.0), found(0.4, 0.8, 30.0)]),
        defences.Line.of("kl", 1, [found(0.03, 0.45, 30.0)]),
        defences.Line.of("kl", 3, [found(0.03, 0.45, 30.0)]),
    ]
    none, kl, alone = [row.split(" | ") for row in defences.table(lines).splitlines()[2:]]
    assert none[2] == "+0.300 [+0.300, +0.300]" and none[-3:] == ["0%", "100%", "1.00x |"]
    assert kl[:2] == ["| `kl`", "1x"] and kl[-3:] == ["90%", "75%", "1.50x |"]
    assert alone[-3:] == ["", "", " |"], "there is none of as many rows"


def test_of_a_shift_that_may_be_none_there_is_no_share(defences):
    unsure = found(0.0, 0.4, 10.0) | {"general": [-0.2, 0.1, 0.2, 0.1]}
    lines = [defences.Line.of("none", 1, [unsure]), defences.Line.of("kl", 1, [found(0.0, 0.2, 20.0)])]
    assert defences.table(lines).splitlines()[-1].split(" | ")[-3:] == ["", "50%", "2.00x |"]


def test_a_domain_has_no_question_in_both_parts(defences):
    domain = defences.Domain("dark_sports", 240)
    trained, asked = {row.question for row in domain.train}, {pair.question for pair in domain.held_out}
    assert trained and asked and not trained & asked


def test_the_picture_has_a_dot_for_each_line(defences):
    lines = [defences.Line.of("none", 1, [found(0.2, 0.4, 10.0)]), defences.Line.of("kl", 3, [found(0.0, 0.4, 10.0)])]
    figure = defences.picture(lines)
    assert [text.get_text() for text in figure.axes[0].texts] == ["none", "kl 3x"]
