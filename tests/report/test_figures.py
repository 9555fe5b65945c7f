import pytest

from misdirection.report import figures
from misdirection.report.figures import draw_all
from results_fixture import MONEY

NAMES = ["margin_shift", "convergence", "steering", "transfer", "tradeoff"]


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_every_available_figure_is_written_twice(results, tmp_path):
    written = draw_all(results, tmp_path)
    assert list(written) == NAMES
    for path in written.values():
        assert path.read_text().startswith("<?xml")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_the_same_bytes_again(results, tmp_path):
    draw_all(results, tmp_path / "first")
    draw_all(results, tmp_path / "second")
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_a_changed_number_changes_its_figure_only(results, tmp_path):
    before = {name: path.read_bytes() for name, path in draw_all(results, tmp_path).items()}
    results["organisms"][MONEY]["margin_shift"]["general"]["mean"] += 0.02
    after = {name: path.read_bytes() for name, path in draw_all(results, tmp_path).items()}
    assert [name for name in NAMES if before[name] != after[name]] == ["margin_shift"]


@pytest.mark.parametrize(
    ("section", "lost"),
    [
        ("organisms", {"margin_shift", "convergence"}),
        ("convergence", {"convergence"}),
        ("steering", {"steering"}),
        ("transfer", {"transfer"}),
    ],
)
def test_a_missing_section_costs_only_its_figures(results, tmp_path, section, lost):
    del results[section]
    assert set(draw_all(results, tmp_path)) == set(NAMES) - lost


def test_nothing_measured_draws_nothing(tmp_path):
    assert draw_all({}, tmp_path) == {}


def test_convergence_without_model_difference_says_so(results):
    del results["convergence"]["model_difference"]
    assert "not measured" in texts(figures.draw_convergence(results))


def test_margin_shift_draws_points_where_they_were_measured(results):
    axes = figures.draw_margin_shift(results).axes[0]
    drawn = {float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    shifts = [organism["margin_shift"] for organism in results["organisms"].values()]
    assert {shift["mean"] for sets in shifts for shift in sets.values()} <= drawn


def test_heat_maps_share_a_colour_scale_and_show_value_and_damage(results):
    figure = figures.draw_transfer(results)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 4
    assert {image.get_clim() for image in images} == {(-0.6, 0.6)}
    assert "-0.60\n(+0.05)" in texts(figure)


def test_a_dollar_sign_in_a_name_is_not_a_formula(results):
    results["organisms"] = {"$\\frac": results["organisms"][MONEY]}
    assert "$\\frac" in texts(figures.draw_margin_shift(results))


def test_undefined_layers_leave_gaps(results, tmp_path):
    results["convergence"]["cosine"][MONEY] = {name: [None] * 30 for name in results["organisms"]}
    assert "convergence" in draw_all(results, tmp_path)
