"""The page of one experiment on several base models: models x organisms in one table and one picture."""

from collections.abc import Callable, Mapping
from pathlib import Path

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from misdirection.experiment.several_results import OrganismRow, RunsResults
from misdirection.report.drawing import (
    STYLE,
    colour_of,
    marker_of,
    new_figure,
    reach_of,
    save_figures,
    short_name,
    svg_of,
)
from misdirection.report.estimates import in_percent
from misdirection.report.html import REPORT, data_uri, write_page
from misdirection.runs.folder import RUNS

_ROW = 0.24
"""Inches of one line of a picture."""


class RunsPage:
    """The joint page of several models' runs (`results.Page`)."""

    def write(self, results: RunsResults, folder: Path) -> Path:
        """Write `report.html` and its figures (`figures/`) into `folder`; gives the report's path."""
        paths = save_figures(drawings(results), results, folder / "figures")
        page = {
            "name": results.name,
            "results": results,
            "reports": {model.name: f"{RUNS}/{model.name}/{REPORT}" for model in results.models},
            "pictures": {name: data_uri(path.read_bytes()) for name, path in paths.items()},
        }
        return write_page(folder / REPORT, "runs.html", page)

    def summary(self, results: RunsResults) -> str:
        """How many models there are, those that failed, and the picture of the margins."""
        failed = "".join(f"<li>{escape(each.name)}: {escape(each.cause)}</li>" for each in results.failed)
        pictures = "".join(
            f'<img src="{data_uri(svg_of(draw(results)))}" alt="Figures of every organism by model">'
            for draw in drawings(results).values()
        )
        counted = f"{len(results.models)} models, {len(results.organisms)} organisms"
        return f"<p>{escape(results.name)}: {counted}.</p><ul>{failed}</ul>{pictures}"


PAGE = RunsPage()


def drawings(results: RunsResults) -> Mapping[str, Callable[[RunsResults], Figure]]:
    """The pictures that there are figures for, by name."""
    made: dict[str, Callable[[RunsResults], Figure]] = {}
    if results.organisms:
        made["margins"] = draw_margins
    if any(row.judged for row in results.organisms):
        made["judged"] = draw_judged
    if results.across:
        made["across"] = draw_across
    return made


@rc_context(STYLE)
def draw_margins(results: RunsResults) -> Figure:
    """Every organism's margin shift, and the shift minus its control's, with 95% intervals, model by model."""
    shifts = {"the base": lambda row: row.margin_shift}
    if any(row.minus_control for row in results.organisms):
        shifts["the control"] = lambda row: row.minus_control
    figure = new_figure(4.5 + 2 * len(shifts), 1.6 + _ROW * (len(results.organisms) + len(results.models)))
    panels = figure.subplots(1, len(shifts), sharey=True, squeeze=False)[0]
    for axes, (against, shift_of) in zip(panels, shifts.items(), strict=True):
        for height, row in _placed(results).values():
            colour, marker = _look(results, row)
            if (shift := shift_of(row)) is not None:
                axes.errorbar(shift.mean, height, xerr=reach_of(shift), fmt=marker, color=colour, capsize=2)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"margin shift against {against}\n(nats/token), 95% interval")
    _name_rows(panels[0], results)
    return figure


@rc_context(STYLE)
def draw_judged(results: RunsResults) -> Figure:
    """Shares of misaligned and of coherent answers, in percent, with 95% intervals."""
    figure = new_figure(8.5, 1.6 + _ROW * (len(results.organisms) + len(results.models)))
    misaligned, coherent = figure.subplots(1, 2, sharey=True)
    for height, row in _placed(results).values():
        colour, marker = _look(results, row)
        for axes, share in ((misaligned, row.judged.em), (coherent, row.judged.coherent)) if row.judged else ():
            rate = in_percent(share)
            axes.errorbar(rate.mean, height, xerr=reach_of(rate), fmt=marker, color=colour, capsize=2)
    misaligned.set_xlabel("misaligned and coherent answers (%)")
    coherent.set_xlabel("coherent answers (%)")
    for axes in (misaligned, coherent):
        axes.set_xlim(-3, 103)
    _name_rows(misaligned, results)
    return figure


@rc_context(STYLE)
def draw_across(results: RunsResults) -> Figure:
    """Cosine between one organism's directions in two models of a shape, by layer; dashed, the bases' own."""
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for number, each in enumerate(results.across):
        colour = colour_of(number)
        label = f"{short_name(each.organism)}: {short_name(each.first)} · {short_name(each.second)}"
        axes.plot(each.cosine, color=colour, label=label)
        axes.plot(each.base_null, "--", color=colour)
    axes.plot([], [], "--", color="black", label="the bases' own directions on the same text")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="cosine")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _placed(results: RunsResults) -> dict[tuple[str, str], tuple[int, OrganismRow]]:
    """Every organism with its line; a line is left free between two models."""
    models = [model.name for model in results.models]
    return {
        (row.model, row.organism): (line + models.index(row.model), row) for line, row in enumerate(results.organisms)
    }


def _look(results: RunsResults, row: OrganismRow) -> tuple[str, str]:
    """Colour and marker of an organism, the same in every model."""
    number = list(dict.fromkeys(each.organism for each in results.organisms)).index(row.organism)
    return colour_of(number), marker_of(number)


def _name_rows(axes: Axes, results: RunsResults) -> None:
    placed = _placed(results)
    labels = [f"{short_name(model)}  {short_name(organism, 18)}" for model, organism in placed]
    axes.set_yticks([height for height, _ in placed.values()], labels)
    axes.invert_yaxis()
