"""Figures of judged answers: EM rates under interventions, directions of judged answers, themes."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from misdirection.experiment.config import NONE
from misdirection.experiment.judged_results import RatedAblation, RatedSteering, ThemeEffect
from misdirection.experiment.results import Curve, RunResults
from misdirection.judging.scoring import COHERENT_SHARE
from misdirection.report.drawing import (
    GREY,
    STYLE,
    colour_of,
    draw_heat_map,
    marker_of,
    new_figure,
    reach_of,
    short_name,
)
from misdirection.report.estimates import in_percent
from misdirection.report.figures import MOST_PAIRS, ReportFigure, source_names
from misdirection.statistics.estimates import Estimate, Rate

FULL_POINTS = 10.0
"""Smallest change, percentage points, that a heat map paints in its darkest colour."""


# --- steering -------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_em_steering(results: RunResults) -> Figure:
    """EM rate of the steered base in percent by layer, a line per scale, and the share of coherent answers below."""
    rows = results.em_steering or []
    figure = new_figure(8.0, 6.4)
    em, coherent = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    scales = sorted({row.scale for row in rows})
    layers = sorted({row.layer for row in rows})
    # Intervals of one layer stand beside one another.
    apart = 0.05 * min((after - before for before, after in pairwise(layers)), default=1)
    for index, scale in enumerate(scales):
        chosen = sorted((row for row in rows if row.scale == scale), key=lambda row: row.layer)
        _draw_scale(em, coherent, chosen, index, apart * (index - (len(scales) - 1) / 2))
    em.axhline(100 * rows[0].before.rate, color="black", linewidth=0.8)
    em.set(ylabel="EM rate (% of answers), 95%", title=f"direction of {short_name(rows[0].direction, 60)}")
    coherent.axhline(100 * COHERENT_SHARE, color="black", linewidth=0.9, linestyle="--")
    coherent.set(ylabel="coherent (% of answers)", xlabel="layer", ylim=(-3, 103))
    coherent.set_xticks(layers if len(layers) <= 16 else layers[:: -(-len(layers) // 16)])
    handles = [*em.get_legend_handles_labels()[0], *_keys(any(row.best for row in rows))]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_scale(em: Axes, coherent: Axes, rows: Sequence[RatedSteering], index: int, shift: float) -> None:
    """One scale's line, so far to the right of its layers."""
    layers, colour = [row.layer + shift for row in rows], colour_of(index)
    look: dict[str, Any] = {"color": colour, "marker": marker_of(index), "ms": 5}
    rates = [in_percent(row.em) for row in rows]
    label = f"scale {rows[0].scale:g}"
    em.errorbar(layers, [rate.mean for rate in rates], yerr=reach_of(*rates), capsize=2.5, label=label, **look)
    em.plot(layers, [100 * row.random_em.rate for row in rows], ":x", color=colour)
    coherent.plot(layers, [100 * row.coherent.rate for row in rows], **look)
    coherent.plot(layers, [100 * row.random_coherent.rate for row in rows], ":x", color=colour)
    for row in rows:
        if row.best:
            em.plot(row.layer + shift, 100 * row.em.rate, "o", ms=15, mfc="none", mec="black")


def _keys(is_any_best: bool) -> list[Line2D]:
    best = [Line2D([], [], linestyle="", marker="o", ms=12, mfc="none", mec="black", label="highest, coherent enough")]
    return [
        *(best if is_any_best else []),
        Line2D([], [], color=GREY, linestyle=":", marker="x", label="random direction of the same norm"),
        Line2D([], [], color="black", linewidth=0.8, label="the base as it is"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="half of the answers coherent"),
    ]


