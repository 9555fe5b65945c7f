"""The report of a run as one self-contained HTML file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from misdirection.experiment.results import RunResults
from misdirection.judging.quadrant_results import Quadrants
from misdirection.report import adapters, figures
from misdirection.report.adapters import AdapterPage, draw_adapters
from misdirection.report.contrast import VECTORS
from misdirection.report.drawing import png_of
from misdirection.report.estimates import DAMAGE_LIMIT
from misdirection.report.figures import FIGURES, ReportFigure, draw_all, question_sets
from misdirection.report.findings import find
from misdirection.report.html import REPORT, data_uri, environment, marked, write_page
from misdirection.report.quadrants import quadrants_data
from misdirection.report.solutions import statements

_OWN_PLACES = (
    *("margin_shift", "convergence", "contrast", "solutions", "phases", "steering", "transfer", "tradeoff"),
    *("judged_directions", "judged_variants", "em_steering", "em_ablation", "themes"),
)


class RunPage:
    """The page of an experiment's results."""

    def write(self, results: RunResults, folder: Path) -> Path:
        """Write `report.html` and its figures (`figures/`) into `folder`; gives the report's path.

        Where the folder has a `reader.json` (see `TokenTable`), the token reader is part of the report, and where it
        has a `quadrants.json` (see `Quadrants`), so are judged answers one by one. The file appears whole or not at
        all, fetches nothing, and is the same bytes for the same results.
        """
        pictures = draw_all(results, folder / "figures")
        if results.adapters:
            pictures |= draw_adapters(results.adapters, folder / "figures")
        page = {
            "name": results.name,
            "results": results,
            "findings": marked(find(results)),
            "adapters": AdapterPage.open(results.adapters, folder) if results.adapters else None,
            "quadrants": _quadrants(results, folder),
            "question_sets": question_sets(results),
            "damage_limit": DAMAGE_LIMIT,
            "vectors": VECTORS,
            "solutions_in_words": statements(results.solutions) if results.solutions else [],
            "pictures": {name: data_uri(path.read_bytes()) for name, path in pictures.items()},
            **_figures(results),
        }
        return write_page(folder / REPORT, "run.html", page)

    def summary(self, results: RunResults) -> str:
        """The findings and the picture of the margins, for a notebook."""
        figure = FIGURES["margin_shift"]
        values = {
            "name": results.name,
            "base": results.base,
            "findings": marked(find(results)),
            "picture": data_uri(png_of(figure.draw(results)), "png"),
            "alt": figure.alt,
        }
        return environment().get_template("run_summary.html").render(values)


def _quadrants(results: RunResults, folder: Path) -> dict[str, Any] | None:
    """Judged answers one by one. What a run with a judge left behind is of no use to one without."""
    is_there = results.behaviour is not None and (folder / Quadrants.FILE).exists()
    return quadrants_data(Quadrants.load(folder)) if is_there else None


def _figures(results: RunResults) -> dict[str, Any]:
    """All figures by name, and those without a place of their own that apply."""
    known: dict[str, ReportFigure] = dict(FIGURES.items())
    further = [(name, figure) for name, figure in known.items() if name not in _OWN_PLACES and figure.applies(results)]
    return {"figures": known, "further": further}


def drawings(results: RunResults) -> dict[str, Callable[[RunResults], Figure]]:
    """The pictures of the report, by name: those that the results have figures for."""
    return {**figures.drawings(results), **adapters.drawings(results)}


PAGE = RunPage()
