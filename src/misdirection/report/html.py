"""Write the report of a run as one self-contained HTML file."""

import base64
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
from misdirection.report.estimates import (
    DAMAGE_LIMIT,
    is_number,
    question_sets,
    show_damage,
    show_estimate,
    show_number,
    show_points,
    show_rate,
)
from misdirection.report.figures import draw_all
from misdirection.report.findings import Finding, find
from misdirection.report.reader import READER

Results = dict[str, Any]

_SECTIONS = {
    "base": "the base model's description",
    "base_margin": "the base model's margins",
    "organisms": "the organisms",
    "convergence": "the convergence of directions",
    "steering": "steering",
    "transfer": "ablation and transfer",
    "samples": "sampled answers",
}

_MARKS = {
    True: ("holds", "✓ holds"),
    False: ("fails", "✗ does not hold"),
    None: ("unknown", "– not measured"),
}


def render(results: Results, folder: Path) -> Path:
    """Write `report.html` and its figures (`figures/`) into `folder`, and return the report's path.

    Where the results hold `adapters` and `folder` a `reader.json` (see `reader.reader_data`), the token reader is part
    of the report. The file appears whole or not at all, fetches nothing, and is the same bytes for the same results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "adapters" in results:
        results = {**results, "adapters": in_layer_order(results["adapters"])}
    section = results.get("adapters") or {}
    pictures = draw_all(results, folder / "figures") | draw_adapters(section, folder / "figures")
    reader = read_json(folder / READER) if section and (folder / READER).exists() else None
    page = environment().get_template("template.html").render(_page(results, pictures), reader=reader)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def environment() -> Environment:
    """What every page is rendered by: all text escaped, an undefined name refused, the reports' filters."""
    made = Environment(
        loader=PackageLoader("misdirection.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(estimate=show_estimate, signed=show_number, damage=show_damage, plain=_plain)
    made.filters.update(rate=show_rate, points=show_points)
    made.filters.update(spread=show_spread, correlation=show_correlation, factors=show_factors, words=show_words)
    made.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    return made


def _page(results: Results, pictures: dict[str, Path]) -> dict[str, Any]:
    """Everything the template reads; an absent section becomes empty."""
    lists = {name: results.get(name) or [] for name in ("steering", "transfer", "samples", "left_out")}
    dicts = {
        name: results.get(name) or {}
        for name in ("base", "base_margin", "organisms", "directions", "behaviour", "environment", "seconds")
    }
    # A report on one adapter alone has no other part, and need not say so of each.
    is_experiment = "adapters" not in results or any(results.get(part) for part in _SECTIONS if part != "base")
    return {
        **lists,
        **dicts,
        "name": results.get("name") or "unnamed run",
        "is_complete": bool(results.get("complete")),
        "is_experiment": is_experiment,
        "has_environment": is_experiment or bool(results.get("environment") or results.get("seconds")),
        "missing": [words for part, words in _SECTIONS.items() if is_experiment and not results.get(part)],
        "findings": _marked(find(results)),
        "adapters": _adapters(results.get("adapters")),
        "question_sets": question_sets(results),
        "damage_limit": DAMAGE_LIMIT,
        "pictures": {name: data_uri(path.read_bytes()) for name, path in pictures.items()},
    }


def _adapters(section: Results | None) -> dict[str, Any]:
    if not section:
        return {}
    findings = [Finding(**one) for one in section.get("findings") or []]
    return {**section_page(section), "findings": _marked(findings)}


def _marked(findings: list[Finding]) -> list[tuple[Finding, str, str]]:
    return [(finding, *_MARKS[finding.holds]) for finding in findings]


def _plain(value: Any) -> str:
    """Word a count, loss or setting without a sign."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if is_number(value) else "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def data_uri(svg: bytes) -> str:
    """An SVG picture as the address of an image."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
