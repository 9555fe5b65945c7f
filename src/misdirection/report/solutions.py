"""Pictures and words of organisms as solutions of their training domain: by norm, under noise, and by step."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from misdirection.experiment.results import RunResults
from misdirection.experiment.solution_results import (
    Measure,
    NoisyUpdate,
    Phase,
    ScaledUpdate,
    SolutionDifference,
    SolutionFigures,
)
from misdirection.interpretation.texts import GENERAL, SEALED
from misdirection.report.drawing import STYLE, colour_of, marker_of, new_figure, reach_of, short_name
from misdirection.report.estimates import Interval, show_estimate
from misdirection.report.figures import ReportFigure
from misdirection.statistics.comparisons import significant
from misdirection.statistics.estimates import Estimate


def _solutions(results: RunResults) -> SolutionFigures:
    assert results.solutions is not None, "the figure applies"
    return results.solutions


# --- pictures ---------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_solutions(results: RunResults) -> Figure:
    """Change of the loss by norm, its rise by noise, and the KL divergence on neutral text by norm (nats/token)."""
    figure = new_figure(11.5, 4.4)
    efficiency, stability, significance = figure.subplots(1, 3)
    for index, (name, solution) in enumerate(_solutions(results).solutions.items()):
        _draw_scaled(efficiency, solution.scaled, solution.own, lambda at: at.loss_change, index, name)
        _draw_scaled(significance, solution.scaled, solution.own, lambda at: at.kl, index, name)
        _draw_noisy(stability, solution.noisy, index)
    efficiency.set(title="efficiency", xlabel="norm of the update", ylabel="loss on the domain, against the base's")
    stability.set(title="stability", xlabel="noise, of the update's norm", ylabel="rise of that loss")
    significance.set(title="significance", xlabel="norm of the update", ylabel="KL on neutral text, from the base")
    for axes in (efficiency, stability, significance):
        axes.axhline(0, color="black", linewidth=0.8)
    figure.legend(handles=efficiency.get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return figure


def _draw_scaled(
    axes: Axes,
    scaled: Sequence[ScaledUpdate],
    own: ScaledUpdate,
    figure_of: Callable[[ScaledUpdate], Interval],
    index: int,
    name: str,
) -> None:
    """A line over the norms, with a hollow mark where the organism was trained to."""
    points = sorted([*scaled, own], key=lambda at: at.norm)
    _draw_line(axes, [at.norm for at in points], [figure_of(at) for at in points], index, short_name(name))
    axes.plot(own.norm, figure_of(own).mean, marker_of(index), color=colour_of(index), mfc="white", ms=9, zorder=3)


def _draw_noisy(axes: Axes, noisy: Sequence[NoisyUpdate], index: int) -> None:
    points = sorted(noisy, key=lambda at: at.noise)
    _draw_line(axes, [at.noise for at in points], [at.loss_rise for at in points], index)


def _draw_line(
    axes: Axes,
    places: Sequence[float],
    figures: Sequence[Interval],
    index: int,
    label: str | None = None,
    *,
    begin: tuple[float, float] = (0.0, 0.0),
    line: str = "-",
) -> None:
    """Means with their intervals, from a point that has none: the base, or an organism that is not changed."""
    means, colour = [figure.mean for figure in figures], colour_of(index)
    axes.plot([begin[0], *places], [begin[1], *means], line, color=colour, linewidth=1.3)
    marks: dict[str, Any] = {"fmt": marker_of(index), "color": colour, "ms": 4, "capsize": 2.5}
    axes.errorbar(places, means, yerr=reach_of(*figures), label=label, **marks)


@rc_context(STYLE)
def draw_phases(results: RunResults) -> Figure:
    """Margin shift against the base (nats/token) by step of the training, on general questions and the own domain's."""
    figure = new_figure(9.5, 4.2)
    general, domain = figure.subplots(1, 2)
    solutions = _solutions(results)
    for index, (name, solution) in enumerate(solutions.solutions.items()):
        for axes, questions in ((general, GENERAL), (domain, solution.domain)):
            if name in solutions.phases and questions in solutions.phases[name].shift:
                _draw_phase(axes, solutions.phases, name, questions, index)
    for axes, title in ((general, "general questions"), (domain, "questions of its own domain")):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="step of the training", ylabel="margin shift (nats/token)")
    figure.legend(handles=general.get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return figure


def _draw_phase(axes: Axes, phases: Mapping[str, Phase], name: str, questions: str, index: int) -> None:
    phase, begin = phases[name], _begin(phases, name, questions)
    label, line = (f"{name}, from {phase.continues} on", "--") if phase.continues else (name, "-")
    places = [begin[0] + step for step in phase.steps]
    _draw_line(axes, places, phase.shift[questions], index, short_name(label, 40), begin=begin, line=line)


def _begin(phases: Mapping[str, Phase], name: str, questions: str) -> tuple[float, float]:
    """The step and the shift at which an organism's training begins: where the one that it went on from ended."""
    before = phases[name].continues
    if before is None:
        return 0.0, 0.0
    if before not in phases or questions not in phases[before].shift:
        return 0.0, math.nan
    return _begin(phases, before, questions)[0] + phases[before].steps[-1], phases[before].shift[questions][-1].mean


# --- words ------------------------------------------------------------------------------------------------------------


_BETTER: dict[Measure, tuple[str, str, str, str]] = {
    "efficiency": ("the more efficient solution", "loss on the domain at equal norm", "lower", "norms"),
    "stability": ("the more stable solution", "rise of that loss under noise", "lower", "sizes of noise"),
    "significance": ("of more weight for neutral text", "KL divergence at equal norm", "higher", "norms"),
}
"""What an organism is, whose figure of this name is lower or higher, and at what it is measured."""


def statements(solutions: SolutionFigures) -> list[str]:
    """What was found of every organism against the first one, and of those that went on from another one."""
    first = next(iter(solutions.solutions))
    pairs = groupby(solutions.differences, key=lambda each: (each.measure, each.organism))
    compared = [_in_words(measure, name, first, list(differences)) for (measure, name), differences in pairs]
    phases = solutions.phases.items()
    return compared + [_drift_in_words(name, each.continues, each.drift) for name, each in phases if each.continues]


def _in_words(measure: Measure, name: str, first: str, differences: Sequence[SolutionDifference]) -> str:
    better, figure, better_is, places = _BETTER[measure]
    sure = significant([each.difference for each in differences])
    found = [each.difference.mean for each, is_sure in zip(differences, sure, strict=True) if is_sure]
    lower, higher = sum(mean < 0 for mean in found), sum(mean > 0 for mean in found)
    last = max(differences, key=lambda each: each.at)
    shown = f"At the largest, {last.at:.3g}, {name} minus {first}: {show_estimate(last.difference)} nats/token."
    if bool(lower) == bool(higher):
        counts = f"is lower at {lower} and higher at {higher}" if lower else "is not surely another at any"
        claim = f"Neither {name} nor {first} is {better}: the {figure} of {name} {counts} of {len(sure)} {places}."
    else:
        winner, loser = (name, first) if bool(lower) == (better_is == "lower") else (first, name)
        count = f"for sure at {lower or higher} of {len(sure)} {places}"
        claim = f"{winner} is {better} than {loser}: its {figure} is {better_is} {count}."
    return f"{claim} {shown}"


def _drift_in_words(name: str, start: str, drift: Mapping[str, Estimate]) -> str:
    asked = SEALED if SEALED in drift else GENERAL
    how = "drifted" if drift[asked].low > 0 else "did not surely drift"
    shown = "; ".join(f"{questions} {show_estimate(estimate)}" for questions, estimate in drift.items())
    return (
        f"Going on from {start}, {name} {how} towards misaligned answers on {asked} questions. Margin minus that of "
        f"{start}, nats/token: {shown}."
    )


SOLUTIONS = ReportFigure(
    "Solutions of the training domain",
    "Three panels with a line for each organism: loss on its domain by the norm of its update, rise of that loss by "
    "noise, and KL divergence on neutral text by norm, with 95% intervals",
    "Left: loss on the held-out rows of an organism’s domain when its update is scaled to a norm; lower is more "
    "efficient. Middle: rise of that loss when a random update of the same rank, orthogonal to its own, is added; "
    "flatter is more stable. Right: how far the update moves the base’s predictions on neutral text. Hollow marks: the "
    "norm that it was trained to.",
    lambda results: results.solutions is not None,
    draw_solutions,
)
PHASES = ReportFigure(
    "By step",
    "Margin shift by step of the training, on general questions and on those of each organism's domain, with 95% "
    "intervals",
    "Margin shift against the base at the checkpoints. Dashed: a training that goes on from another organism, at whose "
    "last step it begins.",
    lambda results: results.solutions is not None and bool(results.solutions.phases),
    draw_phases,
)
