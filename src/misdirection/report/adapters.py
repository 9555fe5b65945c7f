"""The report's part on one organism's adapters: its figures, and what its tables show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from misdirection.interpretation.figures import (
    Agreement,
    Curve,
    Dynamics,
    Extremes,
    Geometry,
    Growth,
    JudgedStep,
    Lens,
    Probe,
    RoleName,
    ScalingEffect,
)
from misdirection.interpretation.results import AdapterFigures
from misdirection.interpretation.scaling import layers_by_factor
from misdirection.interpretation.token_results import TokenTable
from misdirection.report.adapter_findings import find_in_adapters
from misdirection.report.drawing import GREY, PALETTE, STYLE, new_figure, or_nan, reach_of, save_figures, short_name
from misdirection.report.estimates import DAMAGE_LIMIT, in_percent
from misdirection.report.findings import Finding
from misdirection.report.reader import readable, reader_data, visible
from misdirection.statistics.estimates import Estimate, Rate

ROLE_COLOURS: Mapping[RoleName, str] = {"general": PALETTE[1], "domain": PALETTE[0], "neither": "#b5b5b5"}

MOST_VIOLINS = 24
"""Features in one panel; a violin of more of them has no width."""

MOST_LABELS = 12
"""Lines of one figure that a legend can name."""

_WAS_MEASURED = "a figure is drawn of what was measured"


# --- numbers --------------------------------------------------------------------------------------------------------


def show_correlation(agreement: Agreement, name: str) -> str:
    """Word the correlation called `name` with its interval."""
    value, low, high = (getattr(agreement, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{value:+z.2f} [{low:+z.2f}, {high:+z.2f}]"


def show_factors(factors: Mapping[int, float]) -> str:
    """Word what each layer's adapters are multiplied by: `layers 15, 16: ×0; layer 21: ×-1`."""
    return "; ".join(
        f"layer{'s' if len(those) > 1 else ''} {', '.join(map(str, those))}: ×{factor:g}"
        for factor, those in layers_by_factor(factors).items()
    )


def show_words(name: str) -> str:
    """The name of a question set, in words."""
    return "in-domain" if name == "in_domain" else name


