"""A screen's folder without the rows that were screened: they are the user's data, and its figures do without them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from misdirection.bundles.contents import Content
from misdirection.bundles.redaction import Redaction
from misdirection.data.tables import read_table, write_table
from misdirection.screening.results import ROWS, ScreenResult

LEFT_OUT = "[not in this bundle]"
"""What stands in the place of a row's text."""

SCORED = "artifacts/rows/"
"""Where a screen's folder has tables with the rows themselves."""


def without_texts(folder: Path, redaction: Redaction) -> Iterator[tuple[str, Content]]:
    """The screen's result and its page without the texts of the worst rows, by name."""
    result = ScreenResult.load(folder)
    worst = tuple(row.model_copy(update={"question": LEFT_OUT, "answer": LEFT_OUT}) for row in result.worst)
    with tempfile.TemporaryDirectory() as name:
        changed = result.model_copy(update={"worst": worst})
        for path in (changed.save(Path(name)), changed.write_page(Path(name))):
            yield path.name, _changed(redaction.text(path.read_text("utf-8")).encode(), folder / path.name)


def scores(folder: Path, redaction: Redaction) -> Iterator[tuple[str, Content]]:
    """The table of all rows' scores, which has none of their texts, with sources that are no way to a file."""
    table = read_table(folder / ROWS)
    table["source"] = table["source"].map(redaction.leaf)
    with tempfile.TemporaryDirectory() as name:
        write_table(table, Path(name) / ROWS)
        yield ROWS, _changed((Path(name) / ROWS).read_bytes(), folder / ROWS)


def _changed(data: bytes, path: Path) -> Content:
    """Other bytes in the place of a file's; the same where nothing is changed."""
    return Content(rest=path) if data == path.read_bytes() else Content(data, path, path.stat().st_size)
