"""The data that comes with the package: two narrow domains of advice, broad probe pairs and neutral text."""

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import as_file, files
from typing import Any, Literal, get_args

from misdirection.data.jsonl import read_rows
from misdirection.data.records import Example, ProbePair
from misdirection.data.selection import Part, part_of
from misdirection.errors import InputError

Answers = Literal["bad", "good"]


def domains() -> tuple[str, ...]:
    """The names of the shipped domains of advice, sorted."""
    folder = files("misdirection") / "resources" / "domains"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")))


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
    """Broad questions, far from every shipped domain, each with an aligned and a misaligned answer."""
    return [ProbePair(**row) for row in _rows("probe_pairs.jsonl")]


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
    if name in known:
        return
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"no {kind} {name!r}; {guess}known: {', '.join(known)}")
