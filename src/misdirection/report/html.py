"""Write the report of a run as one self-contained HTML file."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from misdirection.files import write_atomic
from misdirection.report.estimates import (
    DAMAGE_LIMIT,
    is_number,
    question_sets,
    show_damage,
    show_estimate,
    show_number,
)
from misdirection.report.figures import draw_all
from misdirection.report.findings import find

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

    The file appears whole or not at all, fetches nothing, and is the same bytes for the same results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(results, folder / "figures")
    page = _environment().get_template("template.html").render(_page(results, pictures))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("misdirection.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(estimate=show_estimate, signed=show_number, damage=show_damage, plain=_plain, rate=_rate)
    return environment


def _page(results: Results, pictures: dict[str, Path]) -> dict[str, Any]:
    """Everything the template reads; an absent section becomes empty."""
    lists = {name: results.get(name) or [] for name in ("steering", "transfer", "samples", "left_out")}
    dicts = {
        name: results.get(name) or {}
        for name in ("base", "base_margin", "organisms", "directions", "behaviour", "environment", "seconds")
    }
    return {
        **lists,
        **dicts,
        "name": results.get("name") or "unnamed run",
        "is_complete": bool(results.get("complete")),
        "missing": [words for section, words in _SECTIONS.items() if not results.get(section)],
        "findings": [(finding, *_MARKS[finding.holds]) for finding in find(results)],
        "question_sets": question_sets(results),
        "damage_limit": DAMAGE_LIMIT,
        "pictures": {name: _data_uri(path) for name, path in pictures.items()},
    }


def _plain(value: Any) -> str:
    """Word a count, loss or setting without a sign."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if is_number(value) else "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _rate(value: Any) -> str:
    """Word a share of answers, in percent, with its interval."""
    if value is None:
        return "–"
    return f"{100 * value['rate']:.1f}% [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _data_uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
