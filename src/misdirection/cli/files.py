"""Files: `schema`."""

from importlib.resources import files
from typing import Annotated

import typer

from misdirection.cli.shared import app
from misdirection.errors import InputError
from misdirection.registry import nearest


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="A kind of result: run, audit, repair, ...")]) -> None:
    """Print the JSON Schema of a kind of result."""
    folder = files("misdirection") / "resources" / "schemas"
    kinds = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    if kind not in kinds:
        raise InputError(f"unknown result {kind!r}{nearest(kind, kinds)}")
    print((folder / f"{kind}.json").read_text(encoding="utf-8"), end="")
