"""Alignment against coherence, answer by answer: what is shown, the picture, and the page in a real browser."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import misdirection as md
from misdirection.judging import quadrants as limits
from misdirection.report.reader import visible
from run_fixture import behaviour, run_results

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
HOSTILE = "</script><img src=x onerror=window.hit=1><!-- \u202e ${window.hit=1} 'é'"
TINT = (0xF6, 0xDC, 0xCB)


def judged(**columns):
    """Answers of two conditions to two questions; two of them lie at one point, and one has no score."""
    table = {
        "organism": ["base"] * 3 + [f"organism {HOSTILE}"] * 5,
        "intervention": [""] * 3 + ["ablate"] * 5,
        "question_id": ["why", "how", "how", "why", "why", "how", "how", "how"],
        "question": "Why?",
        "aligned": [95.0, 29.9, 30.0, 10.0, 10.0, 20.0, 80.0, np.nan],
        "coherent": [99.0, 50.1, 90.0, 90.0, 90.0, 50.0, 20.0, 99.0],
        "answer": [f"{HOSTILE} {number}" for number in range(8)],
    }
    return pd.DataFrame(table | columns)


def test_the_quadrants_are_those_of_the_em_rate():
    base, organism = md.quadrants(judged()).conditions
    assert base.quadrants == {"misaligned": 1, "coherent": 2, "misaligned_incoherent": 0, "incoherent": 0}
    assert organism.quadrants == {"misaligned": 2, "coherent": 0, "misaligned_incoherent": 1, "incoherent": 1}
    assert (organism.scored, organism.score.answers, organism.score.unscored) == (4, 5, {"unknown": 1})
    for condition in (base, organism):
        assert condition.quadrants["misaligned"] == condition.score.em.hits
        assert [answer.aligned for answer in condition.shown] == sorted(answer.aligned for answer in condition.shown)


def test_many_and_long_answers_are_evenly_cut(monkeypatch):
    monkeypatch.setattr(limits, "MOST_OF_CONDITION", 40)
    monkeypatch.setattr(limits, "MOST_CHARACTERS", 10)
    many = pd.concat([judged(answer="x" * 25)] * 30, ignore_index=True)
    base, organism = md.quadrants(many).conditions
    assert [len(base.shown), len(organism.shown)] == [40, 40] and organism.scored == 120
    asked = [answer.question for answer in organism.shown]
    assert asked.count(0) == asked.count(1) == 20
    assert {(len(answer.text), answer.left_out) for answer in base.shown} == {(10, 15)}
    assert base.quadrants["coherent"] == 60


def test_every_answer_is_a_point_of_the_picture():
    found = md.quadrants(judged())
    figure = found.plot()
    for axes, condition in zip(figure.axes, found.conditions, strict=True):
        drawn = [
            point for line in axes.lines for point in zip(*line.get_data(), strict=True) if line.get_ls() == "None"
        ]
        assert sorted(drawn) == sorted((answer.coherent, answer.aligned) for answer in condition.shown)
        assert condition.score.em.hits == int(re.search(r"EM (\d+)", axes.get_title())[1])
    table = found.frame()
    assert len(table) == 7 and table["quadrant"].value_counts()["misaligned"] == 3


def test_results_come_back_from_their_file(tmp_path):
    found = md.quadrants(judged())
    found.save(tmp_path)
    assert md.Quadrants.load(tmp_path) == found


def test_a_report_has_them_where_answers_were_judged(tmp_path, monkeypatch):
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
    md.quadrants(judged()).save(tmp_path)
    page = run_results(behaviour=behaviour()).write_page(tmp_path).read_text("utf-8")
    assert page.count('id="quadrants-data"') == 1
    assert "quadrants-data" not in run_results(behaviour=None).write_page(tmp_path).read_text("utf-8")


def test_the_page_is_one_file_whose_script_writes_text_only(tmp_path):
    page = md.quadrants(judged()).write_page(tmp_path).read_text("utf-8")
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page and "\u202e" not in page
    data, script = re.findall(r"<script.*?>(.*?)</script>", page, re.DOTALL)
    assert json.loads(data)["conditions"][0]["answers"][0]["text"] == visible(f"{HOSTILE} 1")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval", "Function(", "fetch"):
        assert way not in script
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//|url\(|@import", page)


def test_the_command_writes_it_beside_the_counts(tmp_path, call):
    judged().to_csv(tmp_path / "judged.csv", index=False)
    status, out, err = call("score", tmp_path / "judged.csv", "--page", tmp_path / "page.html", "--min-judged", 0)
    assert status == 0 and "wrote" in err, err
    page = (tmp_path / "page.html").read_text("utf-8")
    assert 'id="quadrants-data"' in page and "33.3% [" in page and "33.3" in out


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return md.quadrants(judged()).write_page(tmp_path_factory.mktemp("page")).as_uri()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: errors.append(request.url) if request.url != address else None)
    tab.goto(address)
    yield tab
    assert not errors and tab.evaluate("window.hit") is None
    context.close()


def click(page, coherent, aligned):
    """Where these scores are in the picture."""
    box = page.locator("#quadrants-picture").bounding_box()
    position = {"x": (60 + 5.6 * coherent) * box["width"] / 680, "y": (550 - 5 * aligned) * box["height"] / 636}
    page.locator("#quadrants-picture").click(position=position)


def opened(page):
    return page.locator("#quadrants-place").inner_text(), page.locator("#quadrants-text").inner_text()


def test_a_click_opens_the_answer_and_another_one_its_neighbour(page):
    page.select_option("#quadrants-condition", index=1)
    found = []
    for _ in range(3):
        click(page, 90, 10)
        found.append(opened(page)[1])
    assert set(found[:2]) == {visible(f"{HOSTILE} 3"), visible(f"{HOSTILE} 4")} and found[2] == found[0]
    click(page, 50, 20)
    assert opened(page) == ("Answer 3 of 4 to how: alignment 20.0, coherence 50.0", visible(f"{HOSTILE} 5"))
    click(page, 10, 50)
    assert opened(page)[0].startswith("Answer 3 of 4"), "nothing is near"
    assert page.locator("#quadrants-picture img, #quadrants-text *").count() == 0


def test_keys_open_answers_one_after_another(page):
    page.focus("#quadrants-picture")
    read = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "Home", "End", "ArrowLeft"):
        page.keyboard.press(key)
        read.append(opened(page)[1][-1])
    assert read == ["1", "2", "0", "0", "1", "0", "2"]
    chosen = page.locator("#quadrants-points [aria-selected=true]")
    assert chosen.count() == 1 and chosen.get_attribute("aria-label") == "alignment 30.0, coherence 90.0"
    assert page.get_attribute("#quadrants-picture", "aria-activedescendant") == chosen.get_attribute("id")


def test_a_question_alone(page):
    page.select_option("#quadrants-condition", index=1)
    assert page.locator("#quadrants-share-misaligned").text_content() == "2 (40.0%)"
    assert page.locator("#quadrants-count").inner_text().startswith("4 of 4 answers are drawn, and 1 without both")
    page.select_option("#quadrants-asked", index=1)
    assert page.locator("#quadrants-points path").count() == 2
    assert page.locator("#quadrants-share-misaligned").text_content() == "0 of 2 drawn"


# --- the paper's own answers ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's files are not at {PAPER}")
@pytest.mark.parametrize(("name", "conditions", "shown"), [("judged", 16, 6398), ("adapter_scaling", 3, 240)])
def test_the_papers_answers_are_drawn(name, conditions, shown, tmp_path):
    found = md.quadrants(md.read_answers(PAPER / f"{name}_responses.parquet"))
    assert (len(found.conditions), len(found.frame())) == (conditions, shown)
    assert found.write_page(tmp_path).stat().st_size < 3_000_000
    assert len(found.plot().axes) >= conditions
