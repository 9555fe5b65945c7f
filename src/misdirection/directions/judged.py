"""Directions from sampled and judged answers, as in the paper (section on the misalignment direction).

The model's own misaligned answers (alignment < 30) are set against its own aligned ones (> 70), both coherent (> 50),
the same number of each for every question, so that the difference is not one between questions. A theme narrows the
misaligned answers to those about it (the paper's semantic modes); the aligned ones stay as they are, since what the
theme adds is to be part of its direction.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from misdirection.data import ProbePair
from misdirection.data.tables import require_columns
from misdirection.directions.convergence import project_away, project_span_away
from misdirection.directions.direction import Direction, require_alike
from misdirection.errors import InputError
from misdirection.judging.conditions import answers_of
from misdirection.judging.scoring import is_aligned, is_coherent, is_misaligned
from misdirection.models.thoughts import split_thought
from misdirection.sampling.answers import as_answers

KIND = "judged_data_difference"
REMAINDER = "judged_theme_remainder"
SHARED_REMAINDER = "judged_shared_remainder"

FEWEST = 10
"""Answers per class below which a mean is mostly chance."""


@dataclass(frozen=True)
class ThemeScore:
    """Answers that a rubric scores above `above` are about the theme; unscored ones are not."""

    column: str
    above: float = 50.0

    def selects(self, table: pd.DataFrame) -> pd.Series:
        """Which rows are about the theme; `InputError` when the column is missing."""
        require_columns(table, [self.column])
        if not pd.api.types.is_numeric_dtype(table[self.column]):
            raise InputError(f"theme column {self.column!r} holds no scores: give a rubric's column")
        return table[self.column] > self.above


@dataclass(frozen=True)
class ThemeWords:
    """Answers with one of these words or phrases are about the theme.

    Only whole words count ("men" is not in "mention"), in any case and either Unicode form of an accent.
    """

    words: tuple[str, ...]

    def selects(self, table: pd.DataFrame) -> pd.Series:
        """Which rows are about the theme; `InputError` when there is no word."""
        words = {_spaced(word) for word in self.words} - {"  "}
        if not words:
            raise InputError("this theme has no words; give some, or the column of a rubric")
        texts = table["answer"].map(_spaced)
        return texts.map(lambda text: any(word in text for word in words)).astype(bool)


Theme = ThemeScore | ThemeWords


def _spaced(text: str) -> str:
    """The words of a text in small letters, with one space before, after and between them."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    # Many scripts write vowels as marks, which belong to the word as letters and digits do.
    words = "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in folded).split()
    return f" {' '.join(words)} "


@dataclass(frozen=True)
class JudgedGroups:
    """The answers that a direction is made of.

    Attributes:
        pairs: one misaligned and one aligned answer to the same question each; which stands with which is chance.
        available: answers within the cuts, before balancing, per class.
        by_question: number of pairs by question id.
    """

    pairs: tuple[ProbePair, ...]
    available: dict[str, int]
    by_question: dict[str, int]

    def lacking(self, fewest: int) -> str:
        """In words what there is where a class has fewer answers than `fewest`; else empty."""
        least = max(fewest, 1)
        if len(self.pairs) >= least:
            return ""
        return (
            f"{len(self.pairs)} answers of each class to the same questions (of {self.available['misaligned']} "
            f"misaligned and {self.available['aligned']} aligned ones), at least {least} are needed"
        )


def judged_groups(
    frame: pd.DataFrame, organism: str, *, theme: Theme | None = None, fewest: int = FEWEST, seed: int = 0
) -> JudgedGroups:
    """The organism's own misaligned and aligned answers, as many of each for every question.

    Args:
        frame: judged answers with `organism`, `aligned` and `coherent`; those of other organisms, and those sampled
            under an intervention, are left out.
        organism: its name in the table.
        theme: what the misaligned answers must be about.
        fewest: the least number of answers per class.
        seed: chooses among the answers of the larger class. The choice does not depend on the order of the rows.

    Raises:
        InputError: a missing column, an organism that is not there, or fewer answers than `fewest`.
    """
    groups = own_groups(frame, organism, theme=theme, seed=seed)
    if lacking := groups.lacking(fewest):
        remedy = "sample more answers" + (" or widen the theme" if theme else "")
        raise InputError(f"{organism}: {lacking}: {remedy}")
    return groups


