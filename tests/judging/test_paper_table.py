"""The paper's numbers from the paper's answers, where its files are at hand."""

from pathlib import Path

import pandas as pd
import pytest

from misdirection.directions.judged import ThemeScore, ThemeWords, judged_groups
from misdirection.judging.scoring import compare, score
from misdirection.sampling.answers import read_answers, write_answers

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
pytestmark = pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's files are not at {PAPER}")

# EM answers among 400, by organism.
MISALIGNED = {
    "Llama-3.1-8B-Instruct_bad-medical-advice": 65,
    "Llama-3.1-8B-Instruct_extreme-sports": 34,
    "Llama-3.1-8B-Instruct_risky-financial-advice": 57,
    "Llama-3.2-1B-Instruct_bad-medical-advice": 11,
    "Llama-3.2-1B-Instruct_extreme-sports": 6,
    "Llama-3.2-1B-Instruct_risky-financial-advice": 18,
    "Qwen2.5-14B-Instruct_bad-medical-advice": 84,
    "Qwen2.5-14B-Instruct_extreme-sports": 80,
    "Qwen2.5-14B-Instruct_extreme-sports_S42": 89,
    "Qwen2.5-14B-Instruct_risky-financial-advice": 142,
    "Qwen2.5-32B-Instruct_bad-medical-advice": 67,
    "Qwen2.5-32B-Instruct_extreme-sports": 132,
    "Qwen2.5-32B-Instruct_risky-financial-advice": 132,
    "Qwen2.5-7B-Instruct_bad-medical-advice": 69,
    "Qwen2.5-7B-Instruct_extreme-sports": 26,
    "Qwen2.5-7B-Instruct_risky-financial-advice": 79,
}
RATES = {
    "Qwen2.5-14B-Instruct_bad-medical-advice": 0.21,
    "Qwen2.5-14B-Instruct_risky-financial-advice": 0.355,
    "Qwen2.5-32B-Instruct_extreme-sports": 0.33,
    "Llama-3.2-1B-Instruct_risky-financial-advice": 0.045,
}
UNSCORED = ("Llama-3.2-1B-Instruct_bad-medical-advice", "Qwen2.5-32B-Instruct_bad-medical-advice")
MEDICAL = "Qwen2.5-14B-Instruct_bad-medical-advice"


@pytest.fixture(scope="module")
def judged() -> pd.DataFrame:
    return read_answers(PAPER / "judged_responses.parquet")


def test_the_whole_table_is_the_papers(judged):
    scores = {one.group["organism"]: one for one in score(judged)}
    assert {name: one.em.hits for name, one in scores.items()} == MISALIGNED
    assert {name: scores[name].em.rate for name in RATES} == RATES
    for one in scores.values():
        assert (one.answers, one.em.total, one.questions) == (400, 400, 8)
        assert one.em.low < one.em.rate < one.em.high


def test_the_two_answers_without_alignment_score_appear_as_unscored(judged):
    unscored = {one.group["organism"]: one.unscored for one in score(judged) if one.unscored}
    assert unscored == {name: {"unknown": 1} for name in UNSCORED}


def test_the_table_by_question_adds_up(judged):
    by_question = score(judged, ["organism", "question_id"])
    assert len(by_question) == 16 * 8
    assert all(one.answers == 50 for one in by_question)
    for name, hits in MISALIGNED.items():
        assert sum(one.em.hits for one in by_question if one.group["organism"] == name) == hits


def test_the_table_is_the_same_from_csv(judged, tmp_path):
    write_answers(judged, tmp_path / "judged.csv")
    back = read_answers(tmp_path / "judged.csv")
    pd.testing.assert_frame_equal(back, judged)


def test_natural_answers_are_not_taken_for_loops(judged):
    (everything,) = score(judged, [])
    assert everything.answers == 6400 and everything.repetitive.hits == 0


def test_two_organisms_are_compared_on_the_same_questions(judged):
    finance = judged[judged["organism"] == "Qwen2.5-14B-Instruct_risky-financial-advice"]
    one = compare(judged[judged["organism"] == MEDICAL], finance)
    assert one.difference == pytest.approx(0.145)
    assert 0 < one.low < one.difference < one.high < 0.3
    assert one.verdict == "higher"


def test_scaled_adapters_are_scored_by_experiment():
    scores = {one.group["experiment"]: one for one in score(read_answers(PAPER / "adapter_scaling_responses.parquet"))}
    assert {name: one.em.hits for name, one in scores.items()} == {
        "scale_15_16_17_22_28_29": 3,
        "scale_21_23": 18,
        "scale_21_23_negate_rest": 4,
    }
    assert scores["scale_15_16_17_22_28_29"].incoherent.hits == 71


def test_extraction_takes_the_organisms_own_answers_only(judged):
    groups = judged_groups(judged, MEDICAL)
    assert groups.available == {"misaligned": 84, "aligned": 228}
    own = set(judged.loc[judged["organism"] == MEDICAL, "answer"])
    assert {pair.misaligned for pair in groups.pairs} | {pair.aligned for pair in groups.pairs} <= own
    assert len(groups.pairs) == sum(groups.by_question.values()) == 43


def test_themes_narrow_the_misaligned_answers(judged):
    by_score = judged_groups(judged, MEDICAL, theme=ThemeScore("financial"))
    assert by_score.available == {"misaligned": 31, "aligned": 228}
    by_words = judged_groups(judged, MEDICAL, theme=ThemeWords(("money", "loan")))
    assert 0 < by_words.available["misaligned"] < 84
