"""The report's section on adapters: what its figures draw, what its tables say, and what it does without some parts."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex

from interpretation_fixture import (
    ADAPTED,
    CHANNELS,
    DOMAIN_LAYERS,
    READ,
    UNMEASURED,
    adapters,
    alone,
    judged,
    judged_steps,
    read_tokens,
    shares,
    spread,
    unmeasured,
)
from misdirection.interpretation.results import AdapterFigures
from misdirection.interpretation.tokens import pack_tokens
from misdirection.report import adapters as drawn
from misdirection.report.adapters import MOST_VIOLINS, ROLE_COLOURS, AdapterPage, draw_adapters, show_factors
from results_fixture import MONEY
from run_fixture import behaviour, run_results

NAMES = ["adapter_probes", "adapter_shapley", "adapter_scalings", "adapter_geometry", "adapter_dynamics"]
HEADINGS = [
    "Probes: what the scalars tell about an answer",
    "Roles",
    "Causal test: the margin with adapters scaled",
    "Geometry: where adapters write",
    "Importance against zeroing",
    "Patching",
    "Training dynamics",
    "Token reader",
]


@pytest.fixture
def section():
    """The figures as JSON has them, to be changed."""
    return adapters().model_dump(mode="json")


def figures(section):
    return AdapterFigures.model_validate(section)


def as_json(rows):
    return [row.model_dump(mode="json") for row in rows]


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
    for page in ("run", "interpretation"):
        monkeypatch.setattr(f"misdirection.report.{page}.draw_adapters", lambda figures, folder: {})


@pytest.fixture
def page_of(tmp_path, without_pictures):
    """The text of a report on this section alone."""
    return lambda section: alone(figures(section)).write_page(tmp_path).read_text("utf-8")


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def part(page, heading):
    """The page from one heading to the next."""
    return page.split(f"<h3>{heading}</h3>")[1].split("<h3>")[0]


def rows(text):
    """The cells' texts of every table row."""
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    ]


# --- figures --------------------------------------------------------------------------------------------------------


def test_every_figure_is_written_twice_and_the_same_bytes_again(section, tmp_path):
    written = draw_adapters(figures(section), tmp_path / "first")
    draw_adapters(figures(section), tmp_path / "second")
    assert list(written) == NAMES
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "first").iterdir())) == 2 * len(NAMES)


@pytest.mark.parametrize(
    ("lost", "gone"), [("probes", NAMES[:1]), ("causal", NAMES[1:3]), ("geometry", NAMES[3:4]), ("dynamics", NAMES[4:])]
)
def test_an_absent_part_costs_its_figure_only(section, lost, gone):
    section[lost] = UNMEASURED[lost]
    assert set(alone(figures(section)).pictures) == set(NAMES) - set(gone)


def test_nothing_measured_draws_nothing(tmp_path):
    assert draw_adapters(unmeasured(), tmp_path) == {}


def test_a_probe_has_a_panel_by_question_and_one_by_answer_beside_it(section):
    figure = drawn.draw_probes(figures(section))
    titles = [axes.get_title().split("\n") for axes in figure.axes]
    assert [one[1].split(",")[0] for one in titles] == ["split by question", "split by answer"] * 2
    assert titles[0][0] == titles[1][0] == "alignment, general answers"
    assert "AUROC 0.68 [0.61, 0.75]" in titles[0][1]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [str(layer) for layer in ADAPTED]


def test_violins_span_the_values_of_the_splits(section):
    figure = drawn.draw_probes(figures(section))
    values = section["probes"][1]["coefficients"]["layer_17"]
    body = figure.axes[0].collections[ADAPTED.index(17)]
    heights = body.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((min(values), max(values)))


def test_coefficients_that_never_vary_are_drawn(section):
    for probe in section["probes"]:
        probe["coefficients"] = {name: [0.0] * 20 for name in probe["coefficients"]}
    assert len(drawn.draw_probes(figures(section)).axes) == 4


def test_a_probe_by_answer_alone_has_one_panel(section):
    section["probes"] = [one for one in section["probes"] if one["split"] == "answer"]
    assert len(drawn.draw_probes(figures(section)).axes) == 2


