"""Probes: classes of answers told apart by an adapter's scalars (paper, section on interpreting rank-1 adapters).

An L1 logistic regression on z-scored features tells two classes of answers apart, over repeated splits. Tokens of one
answer are alike, and so are answers to one question: a split by token tests on what it trained on, and a split by
answer still lets the probe know the questions. The split by question is therefore the one to read, the split by answer
stands beside it for comparison with published figures.

Beside the classes stands a null: the same splits with the labels shuffled, over whole groups of the split where
each group has one label, else over whole answers. A probe that knows something is above this null's interval, which is
wide where a class has few questions. L1 may choose no feature at all (every coefficient 0); AUROC is 0.5 then, and says
that the penalty was too strong for the data rather than that the classes are alike.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from misdirection.errors import InputError
from misdirection.interpretation.figures import Pooling, Probe, ProbeScore, Split
from misdirection.statistics.curves import auc
from misdirection.statistics.resampling import percentiles

TEST_SHARE = 0.2
_DRAWS = 100
"""How often a split, or an order of labels, is drawn again because one of its parts lacks a class."""
_MORE = "give more answers and questions of each class"


def fit_probe(
    features: pd.DataFrame,
    labels: ArrayLike,
    answers: ArrayLike,
    questions: ArrayLike | None,
    *,
    name: str,
    classes: tuple[str, str],
    split: Split = "question",
    pooling: Pooling = "token",
    kind: str = "scalars",
    C: float = 0.01,
    splits: int = 20,
    seed: int = 0,
) -> Probe:
    """Train and test a probe on repeated random splits, a fifth of the groups held out each time.

    Features are z-scored with the training part's mean and deviation alone; classes weigh the same.

    Args:
        features: [tokens, features], named.
        labels: [tokens], True for the first of `classes`; one value throughout each answer.
        answers: [tokens], which answer a token belongs to.
        questions: [tokens], which question; None where that is not known and the split is by answer.
        name, classes, split, pooling, splits: see `Probe`.
        kind: `scalars` or `residual`, what the features are.
        C: inverse strength of the L1 penalty, per token. A pooled probe is fitted with C times the tokens per answer,
            so that the data weigh as much against the penalty as they do token by token.
        seed: of the splits and of the null.

    Raises:
        InputError: unequal lengths, values that are not finite, an answer with two labels or questions, a class
            with fewer than two groups of the split, or too few splits with both classes in both parts.
    """
    tokens = _rows(features, labels, answers, questions, name, split)
    rows = tokens if pooling == "token" else tokens.pooled(pooling)
    _require_classes(rows, name, classes, split)
    fits, null = _fits(rows, C * len(tokens.labels) / len(rows.labels), splits, seed, name)
    share = float(rows.labels.mean())
    return Probe(
        name=name,
        classes=classes,
        split=split,
        pooling=pooling,
        features=kind,
        C=C,
        splits=splits,
        answers=_distinct(rows.answers),
        questions=0 if questions is None else _distinct(questions),
        tokens=len(tokens.labels),
        accuracy=_spread([fit.accuracy for fit in fits]),
        auroc=_spread([fit.auroc for fit in fits]),
        null_auroc=_spread([fit.auroc for fit in null]),
        baseline=max(share, 1 - share),
        coefficients={} if kind == "residual" else _coefficients(fits, rows.features),
    )


@dataclass(frozen=True)
class _Rows:
    """[rows, features], and of each row its label, its answer and its group, as numbers from 0.

    A group is what the split keeps whole.
    """

    features: pd.DataFrame
    labels: NDArray[np.bool_]
    answers: NDArray[np.int64]
    groups: NDArray[np.int64]

    def pooled(self, how: Literal["max", "mean"]) -> "_Rows":
        """One row per answer, with the largest or the mean value of each feature over its tokens."""
        _, first = np.unique(self.answers, return_index=True)
        by_answer = self.features.groupby(self.answers)
        table = by_answer.max() if how == "max" else by_answer.mean()
        return _Rows(table, self.labels[first], self.answers[first], self.groups[first])

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.bool_]:
        """The labels, shuffled over whole groups where each has one label, else over whole answers."""
        units = self.groups if _constant(self.labels, self.groups) else self.answers
        _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
        labels: NDArray[np.bool_] = generator.permutation(self.labels[first])[inverse]
        return labels


_Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Numbers of the training rows and of the test rows."""


@dataclass(frozen=True)
class _Fitted:
    accuracy: float
    auroc: float
    coefficients: NDArray[np.float64]