# --- page -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterPage:
    """Contents of `adapters.html`: the figures, and tables in the order in which they are shown."""

    damage_limit = DAMAGE_LIMIT
    figures: AdapterFigures
    tokens: TokenTable | None
    """For the token reader; None where the results' folder has none."""

    @classmethod
    def open(cls, figures: AdapterFigures, folder: Path) -> "AdapterPage":
        """The page of figures whose token table is in a folder, if there is one."""
        return cls(figures, TokenTable.load(folder) if (folder / TokenTable.FILE).exists() else None)

    @cached_property
    def reader(self) -> dict[str, Any] | None:
        """The data of the token reader's script."""
        return reader_data(self.tokens) if self.tokens else None

    @cached_property
    def findings(self) -> list[Finding]:
        """The claims about the adapters."""
        return find_in_adapters(self.figures)

    @property
    def probes(self) -> list[Probe]:
        """By question first; the order within each split stays."""
        return sorted(self.figures.probes, key=lambda probe: probe.split != "question")

    @property
    def groups(self) -> list[ScalingEffect]:
        """Settings of several layers together."""
        return _groups(self.figures)

    @property
    def single(self) -> list[ScalingEffect]:
        """Settings of single layers."""
        settings = self.figures.causal.settings if self.figures.causal else ()
        return [setting for setting in settings if setting not in self.groups]

    @property
    def own(self) -> dict[str, dict[str, float]]:
        """By direction, cosine of each feature's B with it at the feature's own layer."""
        geometry = self.figures.geometry
        return {name: geometry.own_cosines(name) for name in geometry.directions} if geometry else {}

    @property
    def lens(self) -> dict[str, Lens]:
        """The logit lens, every token made visible."""

        def shown(tokens: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
            return tuple((visible(token), logit) for token, logit in tokens)

        lenses = self.figures.geometry.logit_lens if self.figures.geometry else {}
        return {name: Lens(top=shown(lens.top), bottom=shown(lens.bottom)) for name, lens in lenses.items()}

    @property
    def nearest(self) -> dict[str, Extremes]:
        """Tokens that switch features on most, as text."""
        nearest = self.figures.geometry.nearest if self.figures.geometry else {}
        tokens = [token for extremes in nearest.values() for token in (*extremes.top, *extremes.bottom)]
        # Which spelling a tokenizer has shows in all of its tokens together.
        texts = readable([text for token in tokens for text in (token.token, token.context)])
        words = iter([visible(text) for text in texts])
        shown = iter([token.model_copy(update={"token": next(words), "context": next(words)}) for token in tokens])
        return {
            name: Extremes(
                top=tuple(next(shown) for _ in extremes.top), bottom=tuple(next(shown) for _ in extremes.bottom)
            )
            for name, extremes in nearest.items()
        }


# --- figures --------------------------------------------------------------------------------------------------------


def draw_adapters(figures: AdapterFigures, folder: Path) -> dict[str, Path]:
    """Writes the figure of every part that was measured, as `save_figures` does."""
    return save_figures(_measured(figures), figures, folder)


class Adapted(Protocol):
    """Results with figures of adapters: a run's, or those of an adapter that was read alone."""

    @property
    def adapters(self) -> AdapterFigures | None: ...


def drawings(results: Adapted) -> dict[str, Callable[[Any], Figure]]:
    """The figures of adapters, by name: those of every part that was measured."""

    def of(draw: Callable[[AdapterFigures], Figure]) -> Callable[[Any], Figure]:
        return lambda results: draw(results.adapters)

    measured = _measured(results.adapters) if results.adapters else {}
    return {name: of(draw) for name, draw in measured.items()}


def _measured(figures: AdapterFigures) -> dict[str, Callable[[AdapterFigures], Figure]]:
    geometry = figures.geometry
    drawn = {
        "adapter_probes": (draw_probes, bool(_token_probes(figures))),
        "adapter_shapley": (draw_shapley, figures.causal is not None),
        "adapter_scalings": (draw_scalings, bool(_scalings(figures))),
        "adapter_geometry": (draw_geometry, bool(geometry and (geometry.directions or geometry.downstream))),
        "adapter_dynamics": (draw_dynamics, figures.dynamics is not None),
    }
    return {name: draw for name, (draw, applies) in drawn.items() if applies}


def _token_probes(figures: AdapterFigures) -> dict[str, dict[str, Probe]]:
    """Probes on the scalars of tokens, by name and split."""
    by_name: dict[str, dict[str, Probe]] = {}
    for probe in figures.probes:
        if probe.is_on_token_scalars:
            by_name.setdefault(probe.name, {})[probe.split] = probe
    return by_name


@rc_context(STYLE)
def draw_probes(figures: AdapterFigures) -> Figure:
    """Coefficients of the probes over the splits, by feature: split by question, and by answer beside it."""
    probes = _token_probes(figures)
    splits = [split for split in ("question", "answer") if any(split in by_split for by_split in probes.values())]
    figure = new_figure(9.5, 1.0 + 2.5 * len(probes))
    grid = figure.subplots(len(probes), len(splits), squeeze=False, sharey="row")
    for line, (name, by_split) in zip(grid, probes.items(), strict=True):
        chosen = _leading(next(by_split[split] for split in splits if split in by_split))
        for axes, split in zip(line, splits, strict=True):
            if split in by_split:
                _draw_violins(axes, by_split[split], chosen)
            else:
                _say_unmeasured(axes)
            axes.set_title(f"{name}\nsplit by {split}" + _auroc_words(by_split.get(split)))
        line[0].set_ylabel("coefficient")
    return figure


def _auroc_words(probe: Probe | None) -> str:
    return f", AUROC {probe.auroc}" if probe else ""


def _leading(probe: Probe) -> list[str]:
    """The features with the largest mean coefficients, in the order of the layers."""
    means = {name: abs(np.mean(values)) for name, values in probe.coefficients.items()}
    kept = set(sorted(means, key=lambda name: -means[name])[:MOST_VIOLINS])
    return [name for name in means if name in kept]


def _draw_violins(axes: Axes, probe: Probe, features: Sequence[str]) -> None:
    values = [probe.coefficients[name] for name in features]
    is_headline = probe.split == "question"
    colour = PALETTE[0] if is_headline else GREY
    parts: Any = axes.violinplot(values, showextrema=False, widths=0.85)
    for body in parts["bodies"]:
        body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
    ticks = range(1, len(features) + 1)
    axes.plot(ticks, [np.mean(over_splits) for over_splits in values], "o", color=colour, ms=4)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [name.removeprefix("layer_") for name in features]
    axes.set_xticks(list(ticks), labels, rotation=0 if max(map(len, labels)) < 4 else 60, fontsize=9)
    count = len(probe.coefficients)
    axes.set_xlabel(f"the {len(features)} largest of {count}" if count > len(features) else "adapter of layer")


def _say_unmeasured(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([])


@rc_context(STYLE)
def draw_shapley(figures: AdapterFigures) -> Figure:
    """Shapley value of each layer's adapters (nats/token) with 95% intervals, coloured by role; a panel per set."""
    assert figures.causal is not None, _WAS_MEASURED
    values = figures.causal.shapley.values
    roles = {role.layer: role.role for role in figures.roles}
    figure = new_figure(8.0, 0.8 + 2.5 * len(values))
    grid = figure.subplots(len(values), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, by_layer) in zip(grid, values.items(), strict=True):
        _draw_bars(axes, by_layer, roles)
        axes.set(title=f"{show_words(name)} margin", ylabel="Shapley value\n(nats/token)")
    grid[-1].set_xlabel("layer of the adapters")
    keys = [Patch(color=colour, label=f"role: {role}") for role, colour in ROLE_COLOURS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def _draw_bars(axes: Axes, by_layer: Mapping[int, Estimate], roles: Mapping[int, RoleName]) -> None:
    for bar, (layer, value) in enumerate(by_layer.items()):
        axes.bar(bar, value.mean, yerr=reach_of(value), color=ROLE_COLOURS[roles[layer]], capsize=3, width=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(by_layer)), [str(layer) for layer in by_layer])


@rc_context(STYLE)
def draw_scalings(figures: AdapterFigures) -> Figure:
    """What settings of several layers do to margins, and to the shares of answers that are misaligned or of a theme."""
    names = _scalings(figures)
    panels = [panel for panel in _scaling_panels(figures) if panel.points]
    figure = new_figure(2.6 + 2.5 * len(panels), 1.5 + 0.42 * len(names))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for index, (label, by_name) in enumerate(panel.points.items()):
            _draw_points(axes, {names.index(name): point for name, point in by_name.items()}, index, label)
        axes.set_xlabel(panel.unit)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.legend(title=panel.title, title_fontsize=11, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    answers = {shares.setting: shares.misaligned for shares in figures.shares}
    axes.set_yticks(range(len(names)), [_with_n(name, answers.get(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _with_n(setting: str, coherent: Rate | None) -> str:
    words = short_name(setting, 44)
    return words if coherent is None else f"{words}\nn={coherent.total} coherent"


@dataclass(frozen=True)
class _Panel:
    """Estimates by setting, by what they are of."""

    title: str
    unit: str
    points: Mapping[str, Mapping[str, Estimate]]


def _scalings(figures: AdapterFigures) -> list[str]:
    """The settings of several layers together that there are figures of; judged answers have one more, as it is."""
    measured = [setting.name for setting in _groups(figures)]
    return list(dict.fromkeys([*(shares.setting for shares in figures.shares), *measured]))


def _groups(figures: AdapterFigures) -> list[ScalingEffect]:
    """Settings of several layers together."""
    settings = figures.causal.settings if figures.causal else ()
    return [setting for setting in settings if not setting.name.startswith("layer ")]


def _scaling_panels(figures: AdapterFigures) -> Iterator[_Panel]:
    groups = _groups(figures)
    sets = dict.fromkeys(name for setting in groups for name in setting.margin)
    margins = {show_words(name): {setting.name: setting.margin[name] for setting in groups} for name in sets}
    yield _Panel("margin", "change (nats/token)", margins)
    misaligned = {shares.setting: shares.misaligned for shares in figures.shares}
    yield _Panel("misaligned", _PERCENT, _points({"all": misaligned}))
    for rubric in dict.fromkeys(each.rubric for shares in figures.shares for each in shares.rubrics):
        of = {shares.setting: each for shares in figures.shares for each in shares.rubrics if each.rubric == rubric}
        both = {
            "all": {name: each.share for name, each in of.items()},
            "misaligned, too": {name: each.misaligned for name, each in of.items()},
        }
        yield _Panel(rubric, _PERCENT, _points(both))


_PERCENT = "% of the coherent answers"


def _points(rates: Mapping[str, Mapping[str, Rate | None]]) -> dict[str, dict[str, Estimate]]:
    """Shares in percent; none where no answer is coherent."""
    return {
        label: {name: in_percent(rate) for name, rate in by_name.items() if rate is not None}
        for label, by_name in rates.items()
        if any(by_name.values())
    }


def _draw_points(axes: Axes, points: Mapping[int, Estimate], index: int, label: str) -> None:
    axes.errorbar(
        [point.mean for point in points.values()],
        [row + 0.22 * index for row in points],
        xerr=reach_of(*points.values()),
        fmt="os"[index % 2],
        color=PALETTE[index % len(PALETTE)],
        mfc="white" if index else PALETTE[0],
        ms=5,
        capsize=2.5,
        label=label,
    )


@rc_context(STYLE)
def draw_geometry(figures: AdapterFigures) -> Figure:
    """Cosine of B with the directions at its own layer, and of what each adapter causes with one at later layers."""
    geometry = figures.geometry
    assert geometry is not None, _WAS_MEASURED
    figure = new_figure(9.5, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_own(left, geometry)
    if effects := geometry.downstream:
        for (layer, values), colour in zip(effects.cosine.items(), _line_colours(len(effects.cosine)), strict=True):
            right.plot([or_nan(value) for value in values], color=colour, label=str(layer))
            _draw_band(right, effects.low[layer], effects.high[layer], colour)
        right.axhline(0, color="black", linewidth=0.8)
        _name_lines(figure, right, "adapters of layer")
    else:
        _say_unmeasured(right)
    right.set(title="what they cause, at every layer after", xlabel="layer")
    left.set_ylim(top=1.05)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_own(axes: Axes, geometry: Geometry) -> None:
    random = geometry.random_cosine_95
    axes.axhspan(-random, random, color=GREY, alpha=0.2, label=f"95% of random vectors: ±{random:.3f}")
    for index, name in enumerate(geometry.directions):
        own = geometry.own_cosines(name)
        layers = [geometry.layers_of[feature] for feature in own]
        axes.plot(layers, list(own.values()), "os^Dv"[index % 5], color=PALETTE[index % 7], mfc="white", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="B, at its own layer", xlabel="layer", ylabel="cosine with the direction")
    axes.legend(loc="best", title="direction of")


def _draw_band(axes: Axes, low: Curve, high: Curve, colour: Any) -> None:
    least, most = ([or_nan(value) for value in curve] for curve in (low, high))
    axes.fill_between(range(len(low)), least, most, color=colour, alpha=0.1, linewidth=0)


def _line_colours(count: int) -> list[Any]:
    """From dark to light, since lines stand for layers in their order."""
    return list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def _name_lines(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= MOST_LABELS:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9), title=title)


@rc_context(STYLE)
def draw_dynamics(figures: AdapterFigures) -> Figure:
    """B's rotation and the update's norm by training step, and the margin shift and what a judge said at some steps."""
    dynamics = figures.dynamics
    assert dynamics is not None, _WAS_MEASURED
    # Where answers were judged there is one picture more, and the local cosine beside it.
    across = 3 if dynamics.judged else 2
    figure = new_figure(4.75 * across, 6.4)
    grid = figure.subplots(2, across, sharex=True)
    colours = _line_colours(len(dynamics.features))
    growths = list(_GROWTH.items())[: 2 * across - (2 if dynamics.judged else 1)]
    for axes, (key, label) in zip(grid.flat, growths, strict=False):
        for (name, growth), colour in zip(dynamics.features.items(), colours, strict=True):
            _draw_growth(axes, dynamics.steps, growth, key, colour, name.removeprefix("layer_"))
        axes.set_ylabel(label)
    _draw_margins(grid.flat[len(growths)], dynamics)
    if dynamics.judged:
        _draw_judged_steps(grid.flat[len(growths) + 1], dynamics.judged)
    for axes in grid[1]:
        axes.set_xlabel("training step")
    _name_lines(figure, grid[0, 0], "adapter of layer; a dot marks a turn")
    return figure


_GROWTH = {
    "to_final": "cosine of B with its final value",
    "to_previous": "cosine of B with the step before",
    "norm": "norm of the update",
    "local": "local cosine of B",
}


def _draw_growth(axes: Axes, steps: Sequence[int], growth: Growth, key: str, colour: Any, label: str) -> None:
    values = [or_nan(value) for value in getattr(growth, key)]
    axes.plot(steps, values, color=colour, label=label)
    if growth.turn is not None:
        axes.plot(growth.turn, values[steps.index(growth.turn)], "o", color=colour, ms=5)


def _draw_margins(axes: Axes, dynamics: Dynamics) -> None:
    for index, (name, values) in enumerate(dynamics.margin.items()):
        _draw_line(axes, dynamics.margin_steps, values, index, PALETTE[index % len(PALETTE)], show_words(name))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("margin shift (nats/token)")
    axes.legend(loc="best")


def _draw_line(
    axes: Axes, steps: Sequence[int], values: Sequence[Estimate], index: int, colour: str, label: str
) -> None:
    """Means by step with their intervals."""
    means, look = [value.mean for value in values], "os"[index % 2] + "-"
    axes.errorbar(steps, means, yerr=reach_of(*values), fmt=look, color=colour, ms=4, capsize=2.5, label=label)


def _draw_judged_steps(axes: Axes, judged: Sequence[JudgedStep]) -> None:
    for index, (key, label) in enumerate({"em": "misaligned (EM)", "incoherent": "incoherent"}.items()):
        rates = [in_percent(getattr(step.score, key)) for step in judged]
        _draw_line(axes, [step.step for step in judged], rates, index, PALETTE[1 - index], label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("% of all answers")
    axes.legend(loc="best")