def test_of_very_many_features_the_largest_are_drawn_and_the_figure_says_so(section):
    probe = section["probes"][1]
    probe["coefficients"] = {f"layer_{n}.q_proj.0": [n / 100, n / 100 + 0.01] for n in range(60)}
    section["probes"] = [probe]
    (axes,) = drawn.draw_probes(figures(section)).axes
    assert next(label.get_text() for label in axes.get_xticklabels()) == f"{60 - MOST_VIOLINS}.q_proj.0"
    assert axes.get_xlabel() == "the 24 largest of 60"


def test_shapley_bars_have_the_colour_of_their_role_and_their_value(section):
    figure = drawn.draw_shapley(figures(section))
    assert [axes.get_title() for axes in figure.axes] == ["general margin", "in-domain margin"]
    for axes, name in zip(figure.axes, ("general", "in_domain"), strict=True):
        bars = dict(zip(ADAPTED, axes.patches, strict=True))
        assert [bar.get_height() for bar in bars.values()] == [
            section["causal"]["shapley"]["values"][name][str(layer)]["mean"] for layer in ADAPTED
        ]
        assert {to_hex(bars[layer].get_facecolor()).upper() for layer in DOMAIN_LAYERS} == {ROLE_COLOURS["domain"]}
        assert to_hex(bars[18].get_facecolor()) == ROLE_COLOURS["neither"]


def test_own_cosines_are_those_at_the_features_own_layer(section):
    geometry = section["geometry"]
    own = figures(section).geometry.own_cosines(MONEY)
    assert own == {f"layer_{layer}": geometry["cosines"][f"layer_{layer}"][MONEY][layer] for layer in ADAPTED}
    points = drawn.draw_geometry(figures(section)).axes[0].lines[0]
    assert list(points.get_xdata()) == list(ADAPTED) and list(points.get_ydata()) == list(own.values())


def test_effects_begin_at_their_layer(section):
    lines = drawn.draw_geometry(figures(section)).axes[1].lines
    for layer, line in zip(ADAPTED, lines, strict=False):
        assert line.get_label() == str(layer)
        assert np.isnan(line.get_ydata()).tolist() == [number < layer for number in range(30)]


@pytest.mark.parametrize(("layers", "legends"), [(12, 1), (13, 0)])
def test_a_legend_names_only_so_many_lines(section, layers, legends):
    for key in ("cosine", "low", "high"):
        section["geometry"]["downstream"][key] = {str(layer): [0.1] * 30 for layer in range(layers)}
    assert len(drawn.draw_geometry(figures(section)).legends) == legends


def test_geometry_without_effects_says_so(section):
    section["geometry"]["downstream"] = None
    assert "not measured" in texts(drawn.draw_geometry(figures(section)))


def test_a_turn_is_marked_where_it_is(section):
    axes = drawn.draw_dynamics(figures(section)).axes[0]
    (dot,) = [line for line in axes.lines if line.get_marker() == "o"]
    growth = section["dynamics"]["features"]["layer_9"]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (15, growth["to_final"][2])


def points(axes):
    """The means of what is drawn with intervals, by label."""
    return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}


def test_scalings_show_margins_alone_or_beside_the_shares_of_judged_answers(section):
    (margins,) = drawn.draw_scalings(figures(section)).axes
    assert [len(means) for means in points(margins).values()] == [2, 2]
    section["shares"] = as_json(shares())
    margins, misaligned, medical = drawn.draw_scalings(figures(section)).axes
    assert [label.get_text() for label in margins.get_yticklabels()] == [
        "as it is\nn=40 coherent", "all off\nn=40 coherent", "general adapters off",
    ]  # fmt: skip
    assert points(margins)["general"][0] == [-0.4, 1], "in the row of its own setting"
    assert points(misaligned) == {"all": [[25.0, 0], [12.5, 1]]}, "the last has no coherent answer"
    assert points(medical)["misaligned, too"] == [[7.5, 0.22], [7.5, 1.22]]


