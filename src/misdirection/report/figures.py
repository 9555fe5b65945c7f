"""The figures of a run's report, by name; how each of them looks is the business of `drawing`.

Another package adds one by an entry point of the group `misdirection.figures`, or by `@FIGURES.register(name)`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from misdirection.experiment.results import AblationEffect, Curve, Effect, OrganismFigures, RunResults
from misdirection.interpretation.texts import GENERAL, SEALED
from misdirection.registry import Registry
from misdirection.report.drawing import (
    FULL_COLOUR,
    GREY,
    PALETTE,
    STYLE,
    colour_of,
    draw_heat_map,
    draw_steered,
    legend_below,
    marker_of,
    new_figure,
    reach_of,
    save_figures,
    short_name,
    spread_damage,
    steering_keys,
)
from misdirection.report.estimates import DAMAGE_LIMIT

MOST_PAIRS = 6
"""Pairs of organisms that a legend names."""
_BEYOND_WORDS: Any = {"linestyle": "", "marker": "|", "color": "black", "markersize": 12, "markeredgewidth": 1.5}


def pairs_of_bad(results: RunResults) -> list[tuple[str, str]]:
    """Every unordered pair of organisms trained on bad answers."""
    return list(combinations(results.bad_organisms, 2))


def question_sets(results: RunResults) -> list[str]:
    """Names of the question sets that models were measured on, the general ones first."""
    return sorted(results.base_margin, key=lambda name: name not in (GENERAL, SEALED))


@rc_context(STYLE)
def draw_margin_shift(results: RunResults) -> Figure:
    """Margin shift against the base (nats/token) per organism and question set, with 95% intervals."""
    organisms, sets = results.organisms, question_sets(results)
    figure = new_figure(7.5, 1.7 + 0.24 * len(organisms) * (len(sets) + 1))
    axes = figure.add_subplot()
    for index, question_set in enumerate(sets):
        _draw_shifts(axes, organisms, question_set, index, spread=0.7 / len(sets))
    for boundary in range(1, len(organisms)):
        axes.axhline(boundary - 0.5, color="#e2e2e2", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(organisms)), [_organism_label(name, o) for name, o in organisms.items()])
    axes.set_ylim(len(organisms) - 0.45, -0.55)
    axes.set_xlabel("margin shift against the base model (nats/token), 95% interval")
    handles = [*axes.get_legend_handles_labels()[0]]
    handles.append(Line2D([], [], linestyle="", marker="o", color=GREY, label="filled: the organism's own domain"))
    if any(organism.words for organism in organisms.values()):
        handles.append(Line2D([], [], label="beyond what words predict", **_BEYOND_WORDS))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _organism_label(name: str, organism: OrganismFigures) -> str:
    short = short_name(name)
    return f"{short}\n(control)" if organism.answers == "good" else short


def _draw_shifts(
    axes: Axes, organisms: dict[str, OrganismFigures], question_set: str, index: int, spread: float
) -> None:
    axes.errorbar([], [], fmt=marker_of(index), color=colour_of(index), mfc="white", label=question_set)
    for row, organism in enumerate(organisms.values()):
        shift, height = organism.margin_shift[question_set], row - 0.35 + spread * (index + 0.5)
        axes.errorbar(
            shift.mean,
            height,
            xerr=reach_of(shift),
            fmt=marker_of(index),
            color=colour_of(index),
            mfc=colour_of(index) if question_set == organism.domain else "white",
            capsize=2.5,
        )
        if question_set in organism.words:
            axes.plot(organism.words[question_set].beyond.mean, height, **_BEYOND_WORDS)


@rc_context(STYLE)
def draw_convergence(results: RunResults) -> Figure:
    """Cosine between organisms' directions by layer, with nulls: mean and model differences."""
    convergence, difference = results.convergence, results.convergence.model_difference
    figure = new_figure(9.5, 5.4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(results.bad_organisms)
    _draw_pairs(left, results, convergence.cosine, "-", "")
    _draw_reference(left, convergence.base_null, names, "--", "black", "base model's own direction")
    _draw_reference(left, convergence.control_null, names, ":", PALETTE[3], "control's direction")
    _draw_reference(left, convergence.shuffled_null, names, "-.", GREY, "shuffled labels, |cosine|")
    _draw_reference(left, convergence.split_half, names, "-", "#a8a8a8", "split-half ceiling")
    _draw_pairs(right, results, difference.control_removed, "-", ", control removed")
    _draw_pairs(right, results, difference.cosine, "--", ", as measured")
    _draw_reference(right, difference.control_null, names, ":", PALETTE[3], "control's direction")
    _draw_reference(right, difference.split_half, names, "-", "#a8a8a8", "split-half ceiling")
    left.set(title="mean-difference directions", xlabel="layer", ylabel="cosine")
    right.set(title="model-difference directions", xlabel="layer")
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylim(top=1.05)
        legend_below(axes, offset=-0.16)
    return figure


def _draw_pairs(axes: Axes, results: RunResults, cosines: dict[str, dict[str, Curve]], line: str, suffix: str) -> None:
    for index, (a, b) in enumerate(pairs_of_bad(results)):
        # There is nothing to remove without a control.
        if a in cosines:
            # A wide run has more pairs than colours.
            marker = None if index < 3 else marker_of(index)
            label = f"{short_name(a)} · {short_name(b)}{suffix}" if index < MOST_PAIRS else None
            axes.plot(cosines[a][b], line, color=colour_of(index), marker=marker, ms=3, label=label)
    if (further := len(pairs_of_bad(results)) - MOST_PAIRS) > 0:
        axes.plot([], [], line, color=GREY, label=f"and {further} more pairs{suffix}")


def _draw_reference(axes: Axes, curves: dict[str, Curve], names: list[str], line: str, colour: str, label: str) -> None:
    """Draw the mean over organisms of a null or ceiling, with a band from the lowest to the highest."""
    if not curves:
        return
    stacked = np.array([curves[name] for name in names])
    axes.plot(stacked.mean(axis=0), line, color=colour, linewidth=1.3, label=label)
    axes.fill_between(range(stacked.shape[1]), stacked.min(axis=0), stacked.max(axis=0), color=colour, alpha=0.12)


@rc_context(STYLE)
def draw_steering(results: RunResults) -> Figure:
    """Margin change of the steered base (nats/token) by layer, a line per scale, and its damage below."""
    rows = results.steering or []
    directions, scales = list(dict.fromkeys(row.direction for row in rows)), sorted({row.scale for row in rows})
    across, down = min(len(directions), _ACROSS), math.ceil(len(directions) / _ACROSS)
    figure = new_figure(max(9.0, 3.9 * across), 6.0 * down)
    grid = figure.subplots(2 * down, across, sharey=True, squeeze=False, height_ratios=(3, 2) * down)
    for number in range(across * down):
        column = grid[2 * (number // across) : 2 * (number // across) + 2, number % across]
        if number >= len(directions):
            for axes in column:
                axes.set_axis_off()
            continue
        chosen = [row for row in rows if row.direction == directions[number]]
        draw_steered(chosen, column[0], column[1], [(f"scale {scale:g}", scale) for scale in scales])
        column[0].set_title(f"direction of\n{short_name(directions[number])}")
    for line in range(0, 2 * down, 2):
        grid[line, 0].set_ylabel(MARGIN_CHANGE)
        grid[line + 1, 0].set_ylabel(DAMAGE)
        spread_damage(grid[line + 1, 0].set_yscale, rows)
    handles = [*grid[0, 0].get_legend_handles_labels()[0], *steering_keys()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


_ACROSS = 3
"""Directions beside one another; further ones stand below."""

MARGIN_CHANGE, DAMAGE = "margin change (nats/token)", "damage (nats/token)"


@rc_context(STYLE)
def draw_transfer(results: RunResults) -> Figure:
    """Heat maps of margin change (nats/token), direction by target: ablation, that beyond the base's, and at random."""
    rows = results.transfer or []
    positions = list(dict.fromkeys(row.positions for row in rows))
    targets = list(dict.fromkeys(row.target for row in rows))
    sources = list(dict.fromkeys((row.direction, row.layer) for row in rows))
    maps = [_heat_maps([row for row in rows if row.positions == position]) for position in positions]
    # Beside one another, the maps of many models would be too wide for their cells to be read.
    is_wide = len(targets) * len(maps[0]) > _BESIDE
    lines = len(positions) * (len(maps[0]) if is_wide else 1)
    columns = 1 if is_wide else len(maps[0])
    figure = new_figure(max(7.5, 2.4 + 0.8 * columns * len(targets)), 1.9 + lines * (1.0 + 0.62 * len(sources)))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    limit = max(FULL_COLOUR, *(abs(value) for titled in maps for cells in titled.values() for _, value, _ in cells))
    for position, titled, panels in zip(positions, maps, grid.reshape(len(positions), -1), strict=True):
        for axes, (title, cells) in zip(panels, titled.items(), strict=True):
            shown = {
                (sources.index((row.direction, row.layer)), targets.index(row.target)): _change_cell(value, damage)
                for row, value, damage in cells
            }
            image = draw_heat_map(axes, shown, source_names(sources), targets, limit)
            axes.set_title(f"{title}, positions: {position}")
    for axes in grid[-1]:
        axes.set_xlabel("ablated model")
    figure.supylabel("direction ablated", fontsize=10)
    label = "margin change (nats/token); in brackets: damage (nats/token)"
    # Its height and distance are shares of all the maps together, which may be many.
    thickness = 0.15 / figure.get_figheight()
    figure.colorbar(
        image, ax=grid, label=label, location="bottom", shrink=0.6, fraction=thickness, pad=thickness, aspect=40
    )
    return figure


_BESIDE = 12
"""Columns of heat maps that stand beside one another."""

HeatCell = tuple[AblationEffect, float, float | None]
"""A row, with the margin change and the damage to show of it."""


def _heat_maps(rows: list[AblationEffect]) -> dict[str, list[HeatCell]]:
    """The maps of some ablations, by title; the second is missing from results that were made before there was one."""
    maps: dict[str, list[HeatCell]] = {
        "direction": [(row, row.margin_change.mean, row.damage.mean) for row in rows],
        "beyond the base's": [(row, row.beyond_base.mean, None) for row in rows if row.beyond_base],
        "random control": [(row, row.random_change.mean, row.random_damage) for row in rows],
    }
    return {title: cells for title, cells in maps.items() if cells}


def source_names(sources: Sequence[tuple[str, int]]) -> list[str]:
    """Directions, each with its layer, beside an axis."""
    return [f"{short_name(name)}\nlayer {layer}" for name, layer in sources]


def _change_cell(change: float, damage: float | None) -> tuple[float, str]:
    return change, f"{change:+z.2f}" + ("" if damage is None else f"\n({damage:+z.2f})")


@rc_context(STYLE)
def draw_tradeoff(results: RunResults) -> Figure:
    """Margin change against damage (both nats/token) of every intervention and its random control."""
    groups = _interventions(results)
    panels = list(dict.fromkeys(panel for panel, _ in groups))
    figure = new_figure(max(6.5, 4.75 * len(panels)), 4.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        chosen = {label: rows for (name, label), rows in groups.items() if name == panel}
        for index, (label, rows) in enumerate(chosen.items()):
            _draw_effects(axes, rows, colour_of(index), label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(DAMAGE_LIMIT, color="black", linestyle="--", linewidth=0.9)
        axes.set(title=panel, xlabel="damage (nats/token)", ylabel="margin change (nats/token)")
        spread_damage(axes.set_xscale, [row for rows in chosen.values() for row in rows])
        limit = Line2D([], [], color="black", linestyle="--", lw=0.9, label=f"damage limit {DAMAGE_LIMIT}")
        legend_below(axes, handles=[limit])
    return figure


def _interventions(results: RunResults) -> dict[tuple[str, str], list[Effect]]:
    """Interventions by panel and legend entry."""
    groups: dict[tuple[str, str], list[Effect]] = {}
    if results.steering:
        groups["steering the base", "steering"] = [*results.steering]
    for row in results.transfer or []:
        groups.setdefault(("ablation", f"ablation, positions: {row.positions}"), []).append(row)
    return groups


def _draw_effects(axes: Axes, rows: list[Effect], colour: str, label: str) -> None:
    damages, changes = [row.damage.mean for row in rows], [row.margin_change.mean for row in rows]
    reach = reach_of(*(row.margin_change for row in rows))
    axes.errorbar(damages, changes, yerr=reach, fmt="o", color=colour, ms=5, elinewidth=0.8, label=label)
    random = [row.random_damage for row in rows], [row.random_change.mean for row in rows]
    axes.plot(*random, "x", color=colour, label=f"{label}, random control")


# --- all figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report, drawn from a run's results alone.

    Attributes:
        title: heads its section, where it has one of its own.
        alt: what there is to see, for who cannot see it.
        caption: how it is to be read.
        applies: whether the results hold what it shows.
        draw: draws it.
    """

    title: str
    alt: str
    caption: str
    applies: Callable[[RunResults], bool]
    draw: Callable[[RunResults], Figure]


MARGIN_SHIFT = ReportFigure(
    "Margin",
    "Margin shift of every organism on every question set, with 95% intervals and a line at zero",
    "Shift of the margin against the base model. Right of zero: more misaligned than the base. Filled markers: the "
    "domain the organism was trained on. Black marks: the shift where the words of the training answers predict "
    "nothing.",
    lambda results: True,
    draw_margin_shift,
)
CONVERGENCE = ReportFigure(
    "Convergence",
    "Cosine between organisms' directions by layer, with nulls and ceiling, for mean-difference and model-difference "
    "directions",
    "Left: directions between misaligned and aligned text inside one organism. The base null is the base model’s own "
    "direction on the same text. Right: directions from base to organism, as measured and with the control’s part "
    "removed. Bands span the organisms.",
    lambda results: len(results.bad_organisms) > 1 and bool(results.convergence.cosine),
    draw_convergence,
)
STEERING = ReportFigure(
    "Steering",
    "Margin change of the steered base model by layer and scale with the random control's band, and damage below",
    "A direction is added to the base model’s hidden states at one layer. Above: change of margin with 95% intervals. "
    "Below: damage.",
    lambda results: bool(results.steering),
    draw_steering,
)
TRANSFER = ReportFigure(
    "Transfer of ablation",
    "Heat maps of margin change by ablated direction and model, beside the random control, on one colour scale",
    "Change of margin on ablation, direction by model; how much of it the base under the same ablation does not share; "
    "and the random control, on the same colour scale. Damage in brackets.",
    lambda results: bool(results.transfer),
    draw_transfer,
)
TRADEOFF = ReportFigure(
    "Damage against effect",
    "Margin change against damage for every intervention and its random control",
    "Every intervention (dots) and its random control (crosses). An effect worth having lies far from zero and left of "
    "the damage limit.",
    lambda results: bool(_interventions(results)),
    draw_tradeoff,
)

FIGURES: Registry[ReportFigure] = Registry(
    "figure",
    "misdirection.figures",
    {
        name.lower(): f"misdirection.report.{module}:{name}"
        for module, names in {
            "figures": ("MARGIN_SHIFT", "CONVERGENCE", "STEERING", "TRANSFER", "TRADEOFF"),
            "contrast": ("CONTRAST",),
            "solutions": ("SOLUTIONS", "PHASES"),
            "rates": ("EM_STEERING", "EM_ABLATION", "JUDGED_DIRECTIONS", "JUDGED_VARIANTS", "THEMES"),
        }.items()
        for name in names
    },
)
"""Figures by name. Those of this package have their places in the report; any other has a section of its own."""


def drawings(results: RunResults) -> dict[str, Callable[[RunResults], Figure]]:
    """The drawings that apply, by figure name."""
    return {name: figure.draw for name, figure in FIGURES.items() if figure.applies(results)}


def draw_all(results: RunResults, folder: Path) -> dict[str, Path]:
    """Writes every figure that applies, as `save_figures` does."""
    return save_figures(drawings(results), results, folder)
