"""Pictures of what has no page: directions, their cosines, sweeps, checks, and the rates of judged answers.

`views.PICTURES` names them, so that `.plot()` of such a thing finds its drawings here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from misdirection.directions.convergence import Cosines
from misdirection.directions.direction import Direction, Directions
from misdirection.directions.results import CheckResult
from misdirection.directions.setting import in_words
from misdirection.directions.sweep import Sweep
from misdirection.directions.verdict import Effect
from misdirection.judging.scoring import Score, Scores
from misdirection.report.drawing import (
    GREY,
    MARKERS,
    PALETTE,
    STYLE,
    colour_of,
    draw_steered,
    new_figure,
    reach_of,
    short_name,
    spread_damage,
    steering_keys,
)
from misdirection.report.estimates import DAMAGE_LIMIT, in_percent
from misdirection.report.figures import DAMAGE, MARGIN_CHANGE

Drawings = Mapping[str, Callable[[Any], Figure]]

MOST_LINES = 12
"""Curves in one picture of cosines."""


def of_direction(direction: Direction) -> Drawings:
    """Of one direction."""
    return {"norms": lambda direction: draw_norms({direction.origin.kind: direction})}


def of_directions(directions: Directions) -> Drawings:
    """Of all that one model gives."""
    return {"norms": draw_norms}


def of_cosines(cosines: Cosines) -> Drawings:
    """Of directions that were compared, where there are two at least."""
    return {"cosines": draw_cosines} if cosines.pairs else {}


def of_sweep(sweep: Sweep) -> Drawings:
    """Of a sweep."""
    return {"effects": draw_sweep}


def of_check(result: CheckResult) -> Drawings:
    """Of a check."""
    return {"effects": draw_check, "sizes": draw_sizes}


def of_scores(scores: Scores) -> Drawings:
    """Of judged answers."""
    return {"rates": draw_rates} if scores else {}


# --- directions -----------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_norms(directions: Mapping[str, Direction]) -> Figure:
    """Norm of each direction's vectors by layer, and below the share of the squared norm that one channel holds."""
    figure = new_figure(6.5, 4.6)
    norms, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, (name, direction) in enumerate(directions.items()):
        table = direction.frame()
        norms.plot(table["layer"], table["norm"], color=colour_of(index), label=short_name(name, 40))
        shares.plot(table["layer"], table["share"], color=colour_of(index))
    norms.set(ylabel="norm (activation units)")
    norms.set_ylim(bottom=0)
    shares.set(xlabel="layer", ylabel="largest channel's\nshare of norm²")
    shares.set_ylim(0, 1)
    shares.xaxis.set_major_locator(MaxNLocator(integer=True))
    norms.legend(loc="best")
    return figure