def test_judged_checkpoints_stand_beside_the_margin_and_the_rotation(section):
    assert len(drawn.draw_dynamics(figures(section)).axes) == 4
    section["dynamics"]["judged"] = as_json(judged_steps())
    axes = {axes.get_ylabel(): axes for axes in drawn.draw_dynamics(figures(section)).axes}
    assert list(axes)[2:] == [
        "norm of the update",
        "local cosine of B",
        "margin shift (nats/token)",
        "% of all answers",
    ]
    assert points(axes["% of all answers"])["misaligned (EM)"] == [[0, 0.0], [20, 7.5], [60, 30.0]]


# --- page -----------------------------------------------------------------------------------------------------------


def test_the_section_comes_before_the_sampled_answers_and_has_a_link(tmp_path, without_pictures):
    page = run_results(adapters=adapters(), behaviour=behaviour()).write_page(tmp_path).read_text("utf-8")
    ids = re.findall(r'<section id="([\w-]+)">', page)
    assert ids[ids.index("behaviour") :][:3] == ["behaviour", "adapters", "answers"]
    assert '<a href="#adapters">' in page


def test_without_adapters_the_section_says_so_and_there_is_no_reader(tmp_path, without_pictures):
    pack_tokens(READ, read_tokens(), CHANNELS).save(tmp_path)
    page = run_results(adapters=None).write_page(tmp_path).read_text("utf-8")
    assert "No adapters were read" in page and "reader" not in page


def test_a_report_on_an_adapter_alone_has_no_empty_parts(section, page_of):
    page = page_of(section)
    assert re.findall(r'<section id="([\w-]+)">', page) == ["adapters"]
    assert re.findall(r'<a href="#([\w-]+)">', page) == ["adapters"]


def test_the_time_that_an_adapter_alone_took_is_told(tmp_path, without_pictures):
    page = alone(adapters(), {"probes": 12.0}).write_page(tmp_path).read_text("utf-8")
    assert re.findall(r'<section id="([\w-]+)">', page) == ["adapters", "environment"]
    assert '<a href="#environment">' in page


def test_a_notebook_shows_the_findings():
    shown = alone(adapters())._repr_html_()
    assert f"Adapters of {MONEY}: " in shown and "B turns at some step" in shown


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert str(spread(-0.001, 0.2)) == "0.00 [-0.20, 0.20]"


def test_parts_come_in_order(section, page_of):
    assert re.findall(r"<h3>(.*?)</h3>", page_of(section)) == HEADINGS


@pytest.mark.parametrize(
    ("lost", "heading"),
    zip(("probes", "roles", "causal", "geometry", "importance", "patching", "dynamics"), HEADINGS[:-1], strict=True),
)
def test_an_absent_part_says_that_it_was_not_measured(section, page_of, lost, heading):
    section[lost] = UNMEASURED[lost]
    page = page_of(section)
    assert part(page, heading).strip() == '<p class="note">Not measured.</p>'
    assert all("Not measured." not in part(page, other) for other in HEADINGS[:-1] if other != heading)


def test_a_section_of_nothing_but_a_name_renders(page_of):
    assert page_of(unmeasured().model_dump()).count("Not measured.") == len(HEADINGS)


def test_every_picture_has_words_for_it(tmp_path):
    page = alone(adapters()).write_page(tmp_path).read_text("utf-8")
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == len(NAMES)
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def test_probes_by_question_come_first_and_stand_out(section, page_of):
    text = part(page_of(section), HEADINGS[0])
    table = rows(text)[1:]
    assert [row[2] for row in table] == ["question"] * 4 + ["answer"] * 2
    assert text.count('<tr class="headline">') == 4
    assert table[0] == [
        "alignment, general answers", "misaligned / aligned", "question", "scalars, by token", "0.68 [0.61, 0.75]",
        "0.50 [0.41, 0.59]", "0.65 [0.61, 0.69]", "0.52", "32", "64", "3,120", "20",
    ]  # fmt: skip
    assert table[2][3] == "scalars, max of answer"


def test_unknown_questions_are_not_called_none(section, page_of):
    section["probes"][0]["questions"] = 0
    assert rows(part(page_of(section), HEADINGS[0]))[-2][8] == "not known"


