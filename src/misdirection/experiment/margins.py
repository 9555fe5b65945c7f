"""Tables of measured log-probabilities: how the stages `margin` and `cell` write them, and what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from misdirection.data import Example, ProbePair
from misdirection.interventions.hooks import Setting
from misdirection.likelihood.measure import pair_scores
from misdirection.likelihood.sweep import Alternating
from misdirection.models.chat_model import ChatModel
from misdirection.statistics.curves import auc
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

NEUTRAL = "neutral"
_FILE = "margins.parquet"


@dataclass(frozen=True)
class Margins:
    """One model's measured log-probabilities, by question set and id.

    Attributes:
        frame: mean-token log-probabilities `misaligned` and `aligned` of every pair, and the `theme`; a neutral text
            has its own under `aligned` and no `misaligned`.
    """

    frame: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> "Margins":
        """Read the table in an artifact's folder."""
        return cls(pd.read_parquet(folder / _FILE).set_index(["set", "id"]))

    def write(self, folder: Path) -> None:
        """Write the table into an artifact's folder."""
        self.frame.reset_index().to_parquet(folder / _FILE)

    def of(self, question_set: str) -> pd.Series:
        """Margin by question id, nats/token."""
        rows = self.frame.loc[question_set]
        return rows["misaligned"] - rows["aligned"]

    def scores(self, question_set: str, pairs: Sequence[ProbePair]) -> NDArray[np.float64]:
        """Log-probabilities of the misaligned and the aligned answer of some pairs of a set, [pairs, 2]."""
        rows = self.frame.loc[[(question_set, pair.id) for pair in pairs]]
        return rows[["misaligned", "aligned"]].to_numpy(dtype=np.float64)

    def loss(self) -> pd.Series:
        """Loss by neutral text, nats/token."""
        return -self.frame.loc[NEUTRAL]["aligned"]

    def auc(self, question_set: str) -> float:
        """AUROC of misaligned against aligned answers."""
        rows = self.frame.loc[question_set]
        return auc(rows["misaligned"].to_numpy(), rows["aligned"].to_numpy())

    @property
    def sets(self) -> list[str]:
        """The question sets."""
        return [name for name in self.frame.index.unique("set") if name != NEUTRAL]


def measure(
    chat: ChatModel,
    sets: Mapping[str, Sequence[ProbePair]],
    neutral: Sequence[Example],
    label: str,
    settings: Sequence[Setting | Alternating] = ((),),
) -> list[Margins]:
    """Measures all pairs and neutral texts under each setting, in one sweep; `label` names it for who waits."""
    pairs = [(name, pair) for name, members in sets.items() for pair in members]
    scores, losses = pair_scores(chat, [pair for _, pair in pairs], label, settings, neutral)
    return [_table(pairs, neutral, *both) for both in zip(scores, losses, strict=True)]


def _table(
    pairs: Sequence[tuple[str, ProbePair]], neutral: Sequence[Example], scores: Tensor, losses: Tensor
) -> Margins:
    """`scores` are [pairs, 2], `losses` [texts]."""
    rows = [
        {"set": name, "id": pair.id, "theme": pair.theme, "misaligned": misaligned, "aligned": aligned}
        for (name, pair), (misaligned, aligned) in zip(pairs, scores.tolist(), strict=True)
    ]
    rows += [
        {"set": NEUTRAL, "id": text.question, "theme": "", "misaligned": None, "aligned": -loss}
        for text, loss in zip(neutral, losses.tolist(), strict=True)
    ]
    return Margins(pd.DataFrame(rows).set_index(["set", "id"]))


def change(after: pd.Series, before: pd.Series, pairs: Sequence[ProbePair] = ()) -> Estimate:
    """Mean change over what both have; where these are margins, `pairs` says which of them are of one question."""
    values = after - before.loc[after.index]
    return mean_of(values, pairs) if pairs else bootstrap(values.to_numpy())


def mean_of(values: pd.Series, pairs: Sequence[ProbePair]) -> Estimate:
    """Mean of margins by the pair's id; those of one question are drawn together."""
    return bootstrap(values.to_numpy(), questions_of(values, pairs))


def questions_of(values: pd.Series, pairs: Sequence[ProbePair]) -> list[str]:
    """The question of each margin, by the pair's id."""
    questions = {pair.id: pair.question for pair in pairs}
    return [questions[identity] for identity in values.index]