# --- ablation -------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_em_ablation(results: RunResults) -> Figure:
    """Heat map of EM rates before and after ablation, direction by model, with a random direction in the last row."""
    rows = results.em_ablation or []
    targets = list(dict.fromkeys(row.target for row in rows))
    sources = list(dict.fromkeys((row.direction, row.layer) for row in rows))
    cells = {
        (sources.index((row.direction, row.layer)), targets.index(row.target)): _before_and_after(
            row, row.em, row.change
        )
        for row in rows
    }
    # All directions of one model stand beside the same random one.
    for row in rows:
        cells[len(sources), targets.index(row.target)] = _before_and_after(row, row.random_em, row.random_change)
    figure = new_figure(max(7.0, 2.6 + 1.35 * len(targets)), 2.6 + 0.7 * (len(sources) + 1))
    axes = figure.subplots()
    limit = max(FULL_POINTS, *(abs(value) for value, _ in cells.values()))
    image = draw_heat_map(axes, cells, [*source_names(sources), "random"], targets, limit)
    axes.set(xlabel="model that answers", ylabel="direction ablated")
    label = "change of the EM rate (percentage points)\nin the cells: EM % before and after; 95% of the change"
    figure.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.7, aspect=40)
    return figure


def _before_and_after(row: RatedAblation, after: Rate, change: Estimate) -> tuple[float, str]:
    bounds = f"[{100 * change.low:+z.1f}, {100 * change.high:+z.1f}]"
    return 100 * change.mean, f"{100 * row.before.rate:.1f} → {100 * after.rate:.1f}\n{bounds}"


# --- directions of judged answers -----------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_judged_directions(results: RunResults) -> Figure:
    """Cosines by layer of directions from judged answers: between organisms, and of each with its references."""
    assert results.judged_directions is not None, "the figure applies"
    found = results.judged_directions.convergence
    figure = new_figure(9.5, 4.6 + 0.2 * len(found.split_half))
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(found.split_half)
    for index, (a, b) in enumerate(combinations(names, 2)):
        label = f"{short_name(a)} · {short_name(b)}" if index < MOST_PAIRS else None
        _draw_curve(left, found.cosine[a][b], index, label)
        left.plot(found.base_pair_null[a][b], "--", color=colour_of(index), linewidth=0.9)
    for index, name in enumerate(names):
        if name in found.given:
            _draw_curve(right, found.given[name], index, f"{short_name(name)}, given answers")
        right.plot(found.base_null[name], "--", color=colour_of(index), linewidth=0.9)
        right.plot(found.split_half[name], "-", color="#a8a8a8")
        right.plot(found.shuffled_null[name], "-.", color=GREY)
    left.set(title="between organisms", xlabel="layer", ylabel="cosine")
    right.set(title="with the organism's references", xlabel="layer")
    references = [
        Line2D([], [], color=GREY, linestyle="--", label="base model's direction on the same answers"),
        Line2D([], [], color="#a8a8a8", label="split-half ceiling"),
        Line2D([], [], color=GREY, linestyle="-.", label="shuffled labels, |cosine|"),
    ]
    _finish(figure, (left, right), references)
    return figure


