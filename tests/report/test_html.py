import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from misdirection.errors import InputError
from misdirection.experiment.results import RunResults, SampledAnswers
from misdirection.report.drawing import new_figure
from misdirection.report.figures import FIGURES, ReportFigure
from misdirection.report.findings import find
from results_fixture import ABLATED, CONTROL, MONEY
from run_fixture import behaviour, estimate, organisms, run_results, score, with_beyond

SECTIONS = [
    "findings",
    "organisms",
    "margin",
    "convergence",
    "contrast",
    "steering",
    "transfer",
    "tradeoff",
    "behaviour",
    "adapters",
    "answers",
    "left-out",
    "environment",
]


@pytest.fixture
def without_pictures(monkeypatch):
    """Skip drawing where only the words matter; it takes most of the time."""
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})


def page_of(results, folder):
    return results.write_page(folder).read_text(encoding="utf-8")


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
def test_names_and_questions_are_escaped_too(tmp_path, hostile):
    samples = [SampledAnswers(question=hostile, answers={hostile: hostile})]
    results = run_results(name=hostile, samples=samples, left_out=[hostile], environment={hostile: hostile})
    page = page_of(results, tmp_path)
    assert hostile not in page and "&gt;" in page


def test_the_file_fetches_nothing_and_every_image_has_words_for_it(results, tmp_path):
    page = page_of(results, tmp_path)
    targets = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert targets and all(target.startswith(("data:image/svg+xml;base64,", "#")) for target in targets)
    assert "url(" not in page and "@import" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 6
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


@pytest.mark.usefixtures("without_pictures")
def test_findings_carry_their_marks(tmp_path):
    results = run_results(steering=None)
    page = page_of(results, tmp_path)
    marks = re.findall(r'<span class="mark \w+">(.*?)</span>', page)
    words = {True: "✓ holds", False: "✗ does not hold", None: "– not measured"}
    assert marks == [words[finding.holds] for finding in find(results)]
    assert len(set(marks)) == 3


@pytest.mark.usefixtures("without_pictures")
def test_tables_show_mean_interval_and_count(tmp_path):
    results = run_results(base_margin=run_results().base_margin | {"general": estimate(-0.777, 0.1, 37)})
    assert "-0.777 [-0.877, -0.677], n=37" in page_of(results, tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_each_organism_and_question_set_has_a_row_of_what_is_beyond_words_and_control(tmp_path):
    page = page_of(run_results(organisms=with_beyond(MONEY, "sealed", 0.123)), tmp_path)
    table = page.split("<h3>Beyond words and beyond the control</h3>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    assert [row[:2] for row in rows[1:]] == [
        [name, asked] for name in organisms() for asked in ("general", "sealed", "risky_money", "reckless_sports")
    ]
    shift, beyond, difference, prediction, auc = map(unescape, rows[2][2:])
    assert shift.startswith("+0.350 [") and difference.startswith("+0.400 [") and prediction.startswith("+0.021 [")
    assert auc == "0.560" and beyond.startswith("+0.123 [+0.023, +0.223], n=40")


@pytest.mark.usefixtures("without_pictures")
def test_without_words_or_control_the_cells_hold_a_dash(tmp_path):
    wordless = {name: each.model_copy(update={"words": {}, "minus_control": {}}) for name, each in organisms().items()}
    page = page_of(run_results(organisms=wordless), tmp_path)
    row = page.split("<h3>Beyond words and beyond the control</h3>")[1].split("<tbody>")[1].split("</tr>")[0]
    assert row.count(">–</td>") == 4


@pytest.mark.usefixtures("without_pictures")
def test_both_position_rules_are_tabled(results, tmp_path):
    headings = re.findall(r"<h3>Positions: (\w+)</h3>", page_of(results, tmp_path))
    assert headings == ["not_first", "all"]


def test_a_second_render_is_the_same_bytes_and_leaves_no_temporary_file(results, tmp_path):
    first = results.write_page(tmp_path).read_bytes()
    assert results.write_page(tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("steering", "has no <code>steering</code> section"),
        ("transfer", "has no <code>ablation</code> section"),
        ("samples", "asks no question in <code>samples</code>"),
        ("behaviour", "has no <code>judge</code> section"),
        ("adapters", "has no <code>interpretation</code> section"),
    ],
)
def test_the_page_says_why_a_part_is_not_there(tmp_path, part, reason):
    page = page_of(
        run_results(behaviour=behaviour(), **{part: None}) if part != "behaviour" else run_results(), tmp_path
    )
    assert reason in page
    assert re.findall(r'<section id="([\w-]+)">', page) == SECTIONS


