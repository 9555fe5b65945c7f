"""Organisms as solutions of their training domain, in the words and pictures of a report."""

import math
from html import unescape

import pytest

from misdirection.experiment.solution_results import (
    NoisyUpdate,
    Phase,
    ScaledUpdate,
    Solution,
    SolutionDifference,
    SolutionFigures,
)
from misdirection.report.solutions import draw_phases, draw_solutions, statements
from run_fixture import estimate, run_results
from test_figures import texts

NORMS = (1.0, 2.0, 4.0)
SHIFTS = {"broad": (0.1, 0.2), "narrow": (0.0, 0.01), "relapsed": (0.1, 0.15), "stray": (0.3, 0.4)}
CONTINUES = {"relapsed": "narrow", "stray": "unmeasured"}


def scaled(norm):
    return ScaledUpdate(norm=norm, loss=estimate(2 - 0.1 * norm), loss_change=estimate(-0.1 * norm), kl=estimate(0.2))


def solution():
    noisy = [NoisyUpdate(noise=size, loss_rise=estimate(size), between=0.02) for size in (0.5, 2.0)]
    return Solution(domain="risky_money", answers="bad", own=scaled(3.0), scaled=[*map(scaled, NORMS)], noisy=noisy)


def solutions(measure="efficiency", differences=(0.3, 0.4, 0.5), reach=0.1):
    """Differences of `narrow` from `broad` at each norm; `relapsed` goes on from `narrow`."""
    return SolutionFigures(
        seeds=3,
        solutions={name: solution() for name in SHIFTS},
        differences=[
            SolutionDifference(measure=measure, organism="narrow", at=norm, difference=estimate(mean, reach))
            for norm, mean in zip(NORMS, differences, strict=True)
        ],
        phases={
            name: Phase(
                continues=CONTINUES.get(name),
                steps=[5, 10],
                shift={questions: [*map(estimate, shifts)] for questions in ("general", "risky_money")},
                drift={"general": estimate(0.3), "sealed": estimate(0.05)} if name in CONTINUES else {},
            )
            for name, shifts in SHIFTS.items()
        },
    )


@pytest.mark.parametrize(
    ("measure", "differences", "words"),
    [
        ("efficiency", (0.3, 0.4, 0.5), "broad is the more efficient solution than narrow: its loss on the domain at"),
        ("efficiency", (-0.3, -0.4, 0.0), "narrow is the more efficient solution than broad"),
        ("stability", (0.3, 0.4, 0.5), "broad is the more stable solution than narrow: its rise of that loss under"),
        ("significance", (0.3, 0.4, 0.5), "narrow is of more weight for neutral text than broad: its KL divergence at"),
        ("efficiency", (0.05, 0.0, -0.05), "narrow is not surely another at any of 3 norms. At the largest, 4, narrow"),
        ("efficiency", (-0.3, 0.0, 0.3), "Neither narrow nor broad is the more efficient solution: the loss on the"),
        ("efficiency", (-0.3, 0.0, 0.3), "is lower at 1 and higher at 1 of 3 norms"),
        ("efficiency", (0.3, 0.4, 0.05), "lower for sure at 2 of 3 norms"),
    ],
)
def test_what_was_found_is_said(measure, differences, words):
    assert words in statements(solutions(measure, differences))[0]


def test_a_drift_is_read_on_the_questions_that_nothing_was_chosen_on():
    (said,) = (each for each in statements(solutions()) if "relapsed" in each)
    assert said.startswith("Going on from narrow, relapsed did not surely drift towards misaligned answers on sealed")
    assert "general +0.300 [+0.200, +0.400], n=40" in said


def test_pictures_show_every_organism_with_its_intervals():
    results = run_results(solutions=solutions())
    drawn = draw_solutions(results)
    assert [axes.get_title() for axes in drawn.axes] == ["efficiency", "stability", "significance"]
    assert set(SHIFTS) <= set(texts(drawn))
    assert all(len(axes.containers) == len(SHIFTS) for axes in drawn.axes)
    table = results.frame("solutions")
    assert table["norm"].count() == len(SHIFTS) * (1 + len(NORMS)) and table["loss_rise"].count() == len(SHIFTS) * 2


def test_a_training_that_goes_on_begins_where_the_other_ended():
    drawn = draw_phases(run_results(solutions=solutions()))
    assert "relapsed, from narrow on" in texts(drawn)
    lines = [line.get_xydata().tolist() for line in drawn.axes[0].lines if len(line.get_xdata()) == 3]
    assert [[0.0, 0.0], [5.0, 0.1], [10.0, 0.2]] in lines
    assert [[10.0, 0.01], [15.0, 0.1], [20.0, 0.15]] in lines
    # Where the other one was not followed, nobody knows where.
    assert any(line[1:] == [[5.0, 0.3], [10.0, 0.4]] and math.isnan(line[0][1]) for line in lines)


def test_the_page_has_the_section_only_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
    page = unescape(run_results(solutions=solutions()).write_page(tmp_path).read_text("utf-8"))
    assert "broad is the more efficient solution than narrow" in page and page.count('href="#solutions"') == 1
    plain = run_results().write_page(tmp_path / "plain").read_text("utf-8")
    assert "solutions" not in plain
