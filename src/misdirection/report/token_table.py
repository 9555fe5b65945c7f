"""The token reader as a page of its own, and in a notebook as a frame that nothing else on the page can reach."""

from pathlib import Path

from misdirection.files import write_atomic
from misdirection.interpretation.token_results import TokenTable
from misdirection.report.html import environment, frame, render
from misdirection.report.reader import reader_data

READER = "reader.html"


class TokenTablePage:
    """The page of a table of tokens (`results.Page`)."""

    def write(self, table: TokenTable, folder: Path) -> Path:
        """Write `reader.html` into a folder; gives its path. It fetches nothing."""
        write_atomic(folder / READER, _page(table))
        return folder / READER

    def summary(self, table: TokenTable) -> str:
        """The whole reader in a frame of its own origin: no token can reach the notebook."""
        return frame("Token reader", _page(table))


def _page(table: TokenTable) -> str:
    return render(environment(), "token_table.html", {"name": "Token reader", "reader": reader_data(table)})


PAGE = TokenTablePage()
