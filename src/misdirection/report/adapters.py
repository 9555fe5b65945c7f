"""The report's part on one organism's adapters: its figures, and what its tables show.

Everything here reads the section `adapters` of the results alone and tolerates that parts of it are absent.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from misdirection.report.estimates import Estimate, is_measured, is_number
from misdirection.report.figures import GREY, PALETTE, STYLE, new_figure, or_nan, reach_of, save_figure
from misdirection.report.reader import readable, visible

Section = dict[str, Any]
Probe = dict[str, Any]

ROLE_COLOURS = {"general": PALETTE[1], "domain": PALETTE[0], "neither": "#b5b5b5"}

MOST_VIOLINS = 24
"""Features in one panel; a violin of more of them has no width."""

MOST_LABELS = 12
"""Lines of one figure that a legend can name."""


# --- numbers --------------------------------------------------------------------------------------------------------


def show_spread(value: Any) -> str:
    """Word a share or score without a sign as `mean [low, high]`, or a dash where it is undefined."""
    # Without the z, a coefficient just below zero reads -0.00.
    return f"{value['mean']:z.2f} [{value['low']:z.2f}, {value['high']:z.2f}]" if is_measured(value) else "–"


def show_correlation(agreement: Mapping[str, Any], name: str) -> str:
    """Word the correlation called `name` with its interval."""
    value, low, high = (agreement.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if not is_number(value):
        return "–"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if is_number(low) and is_number(high) else f"{value:+.2f}"


def show_factors(factors: Mapping[str, float]) -> str:
    """Word what each layer's adapters are multiplied by: `layers 15, 16: ×0; layer 21: ×-1`."""
    layers: dict[float, list[str]] = {}
    for layer, factor in factors.items():
        layers.setdefault(factor, []).append(str(layer))
    return "; ".join(
        f"layer{'s' if len(those) > 1 else ''} {', '.join(those)}: ×{factor:g}" for factor, those in layers.items()
    )


def show_words(name: str) -> str:
    """The name of a question set, in words."""
    return "in-domain" if name == "in_domain" else name


def own_cosines(geometry: Mapping[str, Any], direction: str) -> dict[str, float]:
    """Cosine of each feature's B with the direction at the feature's own layer, where it is defined."""
    layers = geometry.get("layers_of") or {}
    found = {}
    for feature, by_direction in (geometry.get("cosines") or {}).items():
        values, layer = by_direction.get(direction) or [], layers.get(feature)
        if layer is not None and layer < len(values) and is_number(values[layer]):
            found[feature] = float(values[layer])
    return found


def _directions(geometry: Mapping[str, Any]) -> list[str]:
    """Names, that of the downstream effects first."""
    names = {name: None for by_direction in (geometry.get("cosines") or {}).values() for name in by_direction}
    first = (geometry.get("downstream") or {}).get("direction")
    return sorted(names, key=lambda name: name != first)


# --- page -----------------------------------------------------------------------------------------------------------


def in_layer_order(value: Any) -> Any:
    """The same, with keys that begin with a layer in the layers' order: in a file they stand as text, 10 before 9."""
    if isinstance(value, Mapping):
        names = sorted(value, key=_layer_of) if all(_LAYER.match(name) for name in value) else list(value)
        return {name: in_layer_order(value[name]) for name in names}
    return [in_layer_order(one) for one in value] if isinstance(value, list) else value


_LAYER = re.compile(r"(?:layer_)?(\d+)(.*)")