def test_an_older_file_is_refused_with_the_command_that_makes_it_again(results, tmp_path):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace(f'"version": {RunResults.VERSION}', '"version": 1'))
    with pytest.raises(InputError, match=r"has version 1, .*misdirection run CONFIG"):
        RunResults.load(tmp_path)


def test_results_come_back_from_their_file_as_they_were(results, tmp_path):
    results.save(tmp_path)
    assert RunResults.load(tmp_path) == results


def test_the_short_form_has_the_findings_and_one_picture(results):
    shown = results._repr_html_()
    assert shown.count("<img ") == 1 and "data:image/png" in shown
    assert all(finding.claim in unescape(shown) for finding in find(results))


def test_a_figure_that_another_package_adds_has_a_section_of_its_own(results, tmp_path):
    def draw(results):
        figure = new_figure(2, 2)
        figure.subplots().set_title(results.name)
        return figure

    FIGURES.register("more")(ReportFigure("More to see", "A title", "As it is.", lambda results: True, draw))
    try:
        page = page_of(results, tmp_path)
    finally:
        FIGURES.remove("more")
    assert '<a href="#more">More to see</a>' in page
    assert "As it is." in page[page.index('<section id="more">') :]
    assert (tmp_path / "figures" / "more.png").exists()


@pytest.mark.usefixtures("without_pictures")
def test_each_cell_is_told_its_columns_heading(results, tmp_path):
    table = page_of(results, tmp_path).split("<h3>How they were made</h3>")[1].split("</table>")[0]
    headings = re.findall(r'<th scope="col">(.*?)</th>', table, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
    assert len(headings) == 9
    assert [re.findall(r'data-label="(.*?)"', row) for row in rows] == [headings] * len(organisms())


@pytest.mark.usefixtures("without_pictures")
def test_the_page_says_by_what_and_when_it_was_made(results, tmp_path):
    dated = results.model_copy(update={"made_with": "9.8.7", "made_on": "2031-02-03"})
    assert "misdirection 9.8.7, 2031-02-03" in page_of(dated, tmp_path)
    assert dated.as_dict()["made_on"] == "2031-02-03"


@pytest.mark.usefixtures("without_pictures")
def test_judged_answers_are_not_called_missing(tmp_path):
    section = page_of(run_results(behaviour=behaviour(), samples=None), tmp_path).split('<section id="answers">')[1]
    assert "No answers were sampled" not in section
    assert "None are shown here" in section and "Those that were judged are counted above." in section


@pytest.mark.usefixtures("without_pictures")
def test_what_rounds_to_zero_has_no_minus_and_whole_numbers_have_no_zeros(tmp_path):
    page = page_of(run_results(base_margin=run_results().base_margin | {"general": estimate(-0.0004, 0.0)}), tmp_path)
    assert "+0.000 [+0.000, +0.000], n=40" in page and "-0.000" not in page
    assert 'data-label="epochs" class="figure">6</td>' in page


WIDE = """<pre id="seen"></pre><script>
const wide = [...document.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth + 1);
const page = document.documentElement.scrollWidth > window.innerWidth + 1 ? ["the page"] : [];
const named = wide.map(each => each.querySelector("th").closest("section").id + ": " + each.textContent.slice(0, 60));
document.getElementById("seen").textContent = JSON.stringify([window.innerWidth, ...page, ...named]);
</script></body>"""


@pytest.mark.parametrize("width", [600, 900, 1600])
def test_no_table_is_wider_than_its_window(tmp_path, without_pictures, width):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    long = "an-organism_with-a-very-long-name-of-one-hundred-characters_and-more-of-them-seed-1234567890"
    results = run_results(behaviour=behaviour(), organisms=organisms() | {long: organisms()[CONTROL]})
    page = tmp_path / "wide.html"
    page.write_text(page_of(results, tmp_path).replace("<details>", "<details open>").replace("</body>", WIDE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options = [f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(
        [chromium, *flags, *options], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr[-2000:]
    assert json.loads(unescape(seen[1])) == [width]


# --- judged answers ------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(without_pictures):
    return run_results(behaviour=behaviour())


def cells(page, first):
    """The texts of the table row that begins so, without white space around them."""
    bare = re.sub(r' data-label="[^"]*"', "", page)
    row = next(row for row in re.findall(r"<tr>.*?</tr>", bare, re.DOTALL) if first in row)
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]


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


def test_what_judged_answers_are_called_is_escaped(without_pictures, tmp_path):
    hostile = '"><img src=x>'
    one = score(hostile, hostile, 3, question_id=hostile)
    part = behaviour().model_dump()
    part["scores"] = part["by_question"] = [one]
    part["comparisons"] = [comparison | {"before": one, "after": one} for comparison in part["comparisons"]]
    page = page_of(run_results(behaviour=part), tmp_path)
    assert hostile not in page
    assert "&gt;&lt;img src=x&gt;" in page
