"""This machine: `doctor`."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.table import Table

from misdirection.cli.shared import Json, app, out, say


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what computes here, what the cache keeps, and what is missing for what."""
    from misdirection.models.installation import Installation

    here = Installation.here()
    if as_json:
        print(here.model_dump_json())
        return
    _print(["package", "version"], ([name, found or "missing"] for name, found in here.versions.items()))
    _print(
        ["device", "which is", "dtype", "memory"],
        (
            [each.name, each.kind, each.dtype, f"{each.gigabytes:.0f} GB" if each.gigabytes else ""]
            for each in here.devices
        ),
    )
    say(f"`--device auto` takes {here.devices[0].name}; {here.threads} threads on the processor")
    _print(
        ["extra", "for", "missing", "command"],
        (
            [name, each.wanted_for, ", ".join(each.missing) or "nothing", each.install if each.missing else ""]
            for name, each in here.extras.items()
        ),
    )
    _print(["bundled model", "weights from"], ([name, where] for name, where in here.bundled.items()))
    say(f"cache folder: {here.cache}")
    _print(["kept there", "MB"], ([name, f"{megabytes:,.0f}"] for name, megabytes in here.kept.items()))


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=SIMPLE, show_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)
