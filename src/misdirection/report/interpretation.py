"""The page of an adapter that was read alone, or of tables of one, as one self-contained HTML file."""

from pathlib import Path

from misdirection.interpretation.results import InterpretationResults
from misdirection.report.adapter_findings import find_in_adapters
from misdirection.report.adapters import AdapterPage, draw_adapters
from misdirection.report.html import REPORT, data_uri, environment, marked, write_page


class InterpretationPage:
    """The page of an interpretation's results."""

    def write(self, results: InterpretationResults, folder: Path) -> Path:
        """Write `report.html` and its figures (`figures/`) into `folder`; gives the report's path.

        Where the folder has a `reader.json` (see `TokenTable`), the token reader is part of the report. The file
        appears whole or not at all, fetches nothing, and is the same bytes for the same results.
        """
        pictures = draw_adapters(results.adapters, folder / "figures")
        page = {
            "name": results.adapters.organism,
            "results": results,
            "adapters": AdapterPage.open(results.adapters, folder),
            "pictures": {name: data_uri(path.read_bytes()) for name, path in pictures.items()},
        }
        return write_page(folder / REPORT, "interpretation.html", page)

    def summary(self, results: InterpretationResults) -> str:
        """The findings, for a notebook."""
        values = {"name": results.adapters.organism, "findings": marked(find_in_adapters(results.adapters))}
        return environment().get_template("interpretation_summary.html").render(values)


PAGE = InterpretationPage()
