"""Files: `convert`, `schema`, `push`, `pull`."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer

from misdirection.cli.shared import app
from misdirection.errors import InputError
from misdirection.progress import console as notices
from misdirection.registry import nearest


@app.command()
def convert(
    tables: Annotated[list[Path], typer.Argument(help="Answers: Parquet, CSV, or logs of Inspect (.eval).")],
    file: Annotated[Path, typer.Option("--out", help="The file to write, of any of these kinds.")],
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="COLUMN=VALUE: only these rows; several times; an empty value too."),
    ] = None,
) -> None:
    """Answers in another form: tables to logs of Inspect and back; several files become one."""
    from misdirection.evals.convert import convert as convert_answers

    count = convert_answers(tables, file, where or [])
    notices.print(f"wrote {file}: {count} answers", highlight=False, soft_wrap=True)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="A kind of result: run, audit, repair, ...")]) -> None:
    """Print the JSON Schema of a kind of result."""
    folder = files("misdirection") / "resources" / "schemas"
    kinds = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    if kind not in kinds:
        raise InputError(f"unknown result {kind!r}{nearest(kind, kinds)}")
    print((folder / f"{kind}.json").read_text(encoding="utf-8"), end="")


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