def _layer_of(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    assert match is not None, "the caller has looked"
    return int(match[1]), match[2]


def section_page(section: Section) -> dict[str, Any]:
    """What the template reads: every part of the section, empty where it was not measured, and tables put in order."""
    causal, geometry = section.get("causal") or {}, section.get("geometry") or {}
    settings = causal.get("settings") or []
    lists = {name: section.get(name) or [] for name in ("modules", "saved", "roles", "scaled")}
    dicts = {name: section.get(name) or {} for name in ("texts", "importance", "patching", "dynamics")}
    return {
        **lists,
        **dicts,
        "organism": section.get("organism") or "unnamed",
        "probes": _in_order(section.get("probes") or []),
        "groups": [row for row in settings if not row["name"].startswith("layer ")],
        "single": [row for row in settings if row["name"].startswith("layer ")],
        "sets": list(dict.fromkeys(name for row in settings for name in row["margin"])),
        "judged": causal.get("judged") or [],
        "shapley": causal.get("shapley") or {},
        "geometry": geometry,
        "directions": _directions(geometry),
        "own": {name: own_cosines(geometry, name) for name in _directions(geometry)},
        "lens": _shown_lens(geometry.get("logit_lens") or {}),
        "nearest": _shown_nearest(geometry.get("nearest") or {}),
    }


def _in_order(probes: Sequence[Probe]) -> list[Probe]:
    """By question first; the order within each split stays."""
    return sorted(probes, key=lambda probe: probe["split"] != "question")


def _shown_lens(lens: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    return {
        name: {end: [(visible(token), logit) for token, logit in one.get(end) or []] for end in ("top", "bottom")}
        for name, one in lens.items()
    }


def _shown_nearest(nearest: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    rows = [row for one in nearest.values() for end in ("top", "bottom") for row in one.get(end) or []]
    # Which spelling a tokenizer has shows in all of its tokens together.
    texts = readable([row[key] for row in rows for key in ("token", "context")])
    shown = iter([visible(text) for text in texts])
    return {
        name: {
            end: [{**row, "token": next(shown), "context": next(shown)} for row in one.get(end) or []]
            for end in ("top", "bottom")
        }
        for name, one in nearest.items()
    }


# --- figures --------------------------------------------------------------------------------------------------------


def draw_adapters(section: Section, folder: Path) -> dict[str, Path]:
    """Write every figure that the section allows as SVG and PNG into `folder`; gives the SVG's path by name."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: save_figure(draw(section), folder / f"{name}.svg")
        for name, (is_available, draw) in _DRAWINGS.items()
        if is_available(section)
    }


def _token_probes(section: Section) -> dict[str, dict[str, Probe]]:
    """Probes on the scalars of tokens, by name and split."""
    found: dict[str, dict[str, Probe]] = {}
    for probe in section.get("probes") or []:
        if (probe["features"], probe["pooling"]) == ("scalars", "token") and probe["coefficients"]:
            found.setdefault(probe["name"], {})[probe["split"]] = probe
    return found


@rc_context(STYLE)
def draw_probes(section: Section) -> Figure:
    """Coefficients of the probes over the splits, by feature: split by question, and by answer beside it."""
    probes = _token_probes(section)
    splits = [split for split in ("question", "answer") if any(split in one for one in probes.values())]
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
    return f", AUROC {show_spread(probe['auroc'])}" if probe else ""


def _leading(probe: Probe) -> list[str]:
    """The features with the largest mean coefficients, in the order of the layers."""
    means = {name: abs(np.mean(values)) for name, values in probe["coefficients"].items()}
    kept = set(sorted(means, key=lambda name: -means[name])[:MOST_VIOLINS])
    return [name for name in means if name in kept]


def _draw_violins(axes: Axes, probe: Probe, features: Sequence[str]) -> None:
    values = [probe["coefficients"][name] for name in features]
    is_headline = probe["split"] == "question"
    colour = PALETTE[0] if is_headline else GREY
    parts: Any = axes.violinplot(values, showextrema=False, widths=0.85)
    for body in parts["bodies"]:
        body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
    places = range(1, len(features) + 1)
    axes.plot(places, [np.mean(one) for one in values], "o", color=colour, ms=4)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [name.removeprefix("layer_") for name in features]
    axes.set_xticks(list(places), labels, rotation=0 if max(map(len, labels)) < 4 else 60, fontsize=9)
    left_out = len(probe["coefficients"]) - len(features)
    axes.set_xlabel(f"the {len(features)} largest of {len(probe['coefficients'])}" if left_out else "adapter of layer")


def _say_unmeasured(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([])


@rc_context(STYLE)
def draw_shapley(section: Section) -> Figure:
    """Shapley value of each layer's adapters (nats/token) with 95% intervals, coloured by role; a panel per set."""
    values = section["causal"]["shapley"]["values"]
    roles = {str(one["layer"]): one["role"] for one in section.get("roles") or []}
    figure = new_figure(8.0, 0.8 + 2.5 * len(values))
    grid = figure.subplots(len(values), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, by_layer) in zip(grid, values.items(), strict=True):
        _draw_bars(axes, by_layer, roles)
        axes.set(title=f"{show_words(name)} margin", ylabel="Shapley value\n(nats/token)")
    grid[-1].set_xlabel("layer of the adapters")
    if roles:
        keys = [Patch(color=colour, label=f"role: {role}") for role, colour in ROLE_COLOURS.items()]
        figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def _draw_bars(axes: Axes, by_layer: Mapping[str, Estimate], roles: Mapping[str, str]) -> None:
    layers = sorted(by_layer, key=int)
    for place, layer in enumerate(layers):
        if is_measured(by_layer[layer]):
            axes.bar(
                place,
                by_layer[layer]["mean"],
                yerr=reach_of(by_layer[layer]),
                color=ROLE_COLOURS.get(roles.get(layer, ""), GREY),
                capsize=3,
                width=0.7,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(layers)), layers)


@rc_context(STYLE)
def draw_geometry(section: Section) -> Figure:
    """Cosine of B with the directions at its own layer, and of what each adapter causes with one at later layers."""
    geometry = section["geometry"]
    figure = new_figure(9.5, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_own(left, geometry)
    effects = geometry.get("downstream") or {}
    curves = effects.get("cosine") or {}
    if curves:
        colours = _line_colours(len(curves))
        for (layer, values), colour in zip(sorted(curves.items(), key=lambda one: int(one[0])), colours, strict=True):
            right.plot([or_nan(value) for value in values], color=colour, label=layer)
            _draw_band(right, (effects.get("low") or {}).get(layer), (effects.get("high") or {}).get(layer), colour)
        right.axhline(0, color="black", linewidth=0.8)
        _name_lines(figure, right, "adapters of layer")
    else:
        _say_unmeasured(right)
    right.set(title="what they cause, at every layer after", xlabel="layer")
    left.set_ylim(top=1.05)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_own(axes: Axes, geometry: Mapping[str, Any]) -> None:
    random = geometry.get("random_cosine_95")
    if is_number(random):
        axes.axhspan(-random, random, color=GREY, alpha=0.2, label=f"95% of random vectors: ±{random:.3f}")
    for index, name in enumerate(_directions(geometry)):
        own = own_cosines(geometry, name)
        layers = [geometry["layers_of"][feature] for feature in own]
        axes.plot(layers, list(own.values()), "os^Dv"[index % 5], color=PALETTE[index % 7], mfc="white", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="B, at its own layer", xlabel="layer", ylabel="cosine with the direction")
    axes.legend(loc="best", title="direction of")


def _draw_band(axes: Axes, low: Any, high: Any, colour: Any) -> None:
    if low and high:
        least, most = ([or_nan(value) for value in one] for one in (low, high))
        axes.fill_between(range(len(low)), least, most, color=colour, alpha=0.1, linewidth=0)


def _line_colours(count: int) -> list[Any]:
    """From dark to light, since lines stand for layers in their order."""
    return list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def _name_lines(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= MOST_LABELS:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9), title=title)


@rc_context(STYLE)
def draw_dynamics(section: Section) -> Figure:
    """B's cosine with its final and its previous value, the update's norm, and the margin shift, by training step."""
    dynamics = section["dynamics"]
    figure = new_figure(9.5, 6.4)
    grid = figure.subplots(2, 2, sharex=True)
    colours = _line_colours(len(dynamics["features"]))
    for axes, (key, label) in zip(grid.flat, _GROWTH.items(), strict=False):
        for (name, one), colour in zip(dynamics["features"].items(), colours, strict=True):
            _draw_growth(axes, dynamics["steps"], one, key, colour, name.removeprefix("layer_"))
        axes.set_ylabel(label)
    _draw_margins(grid[1, 1], dynamics)
    for axes in grid[1]:
        axes.set_xlabel("training step")
    _name_lines(figure, grid[0, 0], "adapter of layer; a dot marks a turn")
    return figure


_GROWTH = {
    "to_final": "cosine of B with its final value",
    "to_previous": "cosine of B with the step before",
    "norm": "norm of the update",
}


def _draw_growth(axes: Axes, steps: list[int], one: Mapping[str, Any], key: str, colour: Any, label: str) -> None:
    values = [or_nan(value) for value in one[key]]
    axes.plot(steps, values, color=colour, label=label)
    if one.get("turn") in steps:
        axes.plot(one["turn"], values[steps.index(one["turn"])], "o", color=colour, ms=5)


def _draw_margins(axes: Axes, dynamics: Mapping[str, Any]) -> None:
    steps, margins = dynamics.get("margin_steps") or dynamics["steps"], dynamics.get("margin") or {}
    if not margins:
        _say_unmeasured(axes)
    for index, (name, values) in enumerate(margins.items()):
        measured = [(step, value) for step, value in zip(steps, values, strict=True) if is_measured(value)]
        reach = np.hstack([reach_of(value) for _, value in measured]) if measured else None
        axes.errorbar(
            [step for step, _ in measured],
            [value["mean"] for _, value in measured],
            yerr=reach,
            fmt="os"[index % 2] + "-",
            color=PALETTE[index % len(PALETTE)],
            ms=4,
            capsize=2.5,
            label=show_words(name),
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("margin shift (nats/token)")
    if margins:
        axes.legend(loc="best")


def _has_shapley(section: Section) -> bool:
    values = ((section.get("causal") or {}).get("shapley") or {}).get("values") or {}
    return any(is_measured(one) for by_layer in values.values() for one in by_layer.values())


def _has_geometry(section: Section) -> bool:
    geometry = section.get("geometry") or {}
    return any(own_cosines(geometry, name) for name in _directions(geometry)) or bool(
        (geometry.get("downstream") or {}).get("cosine")
    )


_DRAWINGS: dict[str, tuple[Callable[[Section], bool], Callable[[Section], Figure]]] = {
    "adapter_probes": (lambda section: bool(_token_probes(section)), draw_probes),
    "adapter_shapley": (_has_shapley, draw_shapley),
    "adapter_geometry": (_has_geometry, draw_geometry),
    "adapter_dynamics": (lambda section: bool((section.get("dynamics") or {}).get("features")), draw_dynamics),
}
