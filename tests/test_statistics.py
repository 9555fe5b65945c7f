import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from misdirection.statistics.comparisons import benjamini_hochberg, holm, significant
from misdirection.statistics.curves import auc, rank_auc
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.judge_errors import Confusion, lang_reiczigel, prediction_powered, rogan_gladen
from misdirection.statistics.means import beyond, bootstrap, simultaneous
from misdirection.statistics.rates import Counts, newcombe, rate_change, wilson
from misdirection.statistics.resampling import RESAMPLES, one_more, p_value, percentiles, resample

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


def test_an_estimate_is_written_with_its_count_and_p_value():
    p = 2 / (RESAMPLES + 1)
    assert bootstrap([1.0, 1.0]).as_dict() == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2, "p": p}


def test_the_bootstrap_is_that_of_numbers_drawn_by_hand():
    drawn = VALUES[np.random.default_rng(7).integers(0, 40, size=(RESAMPLES, 40))].mean(axis=1)
    one = bootstrap(VALUES, seed=7)
    assert (resample(np.mean, VALUES, seed=7) == drawn).all()
    assert [one.low, one.high] == np.quantile(drawn, [0.025, 0.975]).tolist()


def test_columns_are_drawn_together_and_a_statistic_may_have_dimensions():
    def slopes(x, y, axis):
        return np.stack([(x * y).sum(axis) / (x * x).sum(axis), x.sum(axis) - x.sum(axis)])

    draws = resample(slopes, VALUES, 2 * VALUES, resamples=100)
    assert draws.shape == (2, 100)
    assert draws[0] == pytest.approx(2) and not draws[1].any()


def test_one_draw_at_a_time_is_the_same_as_all_at_once():
    numbers = np.arange(40)
    by_one = resample(lambda drawn: VALUES[drawn].mean(), numbers, resamples=50, vectorized=False)
    assert by_one == pytest.approx(resample(np.mean, VALUES, resamples=50), abs=1e-12)


def test_draws_without_a_figure_are_left_out():
    draws = resample(lambda drawn: np.nan if 3 in drawn else drawn.mean(), np.arange(5), vectorized=False)
    low, high = percentiles(draws)
    assert np.isnan(draws).any() and 0 <= low < 1 and 2.5 < high <= 4


def test_a_single_question_has_no_width_and_proves_nothing():
    one = bootstrap([2.5])
    assert (one.low, one.high, one.n, one.p) == (2.5, 2.5, 1, 1.0)
    assert (resample(lambda drawn: 3.0, [9], resamples=4, vectorized=False) == 3).all()


# --- several values of a question, and what is beyond predictors ---

CLUSTERS = np.repeat([f"question {number:02}" for number in range(12)], [1, 2, 3, 4] * 3)
"""The question of each of 30 values."""


def drawn_by_hand(statistic, *columns, seed=0):
    """A statistic of 4,000 draws of whole questions."""
    rows = [np.flatnonzero(name == CLUSTERS) for name in np.unique(CLUSTERS)]
    draws = np.random.default_rng(seed).integers(0, 12, size=(RESAMPLES, 12))
    taken = [np.concatenate([rows[number] for number in draw]) for draw in draws]
    return np.array([statistic(*(column[numbers] for column in columns)) for numbers in taken])


def fit(values, predictors):
    """The constant by numpy."""
    return np.linalg.lstsq(np.column_stack([np.ones(len(values)), predictors]), values, rcond=None)[0][0]


