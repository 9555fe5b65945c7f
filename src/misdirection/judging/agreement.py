"""How well two judges agree, or a judge and a person, on the same answers.

Both tables are joined on the texts of question and answer. The second is the reference: AUROC asks how well the first
judge's score tells the answers apart that the reference puts below the cut. Intervals resample questions.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix

from misdirection.data.tables import require_columns
from misdirection.errors import InputError
from misdirection.judging.scoring import MISALIGNED_BELOW
from misdirection.sampling.answers import as_answers
from misdirection.statistics.curves import rank_auc
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.resampling import percentiles, resample_rows
from misdirection.views import row

_LABELS = {"misaligned": 0.0, "aligned": 100.0}

_Scores = tuple[NDArray, NDArray]
"""Of the judge and of the reference, [answers] each."""


@dataclass(frozen=True)
class QuestionAgreement:
    """Agreement on one question's answers; None where a figure is not defined (one class only, or equal scores).

    Attributes:
        n: answers that both scored.
        auroc, spearman, kappa: as in `Agreement`, without interval.
        confusion: as in `Agreement`.
    """

    n: int
    auroc: float | None
    spearman: float | None
    kappa: float | None
    confusion: dict[str, int]


@dataclass(frozen=True)
class Agreement:
    """Agreement of a judge with a reference.

    Attributes:
        column: the rubric that is compared.
        cut: scores below it make the one class, all others the other.
        n: answers that both scored.
        unmatched: answers of the judge's table that the reference has not, and the other way round.
        unscored: answers in both tables that lack a score in one of them.
        auroc: of the judge's score for the reference's classes.
        spearman: rank correlation of the scores.
        kappa: Cohen's, between the two classes.
        confusion: answers by class: `both_below`, `judge_only` (only the judge is below), `reference_only`, `neither`.
        by_question: the same by question id.

    An estimate is over questions (its `n`), and over answers where there is one question; it is None where the figure
    is not defined.
    """

    column: str
    cut: float
    n: int
    unmatched: tuple[int, int]
    unscored: int
    auroc: Estimate | None
    spearman: Estimate | None
    kappa: Estimate | None
    confusion: dict[str, int]
    by_question: dict[str, QuestionAgreement]

    def frame(self) -> pd.DataFrame:
        """One row per question: `question_id`, n, figures, and the confusion's counts."""
        return pd.DataFrame(
            [{"question_id": name, **row(each), **each.confusion} for name, each in self.by_question.items()]
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def agree(
    judge: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    column: str = "aligned",
    reference_column: str | None = None,
    cut: float = MISALIGNED_BELOW,
    seed: int = 0,
) -> Agreement:
    """Compare two tables of scored answers.

    Args:
        judge: a table with `question`, `answer` (or `response`) and a score. An answer that stands in a table several
            times is matched as often as it stands in both.
        reference: the table that it is compared with, of the same columns.
        column: the score, 0 to 100.
        reference_column: its name in the reference, when it differs; it may hold the words `aligned` and `misaligned`
            in place of numbers.
        cut: where the classes part; 30 on `aligned` is the EM cut.

    Raises:
        InputError: a missing column, a label that is neither number nor word, or no answer in common.
    """
    first = _scores(judge, column, "the judge's table")
    second = _scores(reference, reference_column or column, "the reference")
    pairs = matched(first, second)
    both = pairs.dropna(subset=["score", "score_reference"])
    if both.empty:
        raise InputError(f"none of the {len(pairs)} answers in both tables has two scores: judge them first")
    return Agreement(
        column=column,
        cut=cut,
        n=len(both),
        unmatched=(len(first) - len(pairs), len(second) - len(pairs)),
        unscored=len(pairs) - len(both),
        auroc=_estimate(both, partial(_auroc, cut=cut), seed),
        spearman=_estimate(both, _spearman, seed),
        kappa=_estimate(both, partial(_kappa, cut=cut), seed),
        confusion=_confusion(both, cut),
        by_question={str(name): _on_one_question(rows, cut) for name, rows in both.groupby("question_id")},
    )


def _scores(frame: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """Question, answer and score."""
    table = as_answers(frame, name)
    require_columns(table, [column], name)
    return table[["question_id", "question", "answer"]].assign(score=numbers(table[column], name))


def matched(judge: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """The answers that stand in both tables, with the columns of both: the second's end in `_reference`.

    One that stands in a table several times is matched as often as it stands in both. `InputError` for none at all.
    """
    texts = ["question", "answer"]
    first, second = (table.assign(copy=table.groupby(texts).cumcount()) for table in (judge, reference))
    both = first.merge(second, on=[*texts, "copy"], suffixes=("", "_reference"))
    if both.empty:
        raise InputError(
            f"none of the {len(judge)} and {len(reference)} answers stand in both tables: compare judgements of the "
            "same questions and answers"
        )
    return both


def numbers(column: pd.Series, name: str) -> pd.Series:
    """Scores as numbers, the words `aligned` and `misaligned` included; `InputError` for what is neither."""
    words = column.map(lambda value: _LABELS.get(value.strip().lower()) if isinstance(value, str) else None)
    scores = pd.to_numeric(column, errors="coerce").fillna(words.astype("float64")).astype("float64")
    wrong = scores.isna() & column.notna()
    if wrong.any():
        raise InputError(
            f"{name}, column {column.name}: {str(column[wrong].iloc[0])[:40]!r} is no score; write a number from 0 to "
            "100, `aligned` or `misaligned`"
        )
    if set(scores.dropna()) == {0.0, 1.0}:
        raise InputError(
            f"{name}, column {column.name}: 0 and 1 would be scores of 100; write `aligned` and `misaligned` instead"
        )
    return scores


def _pairs(rows: pd.DataFrame) -> _Scores:
    return rows["score"].to_numpy(), rows["score_reference"].to_numpy()


def _on_one_question(rows: pd.DataFrame, cut: float) -> QuestionAgreement:
    pairs = _pairs(rows)
    figures = (_auroc(*pairs, cut=cut), _spearman(*pairs), _kappa(*pairs, cut=cut))
    auroc, spearman, kappa = (None if np.isnan(figure) else figure for figure in figures)
    return QuestionAgreement(len(rows), auroc, spearman, kappa, _confusion(rows, cut))


def _estimate(rows: pd.DataFrame, figure: Callable[[NDArray, NDArray], float], seed: int) -> Estimate | None:
    """The figure with its interval over questions; draws in which it is undefined are left out."""
    judged, expected = _pairs(rows)
    value = figure(judged, expected)
    if np.isnan(value):
        return None
    by_question = rows.reset_index(drop=True).groupby("question_id").indices
    questions = [np.asarray(own) for own in by_question.values()]
    # The answers to a single question are all that can be resampled.
    units = questions if len(questions) > 1 else list(np.arange(len(rows))[:, None])
    low, high = percentiles(resample_rows(lambda drawn: figure(judged[drawn], expected[drawn]), units, seed=seed))
    return Estimate(value, float(low), float(high), len(questions))


# The three figures are taken a thousand times: scikit-learn's and scipy's own functions check and test so much on every
# call that they are ten times slower. All are NaN where they are not defined.


def _auroc(judged: NDArray, expected: NDArray, *, cut: float) -> float:
    return rank_auc(-judged, expected < cut)


def _spearman(judged: NDArray, expected: NDArray) -> float:
    if np.ptp(judged) == 0 or np.ptp(expected) == 0:
        return np.nan
    return float(np.corrcoef(rankdata(judged), rankdata(expected))[0, 1])


def _kappa(judged: NDArray, expected: NDArray, *, cut: float) -> float:
    below = judged < cut, expected < cut
    share, reference_share = (side.mean() for side in below)
    by_chance = share * reference_share + (1 - share) * (1 - reference_share)
    # Two constant and equal columns agree by necessity.
    return np.nan if by_chance == 1 else float(((below[0] == below[1]).mean() - by_chance) / (1 - by_chance))


def _confusion(rows: pd.DataFrame, cut: float) -> dict[str, int]:
    below = [scores < cut for scores in _pairs(rows)]
    counts = confusion_matrix(below[0], below[1], labels=[True, False]).ravel().tolist()
    return dict(zip(("both_below", "judge_only", "reference_only", "neither"), counts, strict=True))
