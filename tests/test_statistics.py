import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from misdirection.statistics import auc, bootstrap

VALUES = np.random.default_rng(5).normal(3, 1, 40)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_interval_contains_the_mean_and_stays_within_the_values(values):
    one = bootstrap(values)
    assert one.low - 1e-9 <= one.mean <= one.high + 1e-9
    assert min(values) - 1e-9 <= one.low
    assert one.high <= max(values) + 1e-9
    assert one.mean == pytest.approx(np.mean(values), abs=1e-9)


def test_the_interval_has_the_width_of_the_standard_error():
    one = bootstrap(VALUES)
    assert one.high - one.low == pytest.approx(2 * 1.96 * VALUES.std() / 40**0.5, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    assert bootstrap(VALUES) == bootstrap(VALUES)
    assert bootstrap(VALUES, seed=1) != bootstrap(VALUES, seed=2)


def test_draws_are_averaged_within_a_question_and_do_not_count_as_data():
    draws = np.stack([VALUES - 2, VALUES + 2], -1)
    one, two = bootstrap(VALUES), bootstrap(draws)
    assert (one.n, two.n) == (40, 40)
    assert [two.mean, two.low, two.high] == pytest.approx([one.mean, one.low, one.high])


def test_more_draws_of_the_same_questions_narrow_nothing():
    many = bootstrap(np.tile(VALUES[:, None], 50))
    assert many.high - many.low == pytest.approx(bootstrap(VALUES).high - bootstrap(VALUES).low)


def test_an_estimate_is_written_with_its_count():
    assert bootstrap([1.0, 1.0]).as_dict() == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


@pytest.mark.parametrize(
    ("misaligned", "aligned", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([0, 2, 4], [1, 3], 0.5),
        ([2, 4], [1, 3], 0.75),
    ],
)
def test_auc_is_the_share_of_pairs_in_which_the_misaligned_answer_is_likelier(misaligned, aligned, expected):
    assert auc(misaligned, aligned) == pytest.approx(expected)
    assert auc(np.array(misaligned), np.array(aligned)) == pytest.approx(expected)
