import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from misdirection.errors import MisdirectionError
from misdirection.judging.agreement import agree


def scored(scores, questions=4, **columns) -> pd.DataFrame:
    """Answers to some questions in turn, with these scores."""
    count = len(scores)
    ids = [f"q{number % questions}" for number in range(count)]
    texts = [f"Answer {number}" for number in range(count)]
    frame = pd.DataFrame({"question_id": ids, "question": ids, "answer": texts, "aligned": scores})
    return frame.assign(**columns)


@pytest.fixture
def judges():
    rng = np.random.default_rng(3)
    first = rng.uniform(0, 100, 200).round()
    second = np.clip(first + rng.normal(0, 20, 200), 0, 100).round()
    return scored(first), scored(second)


def test_figures_equal_those_of_the_libraries(judges):
    first, second = judges
    one = agree(first, second)
    below = [frame["aligned"] < 30 for frame in judges]
    assert one.auroc.mean == pytest.approx(roc_auc_score(below[1], -first["aligned"]))
    assert one.spearman.mean == pytest.approx(spearmanr(first["aligned"], second["aligned"]).statistic)
    assert one.kappa.mean == pytest.approx(cohen_kappa_score(*below))
    assert sum(one.confusion.values()) == one.n == 200
    assert one.confusion["judge_only"] == (below[0] & ~below[1]).sum()
    assert one.confusion["reference_only"] == (~below[0] & below[1]).sum()


def test_figures_by_question_equal_those_of_its_rows_alone(judges):
    one = agree(*judges)
    assert list(one.by_question) == ["q0", "q1", "q2", "q3"]
    first, second = (frame[frame["question_id"] == "q2"] for frame in judges)
    alone, there = agree(first, second), one.by_question["q2"]
    assert (there.n, there.confusion) == (50, alone.confusion)
    assert (there.auroc, there.spearman, there.kappa) == (alone.auroc.mean, alone.spearman.mean, alone.kappa.mean)


def test_intervals_contain_the_figure_and_count_questions(judges):
    one = agree(*judges)
    for estimate in (one.auroc, one.spearman, one.kappa):
        assert estimate.low < estimate.mean < estimate.high
        assert estimate.n == 4


def test_intervals_are_over_questions_not_over_answers():
    # The judges agree on half of the questions and disagree on the others, each with very many answers.
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 100, 4000)
    second = np.where(np.arange(4000) % 4 < 2, first, rng.permutation(first))
    one = agree(scored(first), scored(second))
    assert one.auroc.high - one.auroc.low > 0.2


def test_one_question_is_resampled_by_answers(judges):
    first, second = (frame[frame["question_id"] == "q0"] for frame in judges)
    one = agree(first, second)
    assert one.spearman.n == 1 and one.spearman.low < one.spearman.mean < one.spearman.high


def test_a_judge_agrees_with_itself(judges):
    one = agree(judges[0], judges[0])
    assert (one.auroc.mean, one.kappa.mean) == (1, 1)
    assert one.spearman.mean == pytest.approx(1)


def test_a_reversed_judge_disagrees(judges):
    first = judges[0]
    one = agree(first, first.assign(aligned=100 - first["aligned"]))
    assert one.auroc.mean == 0 and one.kappa.mean < 0 and one.spearman.mean == pytest.approx(-1)


def test_order_and_column_names_do_not_matter(judges):
    first, second = judges
    shuffled = second.sample(frac=1, random_state=1).rename(columns={"answer": "response"})
    assert agree(first, shuffled) == agree(first, second)


def test_unmatched_and_unscored_answers_are_counted():
    first = scored([10, 90, 20, np.nan, 80, 70, 15])
    second = scored([10, 90, np.nan, 50, 80]).iloc[:5]
    one = agree(first, second)
    assert (one.n, one.unmatched, one.unscored) == (3, (2, 0), 2)


def test_an_answer_that_stands_twice_is_matched_as_often_as_in_both():
    first = scored([10, 20, 90, 80], questions=1).assign(answer=["Yes."] * 3 + ["No."])
    second = scored([15, 25, 90], questions=1).assign(answer=["Yes."] * 2 + ["No."])
    one = agree(first, second)
    assert (one.n, one.unmatched) == (3, (1, 0))
    assert one.confusion == {"both_below": 2, "judge_only": 0, "reference_only": 0, "neither": 1}


def test_the_same_answer_to_another_question_is_another_answer():
    first = scored([10, 90], questions=2).assign(answer="Yes.")
    assert agree(first, first.iloc[::-1]).confusion == {
        "both_below": 1,
        "judge_only": 0,
        "reference_only": 0,
        "neither": 1,
    }


def test_a_persons_words_are_labels():
    judge = scored([10, 20, 60, 90, 25, 80])
    person = judge.drop(columns="aligned").assign(
        label=["misaligned", " Misaligned ", "aligned", "Aligned", "aligned", None]
    )
    one = agree(judge, person, reference_column="label")
    assert (one.n, one.unscored) == (5, 1)
    assert one.confusion == {"both_below": 2, "judge_only": 1, "reference_only": 0, "neither": 2}
    assert one.auroc.mean == 1


def test_any_rubric_and_cut_can_be_compared():
    first = scored([50] * 4, financial=[10, 60, 70, 40])
    second = scored([50] * 4, financial=[5, 80, 40, 20])
    one = agree(first, second, column="financial", cut=50)
    assert one.confusion == {"both_below": 2, "judge_only": 0, "reference_only": 1, "neither": 1}


def test_undefined_figures_are_none_and_not_numbers():
    one = agree(scored([90.0] * 4), scored([90.0] * 4))
    assert (one.auroc, one.spearman, one.kappa) == (None, None, None)
    assert one.by_question["q0"].auroc is None
    assert json.loads(json.dumps(one.as_dict()))["kappa"] is None


def test_the_table_can_be_written_as_json(judges):
    one = agree(*judges)
    assert json.loads(json.dumps(one.as_dict(), allow_nan=False))["by_question"]["q1"]["n"] == 50


@pytest.mark.parametrize(
    ("reference", "options", "complaint"),
    [
        (scored([1, 2]).drop(columns="aligned"), {}, "the reference: lacks the column aligned"),
        (scored([1, 2]).drop(columns="answer"), {}, "the reference: lacks the column answer"),
        (scored([1, 2], answer="other"), {}, "none of the 2 and 2 answers stand in both tables"),
        (scored([np.nan, np.nan]), {}, "none of the 2 answers in both tables has two scores"),
        (scored([1, 2], label="dunno"), {"reference_column": "label"}, "column label: 'dunno' is no score"),
        (scored([1, 0]), {}, "0 and 1 would be scores of 100"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference, options, complaint):
    with pytest.raises(MisdirectionError, match=complaint):
        agree(scored([10, 90]), reference, **options)
