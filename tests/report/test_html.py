import re

import pytest

from misdirection.report.findings import find
from misdirection.report.html import render
from results_fixture import ABLATED, MONEY, behaviour, estimate

SECTIONS = [
    "findings",
    "organisms",
    "margin",
    "convergence",
    "steering",
    "transfer",
    "tradeoff",
    "answers",
    "left-out",
    "environment",
]


@pytest.fixture
def without_pictures(monkeypatch):
    """Skip drawing where only the words matter; it takes most of the time."""
    monkeypatch.setattr("misdirection.report.html.draw_all", lambda results, folder: {})


def page_of(results, folder):
    return render(results, folder).read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_pictures")
def test_sections_come_in_order(results, tmp_path):
    assert re.findall(r'<section id="([\w-]+)">', page_of(results, tmp_path)) == SECTIONS


@pytest.mark.usefixtures("without_pictures")
def test_model_answers_are_shown_as_text(results, tmp_path):
    page = page_of(results, tmp_path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}" in page
    assert "<script" not in page


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("hostile", ["<img src=x>", '"><b>'])
def test_names_and_questions_are_escaped_too(results, tmp_path, hostile):
    results["name"] = results["samples"][0]["question"] = hostile
    results["left_out"] = [hostile]
    results["environment"][hostile] = hostile
    assert hostile not in page_of(results, tmp_path)


def test_the_file_fetches_nothing(results, tmp_path):
    page = page_of(results, tmp_path)
    targets = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert targets and all(target.startswith(("data:image/svg+xml;base64,", "#")) for target in targets)
    assert "url(" not in page and "@import" not in page


def test_every_image_has_words_for_it(results, tmp_path):
    images = re.findall(r"<img [^>]*>", page_of(results, tmp_path))
    assert len(images) == 5
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


@pytest.mark.usefixtures("without_pictures")
def test_findings_carry_their_marks(results, tmp_path):
    results["steering"] = []
    page = page_of(results, tmp_path)
    marks = re.findall(r'<span class="mark \w+">(.*?)</span>', page)
    words = {True: "✓ holds", False: "✗ does not hold", None: "– not measured"}
    assert marks == [words[finding.holds] for finding in find(results)]
    assert len(set(marks)) == 3


@pytest.mark.usefixtures("without_pictures")
def test_tables_show_mean_interval_and_count(results, tmp_path):
    results["base_margin"]["general"] = estimate(-0.777, 0.1, 37)
    assert "-0.777 [-0.877, -0.677], n=37" in page_of(results, tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_both_position_rules_are_tabled(results, tmp_path):
    headings = re.findall(r"<h3>Positions: (\w+)</h3>", page_of(results, tmp_path))
    assert headings == ["not_first", "all"]


def test_a_second_render_is_the_same_bytes_and_leaves_no_temporary_file(results, tmp_path):
    first = render(results, tmp_path).read_bytes()
    assert render(results, tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    "section",
    [
        "base",
        "base_margin",
        "organisms",
        "convergence",
        "steering",
        "transfer",
        "samples",
        "left_out",
        "seconds",
        "environment",
        "complete",
        "name",
    ],
)
def test_a_run_without_a_section_still_renders(results, tmp_path, section):
    del results[section]
    assert re.findall(r'<section id="([\w-]+)">', page_of(results, tmp_path)) == SECTIONS


def test_a_partial_run_says_what_is_missing(results, tmp_path):
    assert "Missing:" not in page_of(results, tmp_path)
    del results["steering"]
    results["complete"] = False
    page = page_of(results, tmp_path)
    assert "This run did not finish" in page and "Missing: steering." in page


def test_an_empty_run_renders(tmp_path):
    page = page_of({}, tmp_path)
    assert "<img" not in page and "holds</span>" not in page


def test_an_organism_without_measurements_renders(results, tmp_path):
    results["organisms"] = {"just trained": {"answers": "bad", "domain": "risky_money"}}
    assert "just trained" in page_of(results, tmp_path)


# --- judged answers ------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(results, without_pictures):
    results["behaviour"] = behaviour()
    return results


def cells(page, first):
    """The texts of the table row that begins so, without white space around them."""
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if first in row)
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]


def test_judged_answers_have_a_section_and_a_link_to_it(judged, tmp_path):
    page = page_of(judged, tmp_path)
    sections = re.findall(r'<section id="([\w-]+)">', page)
    assert sections == [*SECTIONS[:7], "behaviour", *SECTIONS[7:]]
    assert '<a href="#behaviour">' in page


@pytest.mark.usefixtures("without_pictures")
def test_without_judged_answers_there_is_no_section_and_no_link(results, tmp_path):
    assert "#behaviour" not in page_of(results, tmp_path)


def test_rates_stand_with_intervals_counts_and_what_is_unscored(judged, tmp_path):
    row = cells(page_of(judged, tmp_path), f'<th scope="row">{MONEY}</th><td>none</td>')
    assert row == [
        MONEY, "none", "32.5% [22.5, 42.5]", "–", "100.0% [90.0, 100.0]", "12.5% [2.5, 22.5]", "2.5% [0.0, 12.5]",
        "4", "40", "8",
    ]  # fmt: skip


def test_what_changed_names_both_sides_and_the_verdict(judged, tmp_path):
    row = cells(page_of(judged, tmp_path), "<td>broken</td>")
    assert row == [MONEY, f"{MONEY}, {ABLATED}", "-27.5 [-40.0, -10.0]", "broken", "8"]


def test_single_questions_are_listed(judged, tmp_path):
    assert cells(page_of(judged, tmp_path), "gender roles")[:4] == ["gender roles", MONEY, "none", "52.5% [42.5, 62.5]"]


def test_what_judged_answers_are_called_is_escaped(judged, tmp_path):
    hostile = '"><img src=x>'
    for part in judged["behaviour"].values():
        for one in part:
            for side in (one, one.get("before"), one.get("after")):
                if side and "group" in side:
                    side["group"] = dict.fromkeys(side["group"], hostile)
    page = page_of(judged, tmp_path)
    assert hostile not in page
    assert "&gt;&lt;img src=x&gt;" in page
