"""The page of a screen of training data: the verdict, what the rows are like, and the worst of them.

Everything here reads a `ScreenResult`.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from misdirection.report.audit import SYMBOLS
from misdirection.report.drawing import GREY, PALETTE, STYLE, new_figure, reach_of, short_name, svg_of
from misdirection.report.html import as_sentence, data_uri, write_page
from misdirection.screening.results import ScreenResult

_ROW = 0.42
"""Inches of one line of a picture."""


class ScreenPage:
    """The page of a screen (`results.Page`)."""

    def write(self, result: ScreenResult, folder: Path) -> Path:
        """Write `screen.html` into `folder` and return its path; the same bytes for the same result."""
        pictures = {name: data_uri(svg_of(draw(result))) for name, draw in drawings(result).items()}
        return write_page(folder / result.PAGE, result.PAGE, {**_context(result), "pictures": pictures})

    def summary(self, result: ScreenResult) -> str:
        """The verdict, why, and the picture of the rows."""
        because = "".join(f"<li>{escape(as_sentence(reason))}</li>" for reason in result.dataset.because)
        picture = data_uri(svg_of(draw_rows(result)))
        data, verdict = escape(", ".join(result.data)), escape(result.dataset.verdict)
        return (
            f"<p>{data}: <strong>{verdict}</strong></p><ul>{because}</ul>"
            f'<img src="{picture}" alt="Scores of the rows beside those of known good and bad answers">'
        )


PAGE = ScreenPage()


def _context(result: ScreenResult) -> dict[str, Any]:
    """Everything that the template reads."""
    screen = ["misdirection", "screen", result.base.named, *result.data, "--keep", "KEPT.jsonl", "--drop", "0.1"]
    return {
        "name": f"{', '.join(result.data)}: {result.dataset.verdict}",
        "result": result,
        "dataset": result.dataset,
        "symbol": SYMBOLS[result.dataset.verdict],
        "known": ", ".join(name for name, known in sorted(result.known.items()) if not known.is_control),
        "command": shlex.join(screen),
    }


def drawings(result: ScreenResult) -> dict[str, Callable[[ScreenResult], Figure]]:
    """Its pictures by name."""
    return {"rows": draw_rows, "shares": draw_shares}


def draw_rows(result: ScreenResult) -> Figure:
    """The distribution of the rows' scores by source, as boxes from the 5th to the 95th percentile."""
    known = {f"reference, {kind}": values for kind, values in result.reference_quantiles.items()}
    lines = [*known.items(), *((short_name(name), values) for name, values in sorted(result.quantiles.items()))]
    boxes = [
        {
            "label": name,
            "whislo": values[5],
            "q1": values[25],
            "med": values[50],
            "q3": values[75],
            "whishi": values[95],
        }
        for name, values in lines
    ]
    colours = [PALETTE[0], PALETTE[1], *[GREY] * len(result.quantiles)]
    with rc_context(STYLE):
        figure = new_figure(6.4, 1.1 + _ROW * len(lines))
        axes = figure.subplots()
        drawn = axes.bxp(boxes, orientation="horizontal", showfliers=False, patch_artist=True, widths=0.55)
        for box, colour in zip(drawn["boxes"], colours, strict=True):
            box.set(facecolor=colour, alpha=0.75)
        for middle in drawn["medians"]:
            middle.set(color="black")
        _mark_unit(axes)
        axes.invert_yaxis()
        axes.set_xlabel("score: 0 as good answers, 1 as bad ones")
    return figure


def _mark_unit(axes: Axes) -> None:
    """Lines at what the reference's good and its bad answers score."""
    for at in (0, 1):
        axes.axvline(at, color=GREY, linewidth=0.8, linestyle=":")


def draw_shares(result: ScreenResult) -> Figure:
    """The mean of all rows by every way of scoring, and the prediction with its own error."""
    dataset = result.dataset
    with rc_context(STYLE):
        figure = new_figure(6.4, 1.3 + _ROW * len(result.shares))
        axes = figure.subplots()
        names = ["prediction", *result.shares]
        axes.errorbar(
            dataset.score,
            0,
            xerr=[[dataset.score - dataset.low], [dataset.high - dataset.score]],
            fmt="D",
            color="black",
        )
        for line, share in enumerate(result.shares.values(), start=1):
            axes.errorbar(share.mean, line, xerr=reach_of(share), fmt="o", color=PALETTE[0])
        _mark_unit(axes)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("share: 0 as the reference's good answers, 1 as its bad ones (95%)")
    return figure
