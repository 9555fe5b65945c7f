"""The data that comes with the package: narrow domains of advice, broad probe pairs, neutral text, and named files."""

import contextlib
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from misdirection.choices import Answers as Answers
from misdirection.data.jsonl import read_rows
from misdirection.data.records import Example, ProbePair
from misdirection.data.selection import Part, part_of
from misdirection.errors import InputError
from misdirection.registry import nearest


def domains() -> tuple[str, ...]:
    """The names of the shipped domains of advice, sorted."""
    return tuple(shipped_files("domains", ".jsonl"))


def shipped_files(folder: str, suffix: str = ".yaml") -> dict[str, Traversable]:
    """The package's files in one folder of its resources, by name without suffix, sorted."""
    entries = (files("misdirection") / "resources" / folder).iterdir()
    named = {entry.name.removesuffix(suffix): entry for entry in entries if entry.name.endswith(suffix)}
    return dict(sorted(named.items()))


def find_source(kind: str, folder: str, source: str | Path) -> Path | Traversable:
    """The shipped file of that name, or else the user's own.

    Raises `InputError` with the nearest shipped name when there is neither.
    """
    known = shipped_files(folder)
    if isinstance(source, str) and source in known:
        return known[source]
    # A text given in place of a path may be too long for the system to look for.
    with contextlib.suppress(OSError):
        if Path(source).exists():
            return Path(source)
    name = str(source)[:300]
    raise InputError(f"no {kind} and no file {name!r}{nearest(name, list(known))}")


def domain_examples(name: str, answers: Answers, part: Part) -> list[Example]:
    """One part of a domain's questions with its bad or its good answers.

    Raises `InputError` for an unknown domain, kind of answer or part.
    """
    _check("kind of answers", answers, get_args(Answers))
    return [Example(row["question"], row[answers]) for row in _domain_rows(name, part)]


def domain_pairs(name: str, part: Part) -> list[ProbePair]:
    """One part of a domain as probe pairs: good answers are aligned, bad ones misaligned.

    Each pair's theme is the domain's name. Raises `InputError` for an unknown domain or part.
    """
    return [
        ProbePair(row["id"], row["question"], aligned=row["good"], misaligned=row["bad"], theme=name)
        for row in _domain_rows(name, part)
    ]


def probe_pairs() -> list[ProbePair]:
    """Broad questions, far from every shipped domain, each with an aligned and a misaligned answer of the same voice.

    The open half: whoever chooses something (a recipe, a limit, a repair) chooses it on these.
    """
    return [ProbePair(**row) for row in _rows("probe_pairs.jsonl")]


def sealed_pairs() -> list[ProbePair]:
    """The sealed half of the broad questions, of the same themes: for final figures, and for no choice."""
    return [ProbePair(**row) for row in _rows("sealed_pairs.jsonl")]


def neutral_examples() -> list[Example]:
    """Questions of plain fact with correct answers, on which a model's loss shows whether it was damaged."""
    return [Example(row["question"], row["answer"]) for row in _rows("neutral.jsonl")]


def _domain_rows(name: str, part: Part) -> list[dict[str, Any]]:
    _check("domain", name, domains())
    _check("part", part, get_args(Part))
    return part_of(_rows("domains", f"{name}.jsonl"), part)


def _rows(*parts: str) -> list[dict[str, Any]]:
    with as_file(files("misdirection").joinpath("resources", *parts)) as path:
        return [row for _, row in read_rows(path)]


def _check(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, list(known))}")