def test_values_of_one_question_are_drawn_together():
    values = VALUES[:30]
    one, draws = bootstrap(values, CLUSTERS), drawn_by_hand(np.mean, values)
    assert one.mean == pytest.approx(values.mean()) and one.n == 12
    assert [one.low, one.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
    assert one.p == pytest.approx(p_value(draws))


def test_the_same_value_again_narrows_nothing():
    names = [f"question {number:02}" for number in range(40)]
    thrice = bootstrap(np.repeat(VALUES, 3), np.repeat(names, 3))
    assert thrice.as_dict() == pytest.approx(bootstrap(VALUES).as_dict())
    assert bootstrap(VALUES, names) == bootstrap(VALUES)


def test_columns_of_clustered_pairs_are_averaged_first():
    draws = np.stack([VALUES[:30] - 2, VALUES[:30] + 2], -1)
    assert bootstrap(draws, CLUSTERS).as_dict() == pytest.approx(bootstrap(VALUES[:30], CLUSTERS).as_dict())


def test_neither_the_order_of_the_pairs_nor_the_names_of_the_questions_matter():
    order = np.random.default_rng(1).permutation(30)
    predictors = np.random.default_rng(2).normal(size=(30, 2))
    one, other = (beyond(VALUES[rows], predictors[rows], CLUSTERS[rows]) for rows in (np.arange(30), order))
    assert one.as_dict() == pytest.approx(other.as_dict())


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_what_is_beyond_predictors_is_the_constant_of_least_squares(size):
    predictors = size * np.random.default_rng(2).normal([0.5, -2], 1, (30, 2))
    values = VALUES[:30] + predictors @ [0.3 / size, 0.1 / size]
    one, draws = beyond(values, predictors, CLUSTERS), drawn_by_hand(fit, values, predictors)
    assert one.mean == pytest.approx(fit(values, predictors))
    assert [one.low, one.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
    assert one.p == pytest.approx(p_value(draws)) and one.n == 12


def test_an_effect_of_predictors_is_taken_out_and_any_other_is_left():
    predictors = np.random.default_rng(2).normal([1.0, 2.0], 1, (200, 2))
    noise = np.random.default_rng(3).normal(0, 0.1, 200)
    planted = beyond(predictors @ [0.5, 0.25] + noise, predictors)
    assert bootstrap(predictors @ [0.5, 0.25] + noise).low > 0.9
    assert planted.low < 0 < planted.high and planted.p > 0.05 and planted.n == 200
    assert beyond(predictors @ [0.5, 0.25] + 0.3 + noise, predictors).mean == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.0, -1e9])
def test_a_predictor_that_does_not_vary_explains_nothing(constant):
    varying = np.random.default_rng(2).normal(size=40)
    alone = beyond(VALUES, np.full((40, 1), constant))
    assert alone.as_dict() == pytest.approx(bootstrap(VALUES).as_dict())
    both = beyond(VALUES, np.column_stack([varying, np.full(40, constant)]))
    assert both.as_dict() == pytest.approx(beyond(VALUES, varying[:, None]).as_dict())


def test_two_predictors_that_say_the_same_explain_as_much_as_one():
    varying = np.random.default_rng(2).normal(1, 1, 40)
    twice = beyond(VALUES, np.column_stack([varying, 2 * varying]))
    assert twice.as_dict() == pytest.approx(beyond(VALUES, varying[:, None]).as_dict())


def test_draws_in_which_predictors_do_not_vary_have_the_plain_mean():
    # Most draws of three questions of which two are alike have no two different predictors, or two points only.
    one = beyond([1.0, 2.0, 4.0], [[0.1], [0.1], [1.1]])
    assert one.mean == pytest.approx(1.5 - 0.1 * 2.5)
    assert one.low == pytest.approx(4 - 1.1 * 3, abs=0.3) and one.high == 4


@pytest.mark.parametrize("questions", [None, ["the same"]])
def test_one_pair_has_its_own_value_and_proves_nothing(questions):
    one = beyond([2.5], [[3.0, -1.0]], questions)
    assert (one.mean, one.low, one.high, one.n, one.p) == (2.5, 2.5, 2.5, 1, 1.0)


def test_pairs_of_one_question_alone_have_no_width():
    predictors = np.arange(6.0)[:, None]
    one = beyond(2 + 3 * predictors[:, 0], predictors, ["the same"] * 6)
    assert (one.mean, one.low, one.high) == pytest.approx((2, 2, 2)) and (one.n, one.p) == (1, 1.0)
    assert bootstrap(VALUES, ["the same"] * 40).p == 1


# --- p-values ---


def test_a_p_value_is_below_a_twentieth_where_the_interval_excludes_zero():
    rng = np.random.default_rng(0)
    for shift in np.linspace(0, 1, 60):
        one = bootstrap(rng.normal(shift, 1, 20))
        assert (one.p < 0.05) == (one.low > 0 or one.high < 0)


def test_p_values_of_nothing_are_spread_over_all_values():
    rng = np.random.default_rng(0)
    found = np.array([bootstrap(rng.normal(0, 1, 40)).p for _ in range(300)])
    assert np.quantile(found, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.1)
    assert (found < 0.05).mean() == pytest.approx(0.06, abs=0.03)


