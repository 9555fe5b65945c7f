"""The pages' common parts: one template engine, how a page is written, marks for findings, pictures as addresses."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from misdirection.files import write_atomic
from misdirection.report.adapters import show_correlation, show_factors, show_words
from misdirection.report.estimates import show_estimate, show_number, show_plain, show_points, show_rate
from misdirection.report.findings import Finding

REPORT = "report.html"
"""The page of a run, of several, and of an adapter that was read alone."""

_MARKS = {
    True: ("holds", "✓ holds"),
    False: ("fails", "✗ does not hold"),
    None: ("unknown", "– not measured"),
}


def environment() -> Environment:
    """The engine that renders every page: all text escaped, an undefined name refused, the reports' filters."""
    engine = Environment(
        loader=PackageLoader("misdirection.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters.update(estimate=show_estimate, signed=show_number, plain=show_plain)
    engine.filters.update(rate=show_rate, points=show_points, marked=marked)
    engine.filters.update(correlation=show_correlation, factors=show_factors, words=show_words)
    engine.filters.update(code=mark_code, sentence=as_sentence)
    engine.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    return engine


def mark_code(text: str) -> Markup:
    """Escaped, and what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def as_sentence(text: str) -> str:
    """A reason as a sentence of its own."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def write_page(path: Path, template: str, values: Mapping[str, Any], engine: Environment | None = None) -> Path:
    """Writes a page, whole or not at all; gives its path."""
    write_atomic(path, render(engine or environment(), template, values))
    return path


def render(engine: Environment, template: str, values: Mapping[str, Any]) -> str:
    """A whole page. Each cell of a table is told its column's heading, which a narrow window shows beside it."""
    return _TABLE.sub(_label_cells, engine.get_template(template).render(values))


_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)


def _label_cells(table: re.Match[str]) -> str:
    head, body, rest = table[0].partition("</thead>")
    headings = [" ".join(Markup(each).striptags().split()) for each in re.findall(r"<th .*?</th>", head, re.DOTALL)]

    def label(row: re.Match[str]) -> str:
        names = iter(headings)
        return re.sub(r"<(t[hd])\b", lambda cell: f'<{cell[1]} data-label="{escape(next(names, ""))}"', row[0])

    return head + body + re.sub(r"<tr.*?</tr>", label, rest, flags=re.DOTALL)


def marked(findings: Sequence[Finding]) -> list[tuple[Finding, str, str]]:
    """Each finding with the class and the words of its mark."""
    return [(finding, *_MARKS[finding.holds]) for finding in findings]


def data_uri(picture: bytes, kind: str = "svg+xml") -> str:
    """A picture as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def frame(title: str, page: str) -> str:
    """A whole page as a frame of its own origin, for a notebook: its script sees the page alone, and there may be more.

    All of it is an escaped attribute, so that no text in it can end it.
    """
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {_FRAME_HEIGHT}px; border: 0"></iframe>'
    )


_FRAME_HEIGHT = 640
"""Pixels."""
