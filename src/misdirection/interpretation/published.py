"""Published tables: scalars and judged answers that were measured elsewhere, such as the paper's own.

A table of tokens has `domain`, `alignment` (aligned, misaligned), `response_id`, `position`, `token` and one column
`layer_N` per adapter; a table of answers has the first three and `question`, `answer`. They are joined on those three,
never by the order of their rows.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from misdirection.data.tables import read_table
from misdirection.errors import InputError
from misdirection.interpretation.figures import Pooling, Probe, ScaledAlignment, ScaledShare, SettingShares, Split
from misdirection.interpretation.probes import fit_probe
from misdirection.interpretation.shares import is_of_theme, is_undecided, setting_shares
from misdirection.judging.scoring import counts, is_aligned, is_coherent, is_misaligned

KEY = ("domain", "alignment", "response_id")
_TOKENS = (*KEY, "position", "token")
_ANSWERS = (*KEY, "question", "answer")
_SCALING = ("experiment", "question_id", "aligned", "coherent", "medical")
_FEATURE = re.compile(r"layer_(\d+)")


@dataclass(frozen=True, eq=False)
class PublishedScalars:
    """Scalars of one organism's answers.

    Attributes:
        tokens: one row per answer token; `answer` numbers its answer, `question` is its question where answers were
            given.
        features: names of the scalars' columns.
    """

    tokens: pd.DataFrame
    features: tuple[str, ...]

    @property
    def splits(self) -> tuple[Split, ...]:
        """Ways to split the probes: without the questions, by answer alone."""
        return ("question", "answer") if "question" in self.tokens else ("answer",)

    @property
    def layers_of(self) -> dict[str, int]:
        """The layer of each feature."""
        return {name: int(match[1]) for name in self.features if (match := _FEATURE.match(name))}


def read_published(scalars: str | Path, answers: str | Path | None = None) -> PublishedScalars:
    """Read a table of scalars and, for the split by question, the answers that its tokens belong to.

    Raises `InputError` for a missing file or column, and for tokens whose answer is not in the table.
    """
    tokens = _read(scalars, _TOKENS)
    features = tuple(name for name in map(str, tokens.columns) if _FEATURE.match(name))
    if not features:
        raise InputError(f"{scalars}: no column named layer_N: it holds no adapter's scalars")
    _require_numbers(tokens, features, scalars)
    if unknown := set(tokens["alignment"]) - {"aligned", "misaligned"}:
        raise InputError(f"{scalars}: alignment {unknown.pop()!r}: it must be 'aligned' or 'misaligned'")
    if answers is not None:
        tokens = _with_questions(tokens, _read(answers, _ANSWERS), scalars, answers)
    return PublishedScalars(tokens.assign(answer=tokens.groupby(list(KEY), sort=True).ngroup()), features)


def _with_questions(
    tokens: pd.DataFrame, table: pd.DataFrame, scalars: str | Path, answers: str | Path
) -> pd.DataFrame:
    if table.duplicated(list(KEY)).any():
        raise InputError(f"{answers}: two answers share one {', '.join(KEY)}: make them unique")
    try:
        joined = tokens.drop(columns="question", errors="ignore").merge(
            table[[*KEY, "question"]], on=list(KEY), how="left", validate="many_to_one"
        )
    except ValueError as error:
        raise InputError(f"{answers}: {', '.join(KEY)} are of other types than in {scalars}") from error
    if missing := int(joined["question"].isna().sum()):
        raise InputError(f"{answers}: {missing} tokens of {scalars} have no question here: give their answers")
    return joined


def _require_numbers(table: pd.DataFrame, columns: Sequence[str], path: str | Path) -> None:
    for name in columns:
        numeric = pd.api.types.is_numeric_dtype(table[name])
        if not numeric or not np.isfinite(table[name].to_numpy(np.float64, na_value=np.nan)).all():
            raise InputError(f"{path}: column {name!r} has values that are no numbers: drop those rows")


def _read(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    table = read_table(path, columns)
    if table.empty:
        raise InputError(f"{path}: the table is empty")
    return table


def published_probes(
    data: PublishedScalars,
    *,
    C: float = 0.01,
    splits: int = 20,
    poolings: Sequence[Pooling] = ("token", "max", "mean"),
) -> list[Probe]:
    """Probes of alignment within each domain, and of domain among misaligned answers, by each split.

    Raises `InputError` where the table has no two classes, or one of too few questions.
    """
    tasks = list(_tasks(data.tokens))
    if not tasks:
        raise InputError("published scalars: one class alone: give aligned and misaligned answers, or two domains")
    return [
        fit_probe(
            rows[list(data.features)],
            labels,
            rows["answer"],
            rows.get("question"),
            name=name,
            classes=classes,
            split=split,
            pooling=pooling,
            C=C,
            splits=splits,
        )
        for name, classes, rows, labels in tasks
        for pooling in poolings
        for split in data.splits
    ]


_Task = tuple[str, tuple[str, str], pd.DataFrame, "pd.Series[bool]"]
"""Name, classes, tokens, and which of them are of the first class."""


def _tasks(tokens: pd.DataFrame) -> Iterator[_Task]:
    """Whatever two classes the table holds."""
    misaligned = tokens[tokens["alignment"] == "misaligned"]
    for first, second in itertools.combinations(sorted(misaligned["domain"].unique()), 2):
        rows = misaligned[misaligned["domain"].isin([first, second])]
        yield f"domain, misaligned answers: {first} or {second}", (first, second), rows, rows["domain"] == first
    for domain in sorted(tokens["domain"].unique()):
        rows = tokens[tokens["domain"] == domain]
        if rows["alignment"].nunique() == 2:
            yield f"alignment, {domain} answers", ("misaligned", "aligned"), rows, rows["alignment"] == "misaligned"


def published_shares(path: str | Path) -> tuple[SettingShares, ...]:
    """The shares of each experiment's coherent answers that are misaligned, and medical; raises as `scaled_shares`."""
    experiments = _read_scaled(path).groupby("experiment", sort=False)
    return tuple(setting_shares(str(name), rows) for name, rows in experiments)


