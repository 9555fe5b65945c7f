"""Probes of an organism's answers: of alignment, domain and theme."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from misdirection.interpretation.figures import Pooling, Probe, Split
from misdirection.interpretation.probes import fit_probe
from misdirection.interpretation.texts import GENERAL, Labelled

FEWEST = 4
"""A class needs so many questions, or the test parts would hold one at most."""

C, TOKENS = 0.01, 20_000
"""The paper's C belongs to so many tokens. C weighs the sum over tokens against the penalty, so that on fewer tokens it
is raised in proportion: on a few hundred, 0.01 would leave no feature in the probe."""

RESIDUAL_SPLITS = 5
"""A probe on a whole activation takes long, and its spread is not what it is fitted for."""

_Task = tuple[str, tuple[str, str], NDArray[np.bool_], NDArray[np.bool_]]
"""Name, classes, which answers take part, and which are of the first class."""

_SPLITS: tuple[Split, ...] = ("question", "answer")
_POOLINGS: tuple[Pooling, ...] = ("token", "max", "mean")


def answer_probes(
    answers: Sequence[Labelled], tokens: pd.DataFrame, residual: pd.DataFrame, *, splits: int = 20
) -> Iterator[Probe]:
    """Every probe that the answers are many enough for: `FEWEST` questions of each class.

    Alignment within each domain, the general questions first; domain among misaligned answers; each theme against the
    others among misaligned general answers. By question and by answer; on scalars by token and pooled by answer, and
    on the residual stream by token.

    Args:
        answers: with their classes.
        tokens: scalars as `scalars.wide` gives them, for the same answers.
        residual: activations of the same tokens, [tokens, width].
        splits: random splits of each probe; `RESIDUAL_SPLITS` at most on the residual stream.
    """
    number = tokens.index.get_level_values("answer").to_numpy()
    question = np.array([answer.question_id for answer in answers])[number]
    scalars = tokens.drop(columns="token").astype(np.float64)
    kinds: list[tuple[str, pd.DataFrame, Sequence[Pooling], int]] = [
        ("scalars", scalars, _POOLINGS, splits),
        ("residual", residual, ("token",), min(splits, RESIDUAL_SPLITS)),
    ]
    for name, classes, chosen, first in _tasks(answers):
        rows = chosen[number]
        data = (first[number][rows], number[rows], question[rows])
        strength = C * TOKENS / rows.sum()
        for kind, features, poolings, count in kinds:
            for pooling in poolings:
                for split in _SPLITS:
                    yield fit_probe(
                        features[rows], *data, name=name, classes=classes, split=split, pooling=pooling, kind=kind,
                        C=strength, splits=count,
                    )  # fmt: skip


def _tasks(answers: Sequence[Labelled]) -> Iterator[_Task]:
    domain = np.array([answer.domain for answer in answers])
    theme = np.array([answer.theme for answer in answers])
    misaligned = np.array([answer.alignment == "misaligned" for answer in answers])
    questions = np.array([answer.question_id for answer in answers])
    narrow = sorted(set(domain) - {GENERAL})
    for name in (*({GENERAL} & set(domain)), *narrow):
        inside = domain == name
        yield from _checked(f"alignment, {name} answers", ("misaligned", "aligned"), inside, misaligned, questions)
    for name in narrow:
        chosen = misaligned & np.isin(domain, [name, GENERAL])
        yield from _checked(f"domain, {name} misaligned answers", (name, GENERAL), chosen, domain == name, questions)
    general = misaligned & (domain == GENERAL)
    for name in sorted(set(theme[general]) - {""}):
        yield from _checked(f"theme, {name} misaligned answers", (name, "others"), general, theme == name, questions)


def _checked(
    name: str,
    classes: tuple[str, str],
    chosen: NDArray[np.bool_],
    first: NDArray[np.bool_],
    questions: NDArray[np.str_],
) -> Iterator[_Task]:
    if all(len(set(questions[chosen & (first == label)])) >= FEWEST for label in (True, False)):
        yield name, classes, chosen, first