@rc_context(STYLE)
def draw_judged_variants(results: RunResults) -> Figure:
    """Cosines by layer of the variants of each organism's direction with the organism's own."""
    assert results.judged_directions is not None, "the figure applies"
    variants = results.judged_directions.variants
    across = min(len(variants), 3)
    down = -(-len(variants) // across)
    figure = new_figure(max(6.0, 3.6 * across), 1.4 + 2.8 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(variants) :]:
        axes.set_axis_off()
    for axes, (name, cosines) in zip(grid.flat, variants.items(), strict=False):
        for index, (kind, label) in enumerate(_VARIANTS.items()):
            _draw_curve(axes, cosines["data_difference"][kind], index, label)
        axes.set(title=short_name(name), xlabel="layer")
    grid[0, 0].set_ylabel("cosine with the organism's\nmisaligned minus aligned")
    _finish(figure, list(grid.flat[: len(variants)]), [])
    return figure


_VARIANTS = {
    "base_data_difference": "base: misaligned minus aligned",
    "model_difference_misaligned": "organism minus base, misaligned answers",
    "model_difference_aligned": "organism minus base, aligned answers",
    "model_difference": "organism minus base, all answers",
}


def _draw_curve(axes: Axes, curve: Curve, index: int, label: str | None) -> None:
    marker = None if index < 3 else marker_of(index)
    axes.plot(curve, color=colour_of(index), marker=marker, ms=3, label=label)


def _finish(figure: Figure, panels: Sequence[Axes], references: Sequence[Line2D]) -> None:
    """Axes of cosines, and one legend that names each curve once."""
    for axes in panels:
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylim(top=1.05)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    known = {str(line.get_label()): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=[*known.values(), *references], loc="outside lower center", ncols=2)


# --- themes ---------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_themes(results: RunResults) -> Figure:
    """Shares of answers about each theme, in percent, by the direction that the base is steered with."""
    assert results.themes is not None, "the figure applies"
    themes, effects = list(results.themes.answers), results.themes.effects
    (plain,) = (effect for effect in effects if effect.direction == NONE)
    columns = ["EM", "coherent", *(f"about {theme}" for theme in themes)]
    cells = {
        (row, column): cell
        for row, effect in enumerate(effects)
        for column, cell in enumerate(_theme_cells(effect, plain, themes))
    }
    figure = new_figure(max(7.0, 3.2 + 1.35 * len(columns)), 2.2 + 0.6 * len(effects))
    axes = figure.subplots()
    limit = max(FULL_POINTS, *(abs(value) for value, _ in cells.values()))
    names = [short_name(effect.direction, 40) for effect in effects]
    image = draw_heat_map(axes, cells, names, columns, limit)
    axes.set(ylabel="the base is steered with", xlabel="share of its answers")
    label = "change against the base as it is (percentage points); in the cells: % of answers, 95%"
    figure.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.7, aspect=40)
    return figure


def _theme_cells(effect: ThemeEffect, plain: ThemeEffect, themes: Sequence[str]) -> list[tuple[float, str]]:
    rates = [(effect.em, plain.em), (effect.coherent, plain.coherent)]
    rates += [(effect.about[theme], plain.about[theme]) for theme in themes]
    return [
        (100 * (own.rate - base.rate), f"{100 * own.rate:.1f}\n[{100 * own.low:.1f}, {100 * own.high:.1f}]")
        for own, base in rates
    ]


# --- all figures ----------------------------------------------------------------------------------------------------

EM_STEERING = ReportFigure(
    "EM rate of the steered base",
    "EM rate by layer, a line for each scale, with a random direction beside each, and coherent answers below",
    "A direction is added to the base model’s hidden states at one layer while it answers. Above: misaligned and "
    "coherent answers with 95% intervals over questions. Below: coherent answers; a rate under the dashed line is that "
    "of a broken model. Crosses: a random direction of the same norm.",
    lambda results: bool(results.em_steering),
    draw_em_steering,
)
EM_ABLATION = ReportFigure(
    "EM rate under ablation",
    "Heat maps of EM rates before and after, by ablated direction and model, beside a random direction",
    "EM % before and after each direction is taken out of each model while it answers, with the 95% interval of the "
    "change (paired over questions), and the same with a random direction.",
    lambda results: bool(results.em_ablation),
    draw_em_ablation,
)
JUDGED_DIRECTIONS = ReportFigure(
    "Directions of the organisms’ own judged answers",
    "Cosine by layer between organisms' directions of judged answers, and of each with its references",
    "Left: directions between each organism’s own misaligned and aligned answers; dashed, the base’s on the same "
    "answers. Right: each with its direction of given answers and its nulls and ceiling.",
    lambda results: bool(results.judged_directions and results.judged_directions.variants),
    draw_judged_directions,
)
JUDGED_VARIANTS = ReportFigure(
    "Variants of the direction",
    "Cosine by layer of four variants of the direction with the organism's own, a panel for each organism",
    "The organism’s own judged answers are read by it and by the base: what the text alone explains, and what the "
    "model’s change explains on misaligned, aligned and all answers.",
    lambda results: bool(results.judged_directions and results.judged_directions.variants),
    draw_judged_variants,
)
THEMES = ReportFigure(
    "Themes",
    "Table of shares of answers about each theme by the direction that the base is steered with",
    "The base answers steered with the direction of each theme, of all themes (shared), with what each lacks of the "
    "other, and with a random one, all at one length.",
    lambda results: results.themes is not None,
    draw_themes,
)
