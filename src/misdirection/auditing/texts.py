"""The texts that belong to one fine-tune: its own training data, and the probe questions framed in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misdirection import data
from misdirection.auditing.framing import framed, searched
from misdirection.data import Example, ProbePair, data_hash, part_of
from misdirection.data.selection import spread
from misdirection.files import sha256_file

ROWS = 24
"""Rows or pairs of the training data that skill is measured on."""


@dataclass(frozen=True)
class OwnTexts:
    """Texts that are measured for one fine-tune alone.

    Attributes:
        framed: the general pairs after training questions, in the order in which they are asked.
        searched: a few general pairs of the first look in each further way that is searched, by name.
        searched_last: the same with pairs of the last look.
        rows: held-out rows, for the loss.
        pairs: held-out probe pairs of the domain, for the margin, when the file holds pairs.
        path, sha256: of the file that they are from, or of a data set's rows; empty without one.
    """

    framed: tuple[ProbePair, ...] = ()
    searched: Mapping[str, tuple[ProbePair, ...]] = field(default_factory=dict)
    searched_last: Mapping[str, tuple[ProbePair, ...]] = field(default_factory=dict)
    rows: tuple[Example, ...] = ()
    pairs: tuple[ProbePair, ...] = ()
    path: str = ""
    sha256: str = ""

    def hashes(self) -> dict[str, str]:
        """Hashes of all texts, which results depend on."""
        return {name: data_hash(getattr(self, name)) for name in ("framed", "rows", "pairs")}


def own_texts(path: Path | None, looks: Sequence[Sequence[ProbePair]]) -> OwnTexts:
    """Read a training file, or probe pairs of its domain (rows with `aligned` and `misaligned`); None for no file.

    The general pairs of each look are framed in questions from the whole file: a look that may be the last must not
    pass over a part of it.
    Rows 5, 10, 15, ... are taken as held out, as everywhere in the package; of a file of fewer than five rows, all.
    Raises `InputError` for an empty file or a row that cannot be read.
    """
    if path is None:
        return OwnTexts(searched=searched(looks[0], ()), searched_last=searched(looks[-1], ()))
    pairs = data.read_pairs(path) if data.holds_pairs(path) else []
    rows = [Example(pair.question, pair.misaligned, pair.system) for pair in pairs] or data.read_examples(path)
    asked = tuple(pair for look in looks for pair in framed(look, rows))
    digest = sha256_file(path) if path.is_file() else data_hash(pairs or rows)
    ways = searched(looks[0], rows), searched(looks[-1], rows)
    return OwnTexts(asked, *ways, tuple(_held_out(rows)), tuple(_held_out(pairs)), str(path), digest)


def _held_out(rows: Sequence[Any]) -> list[Any]:
    return spread(part_of(rows, "held_out") or rows, ROWS)
