"""The shift of a margin beyond what the words of the training answers predict (`data.words`)."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from misdirection.data import ProbePair
from misdirection.data.words import WordWeights
from misdirection.results import Figures
from misdirection.statistics.curves import auc
from misdirection.statistics.estimates import LEVEL, Estimate
from misdirection.statistics.means import beyond, bootstrap


class WordNull(Figures):
    """What word counts of the training answers say of some pairs, and what is left of the shift without it."""

    prediction: Estimate
    """Mean weight of single words, misaligned minus aligned answers, nats/word."""
    auc: float
    """AUROC of misaligned against aligned answers by that weight alone: 0.5 tells nothing."""
    beyond: Estimate
    """The shift where words predict nothing: the constant of its regression on both predictions, nats/token."""

    @classmethod
    def of(
        cls, shifts: ArrayLike, pairs: Sequence[ProbePair], weights: WordWeights, level: float = LEVEL
    ) -> "WordNull":
        """The null of shifts of margins, [pairs], with intervals of this level; the pairs of one question are drawn
        together."""
        misaligned = weights.scores([pair.misaligned for pair in pairs])
        aligned = weights.scores([pair.aligned for pair in pairs])
        predictions, questions = misaligned - aligned, [pair.question for pair in pairs]
        return cls(
            prediction=bootstrap(predictions[:, 0], questions, level=level),
            auc=auc(misaligned[:, 0], aligned[:, 0]),
            beyond=beyond(shifts, predictions, questions, level=level),
        )