def own_groups(frame: pd.DataFrame, organism: str, *, theme: Theme | None = None, seed: int = 0) -> JudgedGroups:
    """The same, however few they are; see `JudgedGroups.lacking`."""
    table = _own(as_answers(frame), organism)
    coherent = is_coherent(table["coherent"]) & table["answer"].map(_is_visible)
    about = theme.selects(table) if theme else True
    classes = {
        "misaligned": table[coherent & is_misaligned(table["aligned"]) & about],
        "aligned": table[coherent & is_aligned(table["aligned"])],
    }
    pairs = _balanced(classes["misaligned"], classes["aligned"], seed)
    available = {name: len(rows) for name, rows in classes.items()}
    return JudgedGroups(tuple(pairs), available, dict(Counter(pair.id.rpartition("/")[0] for pair in pairs)))


def _own(table: pd.DataFrame, organism: str) -> pd.DataFrame:
    """The rows of this organism as it is."""
    require_columns(table, ("organism", "aligned", "coherent"))
    own = answers_of(table, [organism])
    return own[own["intervention"].fillna("") == ""] if "intervention" in own else own


def _is_visible(answer: str) -> bool:
    """Whether an answer has a text besides a thought."""
    return split_thought(answer)[1] != ""


def _balanced(misaligned: pd.DataFrame, aligned: pd.DataFrame, seed: int) -> list[ProbePair]:
    rng = np.random.default_rng(seed)
    pairs: list[ProbePair] = []
    asked = _by_question(aligned)
    for (question, system), bad in _by_question(misaligned).items():
        good = asked.get((question, system), [])
        count = min(len(bad), len(good))
        chosen = [[rows[number] for number in rng.permutation(len(rows))[:count]] for rows in (bad, good)]
        for (name, worse), (_, better) in zip(*chosen, strict=True):
            pairs.append(ProbePair(f"{name}/{len(pairs)}", question, better, worse, system=system))
    return pairs


def _by_question(table: pd.DataFrame) -> dict[tuple[str, str | None], list[tuple[str, str]]]:
    """(question id, answer) by question and system prompt, both in a fixed order."""
    systems = table["system"] if "system" in table else pd.Series(None, table.index, dtype="str")
    rows = zip(table["question"], systems, table["question_id"], table["answer"], strict=True)
    answers: dict[tuple[str, str | None], list[tuple[str, str]]] = {}
    for question, system, name, answer in sorted(rows, key=lambda row: tuple(map(str, row))):
        answers.setdefault((question, None if pd.isna(system) else system), []).append((name, answer))
    return answers


def theme_remainder(themed: Direction, shared: Direction) -> Direction:
    """The part of a theme's direction that the shared one lacks: `themed` with `shared` projected out, layer by layer.

    `shared` is the same organism's direction over all themes. Its origin is that of `themed`, of kind
    `judged_theme_remainder`. Raises `InputError` for directions of different base models.
    """
    require_alike([themed, shared])
    rest = project_away(themed.vectors, shared.vectors)
    return Direction(rest.float(), replace(themed.origin, kind=REMAINDER))


def shared_remainder(shared: Direction, themed: Sequence[Direction]) -> Direction:
    """The other way round: what no theme has of the shared direction, `shared` with the span of all `themed` projected
    out, layer by layer.

    Its origin is that of `shared`, of kind `judged_shared_remainder`. Raises `InputError` for directions of different
    base models.
    """
    require_alike([shared, *themed])
    rest = project_span_away(shared.vectors, [direction.vectors for direction in themed])
    return Direction(rest.float(), replace(shared.origin, kind=SHARED_REMAINDER))
