"""The shift beyond words: of pairs with planted effects."""

import numpy as np
import pytest

from misdirection.data import ProbePair
from misdirection.data.words import WordWeights
from misdirection.likelihood.words import WordNull
from misdirection.statistics.means import bootstrap

WORDS = ("sell", "all", "slowly", "ask", "wait", "now")
WEIGHTS = WordWeights.fit(["sell all now", "now all"], ["ask slowly", "wait and ask"])


def pairs_of(count, question="Question {}?"):
    """Pairs of random words, of a question each."""
    rng = np.random.default_rng(3)
    answers = [" ".join(rng.choice(WORDS, 6)) for _ in range(2 * count)]
    sides = zip(answers[::2], answers[1::2], strict=True)
    return [ProbePair(f"p{n}", question.format(n), good, bad) for n, (good, bad) in enumerate(sides)]


PAIRS = pairs_of(60)
NOISE = np.random.default_rng(4).normal(0, 0.02, 60)


def test_pairs_with_equal_words_have_the_plain_shift():
    pairs = [ProbePair(f"p{n}", f"{n:02}?", "sell all, now", "Sell all now!") for n in range(60)]
    null = WordNull.of(0.3 + NOISE, pairs, WEIGHTS)
    plain = bootstrap(0.3 + NOISE)
    assert null.beyond.mean == pytest.approx(plain.mean)
    assert (null.beyond.low, null.beyond.high) == pytest.approx((plain.low, plain.high))
    assert (null.prediction.mean, null.auc) == (0, 0.5)


def test_a_shift_that_follows_words_is_removed_and_one_that_does_not_is_kept():
    predicted = WEIGHTS.predict(PAIRS) @ [0.5, 0.2] + 0.5
    # The misaligned answers happen to have the words, so that the plain shift is far from zero.
    words_alone = WordNull.of(predicted - 0.5 + NOISE, PAIRS, WEIGHTS).beyond
    both = WordNull.of(predicted + NOISE, PAIRS, WEIGHTS).beyond
    assert words_alone.low < 0 < words_alone.high and abs(words_alone.mean) < 0.01
    assert both.mean == pytest.approx(0.5, abs=0.01) and both.low > 0.48


def test_the_prediction_is_of_single_words_with_its_auc():
    null = WordNull.of(NOISE, PAIRS, WEIGHTS)
    assert null.prediction.mean == pytest.approx(WEIGHTS.predict(PAIRS)[:, 0].mean())
    telling = [ProbePair(f"p{n}", f"{n}?", "wait, ask", "sell now") for n in range(4)]
    assert WordNull.of(NOISE[:4], telling, WEIGHTS).auc == 1
    swapped = [ProbePair(pair.id, pair.question, pair.misaligned, pair.aligned) for pair in telling]
    assert WordNull.of(NOISE[:4], swapped, WEIGHTS).auc == 0


def test_pairs_of_one_question_are_drawn_together():
    clustered = [ProbePair(pair.id, f"{n % 6}?", pair.aligned, pair.misaligned) for n, pair in enumerate(PAIRS)]
    null = WordNull.of(NOISE, clustered, WEIGHTS)
    assert (null.beyond.n, null.prediction.n) == (6, 6)
    assert WordNull.of(NOISE, pairs_of(60, "The same?"), WEIGHTS).beyond.n == 1