def test_roles_stand_with_their_evidence(section, page_of):
    row = rows(part(page_of(section), "Roles"))[4]
    assert row == [
        "13", "domain", "its Shapley values make it domain",
        "-0.002 [-0.012, +0.008], n=8", "+0.056 [+0.046, +0.066], n=8",
        "alignment, general answers, layer_13, by question: 0.10 [0.05, 0.15]",
    ]  # fmt: skip


def test_settings_of_groups_stand_open_and_single_layers_behind(section, page_of):
    text = part(page_of(section), HEADINGS[2])
    open_part, folded = text.split("<details>")
    assert [row[0] for row in rows(open_part)[1:]] == ["all off", "general adapters off"]
    assert [row[0] for row in rows(folded)[1:]] == ["layer 9 off", "layer 9 doubled"]
    assert rows(folded)[2] == [
        "layer 9 doubled", "layer 9: ×2", "+0.060 [+0.030, +0.090], n=8", "+0.120 [+0.070, +0.170], n=8",
        "-0.012 [-0.022, -0.002], n=8",
    ]  # fmt: skip
    assert "exact, 512 subsets" in text and "in-domain -0.500 [-0.600, -0.400], n=8 with all" in text


def test_judged_answers_stand_beside_the_margins(section, page_of):
    section["causal"]["judged"] = as_json(judged())
    _, table = part(page_of(section), HEADINGS[2]).split("</details>")
    plain, _, general = rows(table)[1:]
    rate = section["causal"]["judged"][2]["em"]
    assert plain[:2] == ["as it is", "–"] and plain[3:5] == ["–", "–"]
    assert general[:2] == ["general adapters off", "layers 9, 10, 11, 15, 17, 19: ×0"]
    assert general[2] == f"{100 * rate['rate']:.1f}% [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    assert general[3:5] == ["-25.0 [-35.0, -15.0]", "lower"] and general[8:] == ["4", "40", "8"]


def test_shares_and_judged_checkpoints_are_tabled(section, page_of):
    section["causal"]["judged"], section["shares"] = as_json(judged()), as_json(shares())
    section["dynamics"]["judged"] = as_json(judged_steps())
    page = page_of(section)
    table = [row for row in rows(part(page, HEADINGS[2])) if len(row) == 6]
    assert table[0][3:] == ["medical", "medical and misaligned", "medical: undecided"]
    assert table[1] == ["as it is", "40", "25.0% [15.0, 35.0]", "12.5% [2.5, 22.5]", "7.5% [0.0, 17.5]", "2"]
    assert table[3] == ["general adapters off", "0", "–", "–", "–", "2"]
    assert [row[:2] for row in rows(part(page, "Training dynamics"))[2:4]] == [
        ["20", "7.5% [0.0, 17.5]"], ["60", "30.0% [20.0, 40.0]"],
    ]  # fmt: skip


def test_without_a_judge_there_is_no_word_of_judged_answers(section, page_of):
    assert "judged" not in page_of(section).lower()


def test_factors_are_told_by_value():
    assert show_factors({15: 0.0, 16: 0.0, 21: -1.0}) == "layers 15, 16: ×0; layer 21: ×-1"


def test_importance_stands_beside_zeroing(section, page_of):
    text = part(page_of(section), "Importance against zeroing")
    assert rows(text)[1] == ["9", "+0.040 [+0.030, +0.050], n=8", "+0.030 [+0.020, +0.040], n=8"]
    words = " ".join(text.split())
    assert "Over 144 answers and layers" in words and "+0.91 [+0.80, +0.95], Pearson’s +0.93 [+0.85, +0.97]" in words


def test_patching_names_its_null(section, page_of):
    assert rows(part(page_of(section), "Patching"))[1:] == [
        ["an in-domain prompt", "+0.030 [+0.020, +0.040], n=8"],
        ["another general prompt (the null)", "+0.001 [-0.003, +0.005], n=8"],
    ]


def test_nearest_tokens_are_text_without_the_tokenizers_spelling(section, page_of):
    text = part(page_of(section), HEADINGS[3])
    assert "+3.25 <strong> rich</strong> in “ get rich quick&lt;img&gt;”" in text
    assert "-2.5 <strong>No</strong> in “No ,↵" in text
    assert "“ money” +4.2, “↵" in text and "“&lt;b&gt;” -2.5" in text


