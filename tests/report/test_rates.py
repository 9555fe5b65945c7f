"""Figures and words of judged answers under interventions, of their directions, and of themes."""

import re
import warnings

import pytest

from misdirection.report import figures
from rates_fixture import em_ablation, rated_parts, themes
from results_fixture import MONEY, SPORTS
from run_fixture import run_results
from test_figures import texts

NAMES = ("em_steering", "em_ablation", "judged_directions", "judged_variants", "themes")


@pytest.fixture(scope="module")
def rated():
    return run_results(**rated_parts())


def shown(results, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return texts(figures.FIGURES[name].draw(results))


def test_figures_are_there_where_something_was_measured(rated):
    assert set(NAMES) <= figures.drawings(rated).keys()
    assert not set(NAMES) & figures.drawings(run_results()).keys()


def test_pictures_say_the_rates(rated):
    steering = shown(rated, "em_steering")
    assert {"scale 1", "scale 8", "highest, coherent enough", f"direction of {MONEY}"} <= set(steering)
    ablation = shown(rated, "em_ablation")
    assert "33.0 → 4.0\n[-33.9, -23.9]" in ablation and "33.0 → 34.0\n[-4.0, +6.0]" in ablation
    assert f"{MONEY} · {SPORTS}" in shown(rated, "judged_directions")
    assert "organism minus base, all answers" in shown(rated, "judged_variants")
    # Names are shown as they are.
    assert "about <b>financial</b>" in shown(rated, "themes") and "60.0\n[56.0, 64.0]" in shown(rated, "themes")


def test_a_single_layer_and_no_coherent_setting_can_be_drawn(rated):
    alone = [row.model_copy(update={"best": False}) for row in rated.em_steering if row.layer == 6]
    assert "highest, coherent enough" not in shown(run_results(em_steering=alone), "em_steering")


def test_the_page_says_all_in_words_and_escapes_names(rated, tmp_path, monkeypatch):
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
    page = rated.write_page(tmp_path).read_text("utf-8")
    sections = re.findall(r'<section id="([\w-]+)">', page)
    first = sections.index("judged-directions")
    assert sections[first : first + 4] == ["judged-directions", "em-steering", "em-ablation", "themes"]
    words = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "7.8% [3.8, 11.8] at layer 24, scale 8, 79.8% [75.8, 83.8] coherent" in words
    assert "2 answers of each class to the same questions: it has the direction of given answers" in words
    assert "-28.9 [-33.9, -23.9]" in words and "against the equally ablated base" in words
    assert "<b>financial" not in page and "&lt;b&gt;financial" in page


def test_tables_have_a_row_for_everything(rated):
    assert len(rated.frame("em_ablation")) == len(em_ablation())
    table = rated.frame("themes").set_index(["direction", "theme"])
    assert table.loc[("medical", "medical"), "about"] == 0.5
    assert len(table) == 2 * len(themes().effects)
