"""What word counts predict: exact weights on a small example, and its score of probe pairs."""

import math

import numpy as np
import pytest

from misdirection.data import ProbePair
from misdirection.data.words import SIZES, WordWeights

# Words: 3 against 2, of three kinds. Neighbours: 2 against 1, of three kinds.
WEIGHTS = WordWeights.fit(["Sell all.", "Sell"], ["sell, SLOWLY"])
SELL = math.log(3 / 6) - math.log(2 / 5)
ALL = math.log(2 / 6) - math.log(1 / 5)
SLOWLY = math.log(1 / 6) - math.log(2 / 5)


def pair(aligned, misaligned):
    return ProbePair("p", "Why?", aligned=aligned, misaligned=misaligned)


def test_weights_are_log_odds_with_one_added_to_every_count():
    singles, neighbours = WEIGHTS.weights
    assert singles == pytest.approx({"all": ALL, "sell": SELL, "slowly": SLOWLY})
    # One pair of neighbours on each side, of two kinds.
    assert neighbours == pytest.approx({"sell all": math.log(2 / 3) - math.log(1 / 3), "sell slowly": -math.log(2)})


def test_a_prediction_is_the_difference_of_mean_weights():
    assert SIZES == (1, 2)
    predictions = WEIGHTS.predict([pair("sell slowly", "sell all, all"), pair("what?", "all")])
    assert predictions == pytest.approx(
        np.array([[(SELL + 2 * ALL) / 3 - (SELL + SLOWLY) / 2, math.log(2) / 2 + math.log(2)], [ALL, 0.0]])
    )


def test_an_unknown_word_weighs_nothing_and_an_answer_without_words_neither():
    assert WEIGHTS.score("buy") == WEIGHTS.score("...") == WEIGHTS.score("all", size=2) == 0
    assert WEIGHTS.score("all buy") == pytest.approx(ALL / 2)


def test_an_apostrophe_is_part_of_a_word():
    singles = WordWeights.fit(["Don't, we’ll 'see'"], []).weights[0]
    assert set(singles) == {"don't", "we’ll", "see"}


def test_the_same_words_on_both_sides_predict_nothing():
    weights = WordWeights.fit(["a b", "c"], ["c", "a b"])
    assert not weights.predict([pair("a", "b c")]).any()
    assert weights.predict([]).shape == (0, 2)


def test_neither_the_order_of_the_answers_nor_capitals_matter():
    assert WordWeights.fit(["SELL", "sell all"], ["slowly", "sell"]) == WordWeights.fit(
        ["sell ALL", "sell"], ["Sell", "slowly"]
    )
    assert WordWeights.fit([], []).score("sell") == 0
