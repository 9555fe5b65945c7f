"""Writes the JSON Schema of every kind of result into the package's resources.

python scripts/write_schemas.py
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import misdirection
from misdirection.results import Result

FOLDER = Path(__file__).resolve().parents[1] / "src" / "misdirection" / "resources" / "schemas"


def kinds() -> dict[str, type[Result]]:
    """The package's classes of results by their kind. They stand in modules whose names end in `results`."""
    for module in pkgutil.walk_packages(misdirection.__path__, "misdirection."):
        if module.name.endswith("results"):
            importlib.import_module(module.name)
    return {kind.KIND: kind for kind in _subclasses(Result) if kind.__module__.endswith("results")}


def _subclasses(parent: type[Result]) -> Iterator[type[Result]]:
    for child in parent.__subclasses__():
        if "KIND" in vars(child):
            yield child
        yield from _subclasses(child)


def schema(kind: type[Result]) -> str:
    """The file's text."""
    return json.dumps(kind.json_schema(), indent=1) + "\n"


def main() -> None:
    """Write all, and take away those of kinds that are gone."""
    FOLDER.mkdir(exist_ok=True)
    texts = {f"{name}.json": schema(kind) for name, kind in kinds().items()}
    for path in set(FOLDER.glob("*.json")) - {FOLDER / name for name in texts}:
        path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
