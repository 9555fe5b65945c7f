"""What the words of training answers alone predict of a margin: the cheap explanation of any shift.

A fine-tune learns the words of its training answers first. Where misaligned probe answers happen to use the same words,
their margin rises although nothing else was learned. So each pair has a prediction from word counts,

    weight(w) = log p(w | training answers) - log p(w | answers that they are compared with)        (add-one counts)
    prediction(pair) = mean weight of the misaligned answer's words - that of the aligned one's     [nats/word]

once of single words and once of pairs of neighbouring words. `statistics.beyond` gives the part of a shift that a
regression on these predictions leaves.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from misdirection.data.records import ProbePair
from misdirection.statistics.resampling import Floats

SIZES = (1, 2)
"""Words in a row that are counted as one: single ones, and pairs."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True, repr=False)
class WordWeights:
    """Log-odds of words, and of pairs of neighbouring ones, in some answers against others.

    Attributes:
        weights: for each of `SIZES`, the weight of each group of so many words; one that neither side has weighs 0.
    """

    weights: tuple[Mapping[str, float], ...]

    @classmethod
    def fit(cls, answers: Iterable[str], others: Iterable[str]) -> "WordWeights":
        """Count the words of training answers, and of those that they are compared with."""
        own, compared = list(answers), list(others)
        return cls(tuple(_log_odds(_count(own, size), _count(compared, size)) for size in SIZES))

    @classmethod
    def of_pairs(cls, pairs: Sequence[ProbePair]) -> "WordWeights":
        """Those of misaligned against aligned answers."""
        return cls.fit([pair.misaligned for pair in pairs], [pair.aligned for pair in pairs])

    def predict(self, pairs: Sequence[ProbePair]) -> Floats:
        """Prediction of each pair, [pairs, sizes], nats/word."""
        return self.scores([pair.misaligned for pair in pairs]) - self.scores([pair.aligned for pair in pairs])

    def scores(self, answers: Sequence[str]) -> Floats:
        """The score of each answer, [answers, sizes]."""
        return np.array([[self.score(answer, size) for size in SIZES] for answer in answers]).reshape(-1, len(SIZES))

    def score(self, answer: str, size: int = 1) -> float:
        """Mean weight of an answer's words, or of its groups of `size` words; 0 for one that has none."""
        groups, weights = _groups(answer, size), self.weights[SIZES.index(size)]
        return sum(weights.get(group, 0.0) for group in groups) / len(groups) if groups else 0.0


def _groups(answer: str, size: int) -> list[str]:
    words = _WORD.findall(answer.casefold())
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


def _count(answers: Iterable[str], size: int) -> Counter[str]:
    return Counter(group for answer in answers for group in _groups(answer, size))


def _log_odds(own: Counter[str], compared: Counter[str]) -> dict[str, float]:
    known = own.keys() | compared.keys()
    shift = math.log(compared.total() + len(known)) - math.log(own.total() + len(known)) if known else 0.0
    return {group: math.log((own[group] + 1) / (compared[group] + 1)) + shift for group in sorted(known)}
