"""How every picture looks and is written: colours, names beside axes, intervals, maps, and the files.

No pyplot state is shared: every picture is a `Figure` of its own.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from misdirection.report.estimates import DAMAGE_LIMIT, Interval

# Okabe and Ito's palette: distinguishable with any of the common colour-vision deficiencies.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
# It stays apart for colour-blind readers; red and green never meet.
DIVERGING_MAP = "PuOr_r"
FULL_COLOUR = 0.05
"""Smallest change, nats/token, that a heat map paints in its darkest colour: less is near its middle."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    # Organism names are free text; a dollar sign in one must not start a formula.
    "text.parse_math": False,
    # `_laid_out` takes the layout away, which this would bring another one for.
    "figure.autolayout": False,
    # Without a fixed salt every SVG gets random element ids.
    "svg.hashsalt": "misdirection",
}


class Picture(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        return png_of(self, _NOTEBOOK_DPI)


_NOTEBOOK_DPI = 90


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts make room for one another."""
    return Picture(figsize=(width, height), layout="constrained")


def short_name(name: str, most: int = 26) -> str:
    """A name that fits beside an axis: of a longer one the beginning and the end, since seeds and sizes stand there."""
    words = " ".join(name.split())
    return words if len(words) <= most else f"{words[: most - most // 3 - 1]}…{words[-(most // 3) :]}"


def colour_of(index: int) -> str:
    """The colour of the series of this number."""
    return PALETTE[index % len(PALETTE)]


def marker_of(index: int) -> str:
    """The marker of the series of this number."""
    return MARKERS[index % len(MARKERS)]


def reach_of(*shown: Interval) -> list[list[float]]:
    """Distances from each mean to both ends of its interval, in the shape `errorbar` wants."""
    return [[max(each.mean - each.low, 0.0) for each in shown], [max(each.high - each.mean, 0.0) for each in shown]]


def legend_below(axes: Axes, offset: float = -0.2, handles: Iterable[Line2D] = ()) -> None:
    """A legend under the axes, so far below as `offset` says, of what is drawn in them and of further `handles`."""
    known, labels = axes.get_legend_handles_labels()
    shown = [*known, *handles]
    names = [*labels, *(str(handle.get_label()) for handle in handles)]
    axes.legend(shown, names, loc="upper center", bbox_to_anchor=(0.5, offset))


def steering_keys() -> list[Line2D]:
    """What the marks of `draw_steered` are, for a legend."""
    return [
        Line2D([], [], color=GREY, linewidth=8, alpha=0.25, label="band: random control, 95%"),
        Line2D([], [], color=GREY, linestyle=":", label="dotted: damage of random control"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label=f"damage limit {DAMAGE_LIMIT}"),
    ]


class Damaging(Protocol):
    """Something that may break a model."""

    @property
    def damage(self) -> Interval: ...


class Swept(Damaging, Protocol):
    """The effect of a direction's vector of one layer at one scale: an experiment's, or a sweep's."""

    @property
    def layer(self) -> int: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def margin_change(self) -> Interval: ...
    @property
    def random_change(self) -> Interval: ...
    @property
    def random_damage(self) -> float | Interval: ...


def draw_steered(
    rows: Sequence[Swept], change_axes: Axes, damage_axes: Axes, lines: Sequence[tuple[str, float | None]]
) -> None:
    """Changes of the margin, and damages below them, by layer: a line for each scale, under its label."""
    for index, (label, scale) in enumerate(lines):
        chosen = sorted((row for row in rows if row.scale == scale), key=lambda row: row.layer)
        if chosen:
            _draw_scale(change_axes, damage_axes, chosen, index, label)
    change_axes.axhline(0, color="black", linewidth=0.8)
    damage_axes.axhline(0, color="black", linewidth=0.8)
    damage_axes.axhline(DAMAGE_LIMIT, color="black", linewidth=0.9, linestyle="--")
    layers = sorted({row.layer for row in rows})
    damage_axes.set_xticks(layers if len(layers) <= 10 else layers[:: math.ceil(len(layers) / 10)])
    damage_axes.set_xlabel("layer")


def _draw_scale(change_axes: Axes, damage_axes: Axes, rows: Sequence[Swept], index: int, label: str) -> None:
    layers, changes = [row.layer for row in rows], [row.margin_change for row in rows]
    means = [change.mean for change in changes]
    look: dict[str, Any] = {"color": colour_of(index), "marker": marker_of(index), "ms": 5}
    change_axes.errorbar(layers, means, yerr=reach_of(*changes), capsize=2.5, label=label, **look)
    lows, highs = [row.random_change.low for row in rows], [row.random_change.high for row in rows]
    # The edge keeps the band visible where a single layer was steered.
    change_axes.fill_between(layers, lows, highs, color=colour_of(index), alpha=0.15, linewidth=2)
    damage_axes.plot(layers, [row.damage.mean for row in rows], **look)
    damage_axes.plot(layers, [_mean(row.random_damage) for row in rows], ":", color=colour_of(index))


def _mean(value: float | Interval) -> float:
    return value if isinstance(value, float) else value.mean


def or_nan(value: float | None) -> float:
    """The number, or NaN for what was not measured."""
    return math.nan if value is None else value


def spread_damage(set_scale: Callable[..., Any], rows: Sequence[Damaging]) -> None:
    """Compress the axis where one broken model would flatten all others; linear up to the limit."""
    if max((row.damage.mean for row in rows), default=0.0) > 10 * DAMAGE_LIMIT:
        set_scale("symlog", linthresh=DAMAGE_LIMIT)


def draw_heat_map(
    axes: Axes,
    cells: Mapping[tuple[int, int], tuple[float, str]],
    rows: Sequence[str],
    columns: Sequence[str],
    limit: float,
) -> AxesImage:
    """Draws values around zero, with a text in each cell.

    `cells` are by the numbers of row and column; `limit` is the value that has the darkest colour.
    """
    values = np.full((len(rows), len(columns)), math.nan)
    for place, (value, text) in cells.items():
        values[place] = value
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(place[1], place[0], text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(values, cmap=DIVERGING_MAP, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), [_break_name(name) for name in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    return image


def _break_name(name: str) -> str:
    """Break a name after its separators, so that neighbouring columns' labels do not meet."""
    return short_name(name).replace("-", "-\n").replace("_", "_\n")


@contextlib.contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """The figure with its parts in place: else each file made of it would look for their places, and draw it twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


@rc_context(STYLE)
def save_figure(figure: Figure, path: Path) -> Path:
    """Write it as SVG to `path` and as PNG beside it; gives `path`."""
    with _laid_out(figure):
        path.write_bytes(svg_of(figure))
        path.with_suffix(".png").write_bytes(png_of(figure))
    return path


def save_figures(drawings: Mapping[str, Callable[[Any], Figure]], results: Any, folder: Path) -> dict[str, Path]:
    """Writes `NAME.svg` and `NAME.png` of each drawing of some results into `folder`; gives the SVG's path by name."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: save_figure(draw(results), folder / f"{name}.svg") for name, draw in drawings.items()}


@rc_context(STYLE)
def png_of(figure: Figure, dpi: float = 150) -> bytes:
    """The figure as PNG, the same bytes for an equal one."""
    file = io.BytesIO()
    with _laid_out(figure):
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


@rc_context(STYLE)
def svg_of(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for an equal one."""
    file = io.BytesIO()
    # Dates and versions in the metadata would make equal results give unequal files.
    with _laid_out(figure):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