def _fits(rows: _Rows, strength: float, splits: int, seed: int, name: str) -> tuple[list[_Fitted], list[_Fitted]]:
    """A fit for each split, on the classes and on the null."""
    values = rows.features.to_numpy(np.float64)
    generator = np.random.default_rng(seed)
    fits, null = [], []
    for part in _parts(rows, splits, seed, name):
        fits.append(_fit(values, rows.labels, part, strength, seed))
        null.append(_fit(values, _null_labels(rows, part, generator, name), part, strength, seed))
    return fits, null


def _coefficients(fits: Sequence[_Fitted], features: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    by_feature = np.stack([fit.coefficients for fit in fits], axis=1).tolist()
    return {str(name): tuple(values) for name, values in zip(features.columns, by_feature, strict=True)}


def _fit(values: NDArray[np.float64], labels: NDArray[np.bool_], part: _Part, strength: float, seed: int) -> _Fitted:
    train, test = part
    # Of the two solvers with an L1 penalty liblinear is the faster: 1.5 times on nine features, 3 to 7 times on whole
    # activations, where it needs no reduction of the width.
    regression = LogisticRegression(
        C=strength, l1_ratio=1, solver="liblinear", class_weight="balanced", random_state=seed
    )
    model = make_pipeline(StandardScaler(), regression).fit(values[train], labels[train])
    scores = model.decision_function(values[test])
    accuracy = float(((scores > 0) == labels[test]).mean())
    return _Fitted(accuracy, auc(scores[labels[test]], scores[~labels[test]]), regression.coef_[0])


def _parts(rows: _Rows, splits: int, seed: int, name: str) -> Iterator[_Part]:
    """So many splits whose two parts both hold both classes."""
    source = GroupShuffleSplit(n_splits=splits * _DRAWS, test_size=TEST_SHARE, random_state=seed)
    drawn = source.split(rows.labels, groups=rows.groups)
    usable = list(itertools.islice((part for part in drawn if _has_both(rows.labels, part)), splits))
    if len(usable) < splits:
        raise InputError(f"probe {name!r}: too few splits have both classes in both parts: {_MORE}")
    yield from usable


def _null_labels(rows: _Rows, part: _Part, generator: np.random.Generator, name: str) -> NDArray[np.bool_]:
    for _ in range(_DRAWS):
        labels = rows.shuffled(generator)
        if _has_both(labels, part):
            return labels
    raise InputError(f"probe {name!r}: shuffled labels leave a class out of a part: {_MORE}")


def _has_both(labels: NDArray[np.bool_], part: _Part) -> bool:
    return all(0 < labels[numbers].sum() < len(numbers) for numbers in part)


def _rows(
    features: pd.DataFrame,
    labels: ArrayLike,
    answers: ArrayLike,
    questions: ArrayLike | None,
    name: str,
    split: Split,
) -> _Rows:
    """Checked; without questions every answer has one of its own."""
    if questions is None and split == "question":
        raise InputError(f"probe {name!r}: a split by question needs the question of every answer")
    columns = [np.asarray(column) for column in (labels, answers, answers if questions is None else questions)]
    if {len(column) for column in columns} != {len(features)}:
        raise InputError(f"probe {name!r}: labels, answers and questions must be as many as the features' rows")
    truth, answer, question = columns[0].astype(bool), _codes(columns[1]), _codes(columns[2])
    _require_finite(features, name)
    for what, values in (("labels", truth), ("questions", question)):
        if not _constant(values, answer):
            raise InputError(f"probe {name!r}: an answer has two {what}: give one for all of its tokens")
    return _Rows(features, truth, answer, answer if split == "answer" else question)


def _require_finite(features: pd.DataFrame, name: str) -> None:
    finite = np.isfinite(features.to_numpy(np.float64)).all(axis=0)
    if not finite.all():
        culprit = features.columns[int(np.argmin(finite))]
        raise InputError(f"probe {name!r}: feature {culprit!r} has values that are not finite: drop those rows")


def _require_classes(rows: _Rows, name: str, classes: tuple[str, str], split: Split) -> None:
    for label, words in zip((True, False), classes, strict=True):
        if (count := _distinct(rows.groups[rows.labels == label])) < 2:
            raise InputError(
                f"probe {name!r}: class {words!r} needs two {split}s at least, to train and to test: it has {count}"
            )


def _constant(values: NDArray, units: NDArray[np.int64]) -> bool:
    """Whether a unit's values are all the same."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    return bool((values == values[first][inverse]).all())


def _codes(values: NDArray) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = np.unique(values, return_inverse=True)[1]
    return codes


def _distinct(values: ArrayLike) -> int:
    return len(np.unique(np.asarray(values)))


def _spread(values: list[float]) -> ProbeScore:
    low, high = percentiles(values)
    return ProbeScore(mean=float(np.mean(values)), low=float(low), high=float(high), n=len(values))