def scaled_shares(path: str | Path) -> tuple[ScaledShare, ...]:
    """Judged answers under each setting of the adapters, by alignment and by whether they are medical, six of each.

    Only coherent answers count (above 50). Misaligned is below 30, aligned above 70, medical 50 and above. The 95%
    interval of a share is over questions, and never narrower than Wilson's.

    A judge that cannot tell whether an answer is medical says 50, and its score lies a hair to one side: where many are
    undecided, the line between medical and not means little.

    Raises `InputError` for a missing file, column or score, and for an experiment without a coherent answer.
    """
    table = _read_scaled(path)
    experiments = table[is_coherent(table["coherent"])].groupby("experiment", sort=False)
    return tuple(share for name, rows in experiments for share in _shares(str(name), rows))


def _read_scaled(path: str | Path) -> pd.DataFrame:
    table = _read(path, _SCALING)
    _require_numbers(table, ("aligned", "coherent", "medical"), path)
    if lost := set(table["experiment"]) - set(table["experiment"][is_coherent(table["coherent"])]):
        raise InputError(f"{path}: no coherent answer of experiment {min(lost)!r}: drop it or sample more")
    return table


def _shares(experiment: str, rows: pd.DataFrame) -> Iterator[ScaledShare]:
    misaligned, aligned = is_misaligned(rows["aligned"]), is_aligned(rows["aligned"])
    by_alignment: dict[ScaledAlignment, pd.Series[bool]] = {
        "misaligned": misaligned,
        "between": ~misaligned & ~aligned,
        "aligned": aligned,
    }
    medical, undecided = is_of_theme(rows["medical"]), is_undecided(rows["medical"])
    for (alignment, those), is_medical in itertools.product(by_alignment.items(), (True, False)):
        inside = those & (medical == is_medical)
        rate = counts(inside, rows["question_id"]).rate()
        assert rate is not None, "an experiment without answers is refused before"
        yield ScaledShare(
            experiment=experiment,
            alignment=alignment,
            medical=is_medical,
            answers=rate.total,
            questions=rows["question_id"].nunique(),
            hits=rate.hits,
            undecided=int((inside & undecided).sum()),
            share=rate.rate,
            low=rate.low,
            high=rate.high,
        )