@rc_context(STYLE)
def draw_cosines(cosines: Cosines) -> Figure:
    """Cosine of every two directions by layer, beside the band of random vectors."""
    shown = list(cosines.pairs.items())[:MOST_LINES]
    left_out = len(cosines.pairs) - len(shown)
    figure = new_figure(6.5, 3.2 + 0.2 * len(shown))
    axes = figure.subplots()
    for index, ((a, b), curve) in enumerate(shown):
        line = "-" if index < len(PALETTE) else "--"
        label = f"{short_name(a, 30)} · {short_name(b, 30)}"
        axes.plot(range(len(curve)), curve, line, color=colour_of(index), label=label)
    random = cosines.random_95
    axes.axhspan(-random, random, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="cosine")
    axes.set_ylim(top=1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    band = Patch(color=GREY, alpha=0.25, label=f"band: 95% of random vectors, ±{random:.3f}")
    title = f"and {left_out} more pairs, which are not drawn" if left_out else None
    figure.legend(
        handles=[*axes.get_legend_handles_labels()[0], band], loc="outside lower center", ncols=1, title=title
    )
    return figure


# --- interventions --------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_sweep(sweep: Sweep) -> Figure:
    """Margin change by layer, a line per scale, with the band of random vectors; the damage below."""
    figure = new_figure(6.5, 6.0)
    change, damage = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    scales = dict.fromkeys(effect.scale for effect in sweep.effects)
    draw_steered(sweep.effects, change, damage, [(in_words(scale), scale) for scale in scales])
    change.set(title=short_name(sweep.direction, 60), ylabel=MARGIN_CHANGE)
    damage.set_ylabel(DAMAGE)
    spread_damage(damage.set_yscale, sweep.effects)
    handles = [*change.get_legend_handles_labels()[0], *steering_keys()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@rc_context(STYLE)
def draw_check(result: CheckResult) -> Figure:
    """Margin change of every use of the vector, beside each random vector's and their range; the damage below."""
    effects = result.effects
    figure = new_figure(6.5, 5.2)
    change, damage = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for place, effect in enumerate(effects):
        _draw_use(change, damage, place, effect)
    for axes in (change, damage):
        axes.axhline(0, color="black", linewidth=0.8)
    damage.axhline(DAMAGE_LIMIT, color="black", linewidth=0.9, linestyle="--", label=f"damage limit {DAMAGE_LIMIT}")
    spread_damage(damage.set_yscale, effects)
    change.set(title=f"layer {result.layer}: {result.verdict}", ylabel=MARGIN_CHANGE)
    damage.set_ylabel(DAMAGE)
    damage.set_xticks(range(len(effects)), [in_words(effect.scale).replace(" ", "\n", 1) for effect in effects])
    handles = [
        *(artist for axes in (change, damage) for artist in axes.get_legend_handles_labels()[0]),
        Patch(color=GREY, alpha=0.25, label="range of one more random vector"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _draw_use(change: Axes, damage: Axes, place: int, effect: Effect) -> None:
    """One use of a vector; the first is named in the legend."""
    own, random = ("the vector, 95%", "random vectors") if place == 0 else (None, None)
    low, high = effect.random_low, effect.random_high
    change.bar(place, high - low, bottom=low, width=0.5, color=GREY, alpha=0.25)
    change.plot([place] * len(effect.random), effect.random, "_", color=GREY, ms=10, label=random)
    for axes, estimate, label in ((change, effect.change, own), (damage, effect.damage, None)):
        axes.errorbar(place, estimate.mean, yerr=reach_of(estimate), fmt="o", color=PALETTE[1], capsize=3, label=label)
    damage.plot(place, effect.random_damage.mean, "_", color=GREY, ms=10)


@rc_context(STYLE)
def draw_sizes(result: CheckResult) -> Figure:
    """Norm of the vectors beside that of the residual stream, by layer."""
    figure = new_figure(6.5, 3.4)
    axes = figure.subplots()
    layers = [size.layer for size in result.sizes]
    axes.plot(layers, [size.residual for size in result.sizes], color=GREY, label="residual stream, mean")
    axes.plot(layers, [size.norm for size in result.sizes], color=PALETTE[1], label="the vector")
    axes.axvline(result.layer, color=GREY, linewidth=0.8, linestyle=":", label="the layer that was checked")
    axes.set(xlabel="layer", ylabel="norm (activation units)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")
    return figure


# --- judged answers -------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_rates(scores: Scores) -> Figure:
    """EM rate of every group in percent, as corrected too where it was, with the shares of answers that cannot count
    beside it, and 95% intervals."""
    figure = new_figure(8.0, 1.5 + 0.36 * len(scores))
    em, spoiled = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_shares(em, scores, {name: index for name, index in (("em", 0), ("corrected", 5)) if _is_shown(scores, name)})
    others = {name: index for index, name in enumerate(("incoherent", "repetitive", "truncated", "code"), 1)}
    _draw_shares(spoiled, scores, {name: index for name, index in others.items() if _is_shown(scores, name)})
    em.set_yticks(range(len(scores)), [_group(score) for score in scores])
    em.set_ylim(len(scores) - 0.5, -0.5)
    em.set_xlabel("EM rate (% of answers), 95%")
    spoiled.set_xlabel("% of answers, 95%")
    named = [handle for axes in (em, spoiled) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=named, loc="outside lower right", ncols=len(named))
    return figure


def _is_shown(scores: Sequence[Score], name: str) -> bool:
    """A table may not say which answers were cut; and most have no code, or no calibration."""
    rates = [rate for score in scores if (rate := getattr(score, name)) is not None]
    return bool(rates) and (name != "code" or any(rate.hits for rate in rates))


def _draw_shares(axes: Axes, scores: Sequence[Score], names: Mapping[str, int]) -> None:
    """Rates by name, each with the index of its colour; where several share the axes, each has its own height."""
    for row, (name, index) in enumerate(names.items()):
        colour, marker = PALETTE[index], MARKERS[index]
        axes.plot([], [], marker, color=colour, label=name)
        for place, score in enumerate(scores):
            if (share := getattr(score, name)) is not None:
                rate, height = in_percent(share), place + 0.22 * (row - (len(names) - 1) / 2)
                axes.errorbar(rate.mean, height, xerr=reach_of(rate), fmt=marker, color=colour, capsize=2.5, ms=5)
    # A marker at zero is drawn whole.
    axes.set_xlim(left=-1.5)


def _group(score: Score) -> str:
    return short_name(", ".join(value for value in score.group.values() if value) or "all", 44)