def test_p_values_are_two_sided_and_never_zero():
    assert p_value([1, 2, 3]) == p_value([-1, -2, -3]) == 0.5
    assert p_value([0, 0, 0]) == 1
    assert p_value(np.arange(1, 1000)) == 2 / 1000


def test_corrections_are_those_of_the_books():
    # Holm 1979, and Benjamini and Hochberg 1995, on the fifteen p-values of the latter's example.
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324]
    values += [0.4262, 0.5719, 0.6528, 0.759, 1.0]
    assert sum(p < 0.05 for p in holm(values)) == 3
    assert sum(p < 0.05 for p in benjamini_hochberg(values)) == 4
    assert holm(values)[:4] == pytest.approx([0.0015, 0.0056, 0.0247, 0.114])
    assert benjamini_hochberg(values)[:4] == pytest.approx([0.0015, 0.003, 0.0095, 0.035625])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_corrections_keep_the_order_and_leave_one_alone(correct):
    assert correct([]) == [] and correct([0.03]) == [0.03]
    assert correct([0.9, 0.8]) == pytest.approx([0.9 if correct is benjamini_hochberg else 1.0] * 2, abs=0.1)
    assert correct([0.5, 0.001, 0.2])[1] == pytest.approx(0.003)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_no_correction_and_bonferronis(values):
    for p, corrected in zip(values, holm(values), strict=True):
        assert p <= corrected <= min(1, p * len(values)) + 1e-12


def test_estimates_are_significant_after_correction():
    estimates = [bootstrap(VALUES), bootstrap(VALUES - VALUES.mean()), Estimate(1, 1, 1, 9)]
    assert significant(estimates) == [True, False, False]
    few = [Estimate(1, 0.1, 2, 9, p) for p in (0.01, 0.02, 0.03)]
    assert significant(few) == [True, True, True]
    assert significant(few + few) == [False] * 6 and all(significant(few + few, benjamini_hochberg))


# --- rates ---


def counts(hits, totals):
    return Counts(np.array(hits), np.array(totals))


def test_wilsons_interval_is_that_of_the_formula():
    z, hits, total = norm.ppf(0.975), 7, 50
    share = hits / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / (1 + z**2 / total)
    assert wilson(hits, total) == pytest.approx((centre - half, centre + half))


def test_one_question_has_wilsons_interval():
    one = counts([7], [50]).rate()
    assert (one.low, one.high) == wilson(7, 50)


def test_several_questions_have_the_interval_of_the_question_bootstrap():
    # Half of the questions are always misaligned: 80 answers, but only 8 independent things.
    one = counts([10, 0] * 4, [10] * 8).rate()
    low, high = wilson(40, 80)
    assert one.rate == 0.5
    assert one.low < low - 0.05 and one.high > high + 0.05
    assert one.high - one.low == pytest.approx(2 * 1.96 * (0.25 / 8) ** 0.5, rel=0.12)


def test_a_rate_of_nothing_is_not_certain():
    one = counts([0] * 8, [50] * 8).rate()
    assert one.low == 0 and one.high == pytest.approx(wilson(0, 400)[1])


def test_questions_with_more_answers_weigh_more():
    assert counts([90, 0], [90, 10]).rate().rate == 0.9


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_interval_contains_its_rate_and_is_between_0_and_1(values):
    hits, misses = np.array(values).T
    one = Counts(hits, hits + misses).rate()
    if (hits + misses).sum() == 0:
        assert one is None
    else:
        assert 0 <= one.low <= one.rate <= one.high <= 1


