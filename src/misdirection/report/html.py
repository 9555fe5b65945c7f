"""The pages' common parts: one template engine, marks for findings, pictures as addresses."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from misdirection.files import read_json, write_atomic
from misdirection.report.adapters import (
    draw_adapters,
    in_layer_order,
    section_page,
    show_correlation,
    show_factors,
    show_spread,
    show_words,
)
from misdirection.report.estimates import show_estimate, show_number, show_plain, show_points, show_rate
from misdirection.report.findings import Finding
from misdirection.report.reader import READER

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
    engine.filters.update(rate=show_rate, points=show_points)
    engine.filters.update(spread=show_spread, correlation=show_correlation, factors=show_factors, words=show_words)
    engine.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    return engine


def marked(findings: Sequence[Finding]) -> list[tuple[Finding, str, str]]:
    """Each finding with the class and the words of its mark."""
    return [(finding, *_MARKS[finding.holds]) for finding in findings]


def data_uri(picture: bytes, kind: str = "svg+xml") -> str:
    """A picture as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def adapters_page(section: dict[str, Any]) -> dict[str, Any]:
    """Everything that `adapters.html` reads."""
    return {**section_page(section), "findings": marked([Finding(**each) for each in section["findings"]])}


def render(results: dict[str, Any], folder: Path) -> Path:
    """Write the report on one adapter alone; gives its path."""
    section = in_layer_order(results["adapters"])
    pictures = draw_adapters(section, folder / "figures")
    page = (
        environment()
        .get_template("interpretation.html")
        .render(
            name=results["name"],
            base=results.get("base"),
            seconds=results.get("seconds"),
            adapters=adapters_page(section),
            reader=read_json(folder / READER) if (folder / READER).exists() else None,
            pictures={name: data_uri(path.read_bytes()) for name, path in pictures.items()},
        )
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"
