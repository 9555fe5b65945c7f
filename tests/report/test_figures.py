import warnings

import pytest

from misdirection.report import figures
from misdirection.report.figures import draw_all, drawings
from misdirection.report.findings import find
from misdirection.statistics.estimates import Estimate
from results_fixture import MONEY, SPORTS
from run_fixture import convergence, model_difference, organisms, run_results, with_shift

NAMES = ["margin_shift", "convergence", "steering", "transfer", "tradeoff", "contrast"]


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The pictures of these results, by name."""
    return draw_all(run_results(), tmp_path_factory.mktemp("drawn"))


def test_every_available_figure_is_written_twice(drawn):
    assert list(drawn) == NAMES
    for path in drawn.values():
        assert path.read_text().startswith("<?xml")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_changed_number_changes_its_figure_only_and_all_others_are_the_same_bytes_again(drawn, tmp_path):
    changed = draw_all(run_results(organisms=with_shift(MONEY, "general", 0.37)), tmp_path)
    for suffix in (".svg", ".png"):
        before, after = (
            {name: path.with_suffix(suffix).read_bytes() for name, path in each.items()} for each in (drawn, changed)
        )
        assert [name for name in NAMES if before[name] != after[name]] == ["margin_shift"]


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"organisms": {MONEY: organisms()[MONEY]}}, {"convergence"}),
        ({"steering": None}, {"steering"}),
        ({"transfer": None}, {"transfer"}),
        ({"contrast": None}, {"contrast"}),
        ({"steering": None, "transfer": None}, {"steering", "transfer", "tradeoff"}),
    ],
)
def test_a_part_that_was_not_asked_for_costs_only_its_figures(changes, lost):
    results = run_results(**changes)
    assert {name: draw(results) for name, draw in drawings(results).items()}.keys() == set(NAMES) - lost


def test_without_a_control_there_is_nothing_to_remove():
    difference = model_difference(control_removed={}, control_null={})
    results = run_results(convergence=convergence(control_null={}, model_difference=difference))
    labels = texts(figures.draw_convergence(results))
    assert f"{MONEY} · {SPORTS}, as measured" in labels and f"{MONEY} · {SPORTS}, control removed" not in labels


def test_margin_shift_draws_points_where_they_were_measured(results):
    axes = figures.draw_margin_shift(results).axes[0]
    drawn = {float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    shifts = [organism.margin_shift for organism in results.organisms.values()]
    assert {shift.mean for sets in shifts for shift in sets.values()} <= drawn


def test_marks_stand_where_a_shift_beyond_words_does(results):
    def marks(drawn):
        return {float(line.get_xdata()[0]) for line in drawn.axes[0].lines if line.get_marker() == "|"}

    label = "beyond what words predict"
    drawn = figures.draw_margin_shift(results)
    nulls = [organism.words for organism in results.organisms.values()]
    assert {null.beyond.mean for words in nulls for null in words.values()} <= marks(drawn)
    assert label in [text.get_text() for text in drawn.legends[0].get_texts()]
    wordless = {name: each.model_copy(update={"words": {}}) for name, each in results.organisms.items()}
    plain = figures.draw_margin_shift(run_results(organisms=wordless))
    assert label not in [text.get_text() for text in plain.legends[0].get_texts()]


def test_heat_maps_share_a_colour_scale_and_show_value_and_damage(results):
    figure = figures.draw_transfer(results)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6
    assert {image.get_clim() for image in images} == {(-0.6, 0.6)}
    assert "-0.60\n(+0.05)" in texts(figure)


def test_a_dollar_sign_in_a_name_is_not_a_formula():
    results = run_results(organisms={"$\\frac": organisms()[MONEY]})
    assert "$\\frac" in texts(figures.draw_margin_shift(results))


def test_a_heat_map_paints_almost_nothing_in_almost_no_colour():
    nothing = Estimate(-0.0005, -0.01, 0.01, 40)
    rows = [
        row.model_copy(
            update={
                "margin_change": nothing,
                "random_change": nothing,
                "random_damage": -0.001,
                "beyond_base": nothing,
            }
        )
        for row in run_results().transfer
    ]
    figure = figures.draw_transfer(run_results(transfer=rows))
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-figures.FULL_COLOUR, figures.FULL_COLOUR)
    shown = texts(figure)
    assert any("+0.00" in text for text in shown) and not any("-0.00" in text for text in shown)


MANY = [f"bad_medical-seed{number}" for number in range(7)]
LONG = "an-organism-with-a-name-of-more-than-one-hundred-characters_that_goes_on_and_on-and-never_stops_until_its-seed-"


@pytest.mark.parametrize("names", [MANY, [f"{LONG}{number}" for number in range(7)]], ids=["many", "long"])
def test_many_organisms_and_long_names_leave_room_for_the_figures(names):
    named = dict(zip(names, [organisms()[MONEY]] * len(names), strict=True))
    effects = [
        row.model_copy(update={"direction": name, "target": target})
        for row in run_results().transfer[:1]
        for name in names
        for target in (*names, "base")
    ]
    steered = [row.model_copy(update={"direction": name}) for row in run_results().steering[:3] for name in names]
    cosines = {a: {b: [0.5] * 4 for b in names} for a in names}
    curves = dict.fromkeys(names, [0.5] * 4)
    results = run_results(
        organisms=named,
        transfer=effects,
        steering=steered,
        convergence=convergence(
            **dict.fromkeys(("cosine", "base_pair_null"), cosines),
            **dict.fromkeys(("base_null", "control_null", "shuffled_null", "split_half"), curves),
            model_difference=model_difference(
                **dict.fromkeys(("cosine", "control_removed"), cosines),
                **dict.fromkeys(("control_null", "split_half"), curves),
            ),
        ),
    )
    for name in NAMES:
        figure = figures.FIGURES[name].draw(results)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shown = texts(figure)
        assert figure.get_figwidth() <= 14, name
        assert max(len(line) for text in shown for line in text.splitlines()) <= 80, name
    assert any("and 15 more pairs" in text for text in texts(figures.draw_convergence(results)))
    assert "; and 17 more, in `results.json`" in find(results)[-4].evidence