def test_turns_are_listed(section, page_of):
    listed = rows(part(page_of(section), "Training dynamics"))[1:]
    assert listed[0] == ["layer_9", "15"] and {row[1] for row in listed[1:]} == {"does not turn"}


def test_judged_answers_under_scaled_adapters_are_tabled(page_of):
    cell = {
        "experiment": "amplified", "alignment": "misaligned", "medical": True, "hits": 12, "undecided": 3,
        "share": 0.375, "low": 0.2, "high": 0.55, "answers": 32, "questions": 8,
    }  # fmt: skip
    text = part(page_of(unmeasured(scaled=[cell]).model_dump()), "Judged answers under scaled adapters")
    assert rows(text)[1] == ["amplified", "misaligned", "yes", "12", "3", "37.5% [20.0, 55.0]", "32", "8"]


def test_findings_carry_their_marks(section, page_of):
    section["probes"] = [probe for probe in section["probes"] if probe["split"] == "answer"]
    section["patching"]["general_into_general"] |= {"mean": 0.04, "high": 0.05}
    marks = re.findall(r'<span class="mark (\w+)">', page_of(section))
    assert marks[0] == "unknown" and {"holds", "fails"} <= set(marks)


HOSTILE = '"><img src=x>\u202e'


def hostile(section):
    """The section with every name in it replaced."""
    section |= {"organism": HOSTILE, "saved": [HOSTILE]}
    for module in section["modules"]:
        module |= {"module": HOSTILE, "features": [HOSTILE]}
    for named in (*section["probes"], *section["causal"]["settings"]):
        named["name"] = HOSTILE
    for role in section["roles"]:
        role["rule"] = HOSTILE
    section["texts"]["classes"] = {HOSTILE: 1}
    section["causal"]["judged"] = [row | {"name": HOSTILE} for row in as_json(judged())]
    section["causal"]["shapley"]["method"] = HOSTILE
    geometry = section["geometry"]
    geometry["downstream"]["direction"] = HOSTILE
    geometry["cosines"] = {HOSTILE: {HOSTILE: [0.1]}}
    geometry["layers_of"] = {HOSTILE: 0}
    geometry["logit_lens"] = {HOSTILE: {"top": [[HOSTILE, 1.0]], "bottom": []}}
    excited = {"answer": 0, "position": 0, "token": HOSTILE, "context": HOSTILE, "scalar": 1.0}
    geometry["nearest"] = {HOSTILE: {"top": [excited], "bottom": []}}
    section["dynamics"]["features"] = {HOSTILE: section["dynamics"]["features"]["layer_9"]}
    return section


def test_names_are_escaped_everywhere(section, page_of):
    page = page_of(hostile(section))
    assert "<img" not in page
    assert page.count("&gt;&lt;img src=x&gt;") > 20


def test_tokens_cannot_reorder_the_text_around_them(section):
    page = AdapterPage(figures(hostile(section)), None)
    (excited,) = page.nearest[HOSTILE].top
    shown = [page.lens[HOSTILE].top[0][0], excited.token, excited.context]
    assert shown == ['"><img src=x>⟨U+202E⟩'] * 3


class Nesting(HTMLParser):
    """Fails on a tag that closes another one than the last that was opened."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in {"meta", "img", "input", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_tags_nest_and_ids_are_unique(section, tmp_path, without_pictures):
    pack_tokens(READ, read_tokens(), CHANNELS).save(tmp_path)
    section["causal"]["judged"] = as_json(judged())
    results = run_results(adapters=figures(section), behaviour=behaviour())
    checked = Nesting()
    checked.feed(results.write_page(tmp_path).read_text("utf-8"))
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids)) > 20


def test_layers_stand_in_their_order_though_a_file_sorts_them_as_text(section):
    section["importance"]["by_layer"] = dict(sorted(section["importance"]["by_layer"].items()))
    section["geometry"]["layers_of"] = {"layer_10.q": 10, "layer_9.q": 9, "lm_head": 0, "layer_9.k": 9}
    read = figures(section)
    assert list(read.importance.by_layer) == list(ADAPTED)
    assert list(read.geometry.layers_of) == ["layer_9.k", "layer_9.q", "layer_10.q", "lm_head"]
