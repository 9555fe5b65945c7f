"""Files: `fetch`, `convert`, `schema`, `bundle`, `verify`, `push`, `pull`."""

import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from misdirection.cli.shared import Json, Where, app, print_figures, print_table, say
from misdirection.errors import EXIT_STATUS, InputError
from misdirection.progress import notice
from misdirection.registry import nearest

if TYPE_CHECKING:
    from misdirection.bundles.results import VerifyResult


@app.command()
def convert(
    tables: Annotated[list[Path], typer.Argument(help="Answers: Parquet, CSV, or logs of Inspect (.eval).")],
    file: Annotated[Path, typer.Option("--out", help="The file to write, of any of these kinds.")],
    where: Where = None,
) -> None:
    """Answers in another form: tables to logs of Inspect and back; several files become one."""
    from misdirection.evals.convert import convert as convert_answers

    count = convert_answers(tables, file, where or [])
    notice(f"wrote {file}: {count} answers")


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="A kind of result: run, audit, repair, ...")]) -> None:
    """Print the JSON Schema of a kind of result."""
    folder = files("misdirection") / "resources" / "schemas"
    kinds = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    if kind not in kinds:
        raise InputError(f"unknown result {kind!r}{nearest(kind, kinds)}")
    print((folder / f"{kind}.json").read_text(encoding="utf-8"), end="")


@app.command()
def fetch(
    kind: Annotated[
        Literal["questions", "training", "answers"], typer.Argument(help="questions, training or answers.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="The folder to put them into.")] = Path("published"),
    as_json: Json = False,
) -> None:
    """Get the paper's published files, checked by their hashes; without a network, which file to put where.

    Nothing that is there is replaced. Exit status 15 where one of them cannot be fetched.
    """
    from misdirection.data.published import FILES
    from misdirection.data.published import fetch as fetch_published

    for file in FILES[kind]:
        notice(f"{file.name}: {file.what}. {file.terms}")
    fetched = fetch_published(kind, folder)
    rows = [{"file": str(each.path), "state": each.state, "told": each.told} for each in fetched]
    if as_json:
        print_figures({"files": rows}, as_json)
    else:
        print_table(_table(("file", "state"), ((row["file"], row["state"]) for row in rows)))
        for each in fetched:
            if each.told:
                say(f"{each.file.name}: {each.told}")
    if any(each.state == "missing" and each.file.source for each in fetched):
        sys.exit(EXIT_STATUS["NetworkProblem"])


@app.command()
def bundle(
    result: Annotated[
        Path,
        typer.Argument(help="The folder of a run, an audit, a screen, a repair, an interpretation or a reference."),
    ],
    file: Annotated[Path, typer.Option("--out", help="The archive (.zip).")],
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Put in weights of any size; default: over 16 MiB their hash alone.")
    ] = False,
    with_rows: Annotated[
        bool, typer.Option("--with-rows", help="Of a screen, put in the rows that were screened; default: their hash.")
    ] = False,
) -> None:
    """Put a result and all that it was computed from into one archive, without keys and paths of this disk."""
    from misdirection.bundles.bundle import bundle as write_bundle

    made = write_bundle(result, file, with_weights=with_weights, with_rows=with_rows)
    size = sum(each.size for each in made.files.values())
    notice(f"wrote {file}: {len(made.files)} files, {size / 2**20:.1f} MiB; {len(made.left_out)} more by their hash")
    say(f"manifest: {made.digest}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="An archive that `bundle` wrote.")],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", help="A folder with the data and adapters, under their names: checked, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's hashes, and compute its figures again without a model. Exit status 0, 8 differs, 9 open."""
    from misdirection.bundles.verify import verify as verify_bundle

    result = verify_bundle(bundle, inputs=inputs)
    if as_json:
        print_figures(result.as_dict(), as_json)
    else:
        _print_verification(result)
    sys.exit(EXIT_STATUS[result.verdict])


def _print_verification(result: "VerifyResult") -> None:
    said = f"{result.verdict.upper()}: a bundle of kind {result.of}, made by misdirection {result.made_by}"
    say(_plain(said), f"manifest: {result.manifest}")
    how = f"within {result.tolerance:g} of each, rounding apart" if result.tolerance else "to the last digit"
    not_recomputed = sum(each.count for each in result.not_recomputed)
    rows = {
        "files as the manifest has them": result.intact,
        "files known by their hash alone": result.left_out,
        "figures recomputed": result.recomputed,
        f"equal, {how}": result.equal,
        "different": len(result.differences),
        "not recomputed": not_recomputed,
    }
    print_table(_table(("of the bundle", "count"), rows.items()))
    if result.not_recomputed:
        reasons = ((each.figures, each.count, each.reason) for each in result.not_recomputed)
        print_table(_table(("not recomputed", "count", "reason"), reasons))
    if result.differences:
        differences = ((each.figure, each.bundle, each.recomputed) for each in result.differences[:_SHOWN])
        print_table(_table(("different", "in the bundle", "recomputed"), differences))
    for line in _lines(result):
        say(_plain(line))


def _lines(result: "VerifyResult") -> list[str]:
    """A line for each file, input and version that is not the bundle's."""
    lines = [f"{each.file}: {each.fault}" for each in result.faults]
    lines += [f"input {each.name}: {each.state}" for each in result.inputs]
    lines += [f"{name}: {theirs} made the bundle, {ours} is here" for name, (theirs, ours) in result.software.items()]
    if len(result.differences) > _SHOWN:
        lines.append(f"{len(result.differences) - _SHOWN} more figures are different: --json lists all")
    return lines


_SHOWN = 20
"""Different figures that are printed."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in columns))
    for row in rows:
        table.add_row(*(_plain(str(cell)) for cell in row))
    return table


def _plain(text: str) -> str:
    """What a bundle holds is anybody's text: none of it steers a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@app.command()
def push(
    thing: Annotated[
        Path,
        typer.Argument(
            help="An organism's, a reference's or an audit's folder, a direction file, or a table of answers."
        ),
    ],
    repository: Annotated[str, typer.Argument(help="USER/NAME.")],
    answers: Annotated[
        Literal["bad", "good"] | None,
        typer.Option("--answers", help="What an organism was trained on, where no run knows it."),
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="The Hub's name of a licence: apache-2.0.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Print the card, and send nothing.")] = False,
) -> None:
    """Send a thing of ours to the Hugging Face Hub, with a card that says what it is."""
    from misdirection.hub.parcels import Declared, parcel
    from misdirection.hub.transfer import push as push_to_hub

    declared = Declared(answers, license)
    print(parcel(thing, declared).card if card else push_to_hub(thing, repository, declared, public=public))


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="USER/NAME.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder that is made, or replaced if it is ours.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
) -> None:
    """Bring what was pushed to the Hub into a folder."""
    from misdirection.hub.transfer import pull as pull_from_hub

    print(pull_from_hub(repository, folder, revision=revision))