def test_newcombes_interval_is_that_of_his_paper():
    # Newcombe 1998, table II: 56/70 against 48/80, method 10 gives 0.0524 to 0.3339.
    assert newcombe((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(("before", "after"), [((48, 80), (56, 70)), ((56, 70), (48, 80)), ((0, 9), (4, 9))])
def test_a_changes_p_value_is_the_level_from_which_newcombes_interval_holds_zero(before, after):
    # One question: nothing but Newcombe's interval has a width.
    p = rate_change(counts([before[0]], [before[1]]), counts([after[0]], [after[1]])).p
    low, high = newcombe(before, after, 1 - p)
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6) and 0 < p < 0.06


def test_a_change_of_nothing_has_the_p_value_one():
    assert rate_change(counts([3, 3], [9, 9]), counts([3, 3], [9, 9])).p == 1


# --- areas under curves ---


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


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_both_ways_to_an_auc_agree(values):
    scores, positive = (np.array(column) for column in zip(*values, strict=True))
    found = rank_auc(scores, positive)
    if positive.all() or not positive.any():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(auc(scores[positive], scores[~positive]), abs=1e-12)


# --- several figures at once ----------------------------------------------------------------------------------------


def test_intervals_of_several_columns_hold_all_at_once():
    random = np.random.default_rng(0)
    missed = {"all": 0, "first": 0}
    for _ in range(200):
        found = simultaneous({str(column): random.normal(size=40) for column in range(6)})
        outside = [not estimate.low <= 0 <= estimate.high for estimate in found.values()]
        missed["all"] += any(outside)
        missed["first"] += outside[0]
    # 5% of 200 is 10; each interval by itself misses far less often.
    assert missed["all"] <= 24 and missed["first"] <= 8


def test_one_column_alone_has_its_own_interval():
    values = np.random.default_rng(1).normal(0.3, size=60)
    (found,) = simultaneous({"only": values}).values()
    alone = bootstrap(values)
    assert (found.mean, found.n) == (pytest.approx(alone.mean), 60)
    assert (found.low, found.high) == (pytest.approx(alone.low, abs=0.03), pytest.approx(alone.high, abs=0.03))
    assert found.p == pytest.approx(alone.p, abs=0.02)


def test_a_column_counts_more_where_others_stand_beside_it():
    values = np.random.default_rng(2).normal(size=(9, 40))
    values[0] += 0.5
    alone, among = simultaneous({"0": values[0]})["0"], simultaneous(dict(zip("012345678", values, strict=True)))["0"]
    assert among.low < alone.low and among.p > alone.p
    # The same column again is no further trial.
    assert simultaneous({"a": values[0], "b": values[0]})["a"] == alone


def test_columns_that_do_not_vary_are_points():
    found = simultaneous({"same": [0.5] * 8, "zero": [0.0] * 8, "varies": range(8)})
    assert (found["same"].low, found["same"].high) == (0.5, 0.5) and found["same"].p < 0.001
    assert (found["zero"].low, found["zero"].high, found["zero"].p) == (0.0, 0.0, 1.0)
    assert simultaneous({}) == {}
    assert simultaneous({"one": [0.4]})["one"].p == 1.0


# --- one more draw ------------------------------------------------------------------------------------------------


def test_the_bounds_of_one_more_draw_are_students():
    # Mean 1, deviation 1, and the quantile of two degrees of freedom.
    low, high = one_more([0, 1, 2])
    assert [low, high] == pytest.approx([1 - 4.302653 * (4 / 3) ** 0.5, 1 + 4.302653 * (4 / 3) ** 0.5])


def test_one_more_draw_falls_within_its_bounds_as_often_as_said():
    draws = np.random.default_rng(0).normal(3, 2, (4000, 7))
    bounds = [one_more(row[:6]) for row in draws]
    inside = [low <= row[6] <= high for (low, high), row in zip(bounds, draws, strict=True)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)


# --- rates by a judge that errs -----------------------------------------------------------------------------------


def arrays(*columns):
    return [np.array(column) for column in columns]


def judged_counts(rng, rates, answers, sensitivity=0.8, specificity=0.9):
    """A question's answers by judge and reference: both, the judge only, the reference only, neither."""
    bad = rng.binomial(answers, rates)
    seen, alarms = rng.binomial(bad, sensitivity), rng.binomial(answers - bad, 1 - specificity)
    return seen, alarms, bad - seen, answers - bad - alarms


def share_inside(estimates, rate):
    return np.mean([estimate.low <= rate <= estimate.high for estimate in estimates])


def test_rogan_and_gladens_rate_is_the_closed_form():
    # Sensitivity 8 / 10, specificity 18 / 20, measured 9 / 30: (0.3 + 0.9 - 1) / (0.8 + 0.9 - 1).
    confusion = Confusion(*arrays([5, 3], [1, 1], [1, 1], [9, 9]))
    one = rogan_gladen(Counts(*arrays([6, 3], [15, 15])), confusion)
    assert one.mean == pytest.approx(2 / 7)
    assert one.low < one.mean < one.high and one.n == 2
    assert confusion.youden().mean == pytest.approx(0.7)


def test_a_judge_without_error_is_not_corrected():
    confusion = Confusion(*arrays([40] * 8, [0] * 8, [0] * 8, [160] * 8))
    one = rogan_gladen(Counts(*arrays([10] * 8, [50] * 8)), confusion)
    assert one.mean == pytest.approx(0.2)


def test_fewer_hits_than_false_ones_give_a_rate_below_zero():
    confusion = Confusion(*arrays([8] * 4, [10] * 4, [2] * 4, [30] * 4))
    assert rogan_gladen(Counts(*arrays([1] * 4, [20] * 4)), confusion).mean == pytest.approx((0.05 - 0.25) / 0.55)


def test_a_reference_of_one_class_gives_no_error_rates():
    assert Confusion(*arrays([0, 0], [1, 2], [0, 0], [9, 8])).youden() is None


def test_questions_of_one_side_only_count_there():
    both = Confusion(*arrays([5, 3, 0], [1, 1, 0], [1, 1, 0], [9, 9, 0]))
    one = rogan_gladen(Counts(*arrays([0, 4, 5], [0, 15, 15])), both)
    assert one.mean == pytest.approx(2 / 7) and one.n == 2


def test_intervals_of_a_corrected_rate_hold_it_as_often_as_they_say():
    rng, estimates = np.random.default_rng(0), []
    for _ in range(100):
        known, asked = rng.beta(2, 6, 12), rng.beta(1.6, 6.4, 12)
        seen, alarms, _, _ = judged_counts(rng, asked, 50)
        confusion = Confusion(*judged_counts(rng, known, 50))
        estimates.append(rogan_gladen(Counts(seen + alarms, np.full(12, 50)), confusion))
    # 95% of 100, with a standard error of 2.2 points.
    assert share_inside(estimates, 0.2) > 0.9
    assert np.mean([estimate.mean for estimate in estimates]) == pytest.approx(0.2, abs=0.015)


def test_lang_and_reiczigels_interval_holds_the_rate_of_independent_answers():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(1000):
        seen, spared = rng.binomial(60, 0.8), rng.binomial(120, 0.9)
        low, high = lang_reiczigel((rng.binomial(200, 0.1 * 0.8 + 0.9 * 0.1), 200), (seen, 60), (spared, 120))
        inside += low <= 0.1 <= high
    assert 930 <= inside <= 985


def test_prediction_powered_inference_is_that_of_the_published_library():
    # ppi-python 0.2.3 of the same answers: 0.3013, 95% 0.194 to 0.409.
    labelled, others = Confusion(*arrays([9], [3], [2], [26])), Counts(*arrays([70], [200]))
    one = prediction_powered(labelled, others)
    assert one.mean == pytest.approx(0.3013, abs=5e-4)
    assert (one.low, one.high) == (pytest.approx(0.194, abs=0.01), pytest.approx(0.409, abs=0.01))


def test_a_perfect_judge_counts_for_all_answers_and_a_useless_one_for_none():
    others = Counts(*arrays([8, 20], [40, 40]))
    perfect = prediction_powered(Confusion(*arrays([2, 5], [0, 0], [0, 0], [8, 5])), others)
    # The judge's own rate among the others, by the weight of PPI++: 40 others to 10 labelled.
    assert perfect.mean == pytest.approx(35 / 100)
    useless = prediction_powered(Confusion(*arrays([2, 1], [3, 4], [2, 1], [3, 4])), others)
    assert useless.mean == pytest.approx((4 / 10 + 2 / 10) / 2)


def test_a_few_labels_without_a_hit_do_not_prove_that_there_is_none():
    one = prediction_powered(
        Confusion(*arrays([0] * 4, [0] * 4, [0] * 4, [10] * 4)), Counts(*arrays([0] * 4, [90] * 4))
    )
    assert one.mean == 0 and one.high > 0.02


def test_intervals_of_prediction_powered_rates_hold_them_and_are_narrower_than_of_labels_alone():
    rng, estimates, alone = np.random.default_rng(2), [], []
    for _ in range(80):
        rates = rng.beta(4, 16, 10)
        labelled = Confusion(*judged_counts(rng, rates, 12, 0.95, 0.98))
        seen, alarms, _, _ = judged_counts(rng, rates, 60, 0.95, 0.98)
        estimates.append(prediction_powered(labelled, Counts(seen + alarms, np.full(10, 60))))
        alone.append(prediction_powered(labelled, Counts(np.zeros(10, int), np.zeros(10, int))))
    assert share_inside(estimates, 0.2) > 0.9
    widths = [np.mean([estimate.high - estimate.low for estimate in each]) for each in (estimates, alone)]
    assert widths[0] < 0.95 * widths[1]
