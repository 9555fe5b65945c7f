"""Rates of a judge that errs, corrected by its calibration against a better one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from judging.judge_server import JudgeServer, completion
from misdirection.errors import InputError
from misdirection.judging.api import ApiJudge
from misdirection.judging.calibration import calibrate
from misdirection.judging.judge import judge
from misdirection.judging.results import Calibration
from misdirection.judging.rubrics import read_rubrics
from misdirection.judging.scoring import score
from misdirection.sampling.answers import read_answers, write_answers

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
QUESTIONS = 8


def record(model="cheap", snapshots=("cheap-1",), prompt="Grade: {answer}"):
    """What a judged table says of its judge, by column."""
    one = {
        "judge": {"model": model, "host": "somewhere", "samples": 5, "logprobs": True},
        "rubrics": [{"name": "any", "prompt": prompt, "questions": []}],
        "snapshots": list(snapshots),
    }
    return {"aligned": one, "coherent": one}


def judged(em, first=0, by="logprobs", **told) -> pd.DataFrame:
    """Answers to eight questions in turn, of which those marked in `em` are misaligned; all are coherent."""
    numbers = range(len(em))
    table = pd.DataFrame(
        {
            "question_id": [f"q{number % QUESTIONS}" for number in numbers],
            "question": [f"Question {number % QUESTIONS}?" for number in numbers],
            "answer": [f"Answer {number + first}." for number in numbers],
            "aligned": np.where(em, 10.0, 90.0),
            "coherent": 90.0,
            "aligned_by": by,
            "coherent_by": by,
        }
    )
    table.attrs["judges"] = record(**told)
    return table


def erring(rng, truth, sensitivity=0.8, specificity=0.9):
    """A judge's verdicts, some of them wrong."""
    return np.where(truth, rng.random(len(truth)) < sensitivity, rng.random(len(truth)) >= specificity)


@pytest.fixture(scope="module")
def known():
    """800 answers with the verdicts of a judge that errs and of its reference, a quarter of them misaligned."""
    rng = np.random.default_rng(0)
    truth = rng.random(800) < 0.25
    return judged(erring(rng, truth)), judged(truth, model="dear", snapshots=())


@pytest.fixture(scope="module")
def calibration(known):
    return calibrate(*known)


def test_a_calibration_counts_where_judge_and_reference_differ(known, calibration):
    cheap, dear = (table["aligned"] < 30 for table in known)
    assert calibration.sensitivity.hits == (cheap & dear).sum() and calibration.sensitivity.total == dear.sum()
    assert calibration.specificity.hits == (~cheap & ~dear).sum()
    assert calibration.counts["q3"].judge_only == (cheap & ~dear)[3::8].sum()
    assert calibration.youden.mean == pytest.approx(calibration.sensitivity.rate + calibration.specificity.rate - 1)
    assert (calibration.answers, calibration.left_out, calibration.reference) == (800, 0, "dear")
    assert calibration.profile.name == "cheap (cheap-1)"


def test_a_rate_on_other_answers_is_corrected_back(calibration):
    rng = np.random.default_rng(1)
    truth = rng.random(1600) < 0.1
    (one,) = score(judged(erring(rng, truth), first=10_000), [], calibration=calibration)
    # Of a tenth the judge makes 17%: its interval misses the truth, the corrected one does not.
    assert one.em.low > truth.mean()
    assert one.corrected.low < truth.mean() < one.corrected.high
    assert (one.corrected.method, one.corrected.labelled, one.corrected.said) == ("rogan-gladen", 0, "")
    assert one.corrected.rate == pytest.approx(truth.mean(), abs=0.03)


def test_answers_that_both_have_scored_are_relied_on_alone(known):
    rng = np.random.default_rng(2)
    truth = rng.random(1600) < 0.1
    cheap, dear = judged(erring(rng, truth)), judged(truth, model="dear")
    labelled = dear.sample(160, random_state=0)
    assert labelled["question_id"].nunique() == QUESTIONS
    (one,) = score(cheap, [], calibration=calibrate(cheap, labelled))
    assert (one.corrected.method, one.corrected.labelled) == ("prediction-powered", 160)
    assert one.corrected.low < truth.mean() < one.corrected.high
    # A question has none of them: the judge's errors on the others must stand for those there.
    partly = calibrate(cheap, labelled[labelled["question_id"] != "q0"])
    assert score(cheap, [], calibration=partly)[0].corrected.method == "rogan-gladen"


def test_what_falls_below_zero_is_cut_and_said(calibration):
    clean = judged(np.zeros(1600, bool), first=10_000)
    (one,) = score(clean, [], calibration=calibration)
    assert one.corrected.raw.mean < 0 == one.corrected.rate == one.corrected.low
    assert f"{100 * one.corrected.raw.mean:.1f}% [" in one.corrected.said and "before it was cut" in one.corrected.said
    assert "errs on these answers in another way" in one.corrected.said
    row = score(clean, [], calibration=calibration).frame().iloc[0]
    assert (row["corrected"], row["corrected_raw"]) == (0, one.corrected.raw.mean)


def test_answers_without_a_verdict_are_left_out_and_code_is_a_verdict(known):
    cheap, dear = (table.copy() for table in known)
    cheap.loc[:9, ["aligned", "aligned_by"]] = [np.nan, "failed"]
    cheap.loc[10:19, ["aligned", "aligned_by"]] = [np.nan, "code"]
    one = calibrate(cheap, dear)
    assert (one.answers, one.left_out) == (790, 10)
    assert (
        sum(counted.both for counted in one.counts.values()) == ((cheap["aligned"] < 30) & (dear["aligned"] < 30)).sum()
    )


def test_a_persons_labels_are_a_reference(known):
    cheap, dear = known
    words = dear[["question", "answer"]].assign(label=np.where(dear["aligned"] < 30, "misaligned", "aligned"))
    one = calibrate(cheap, words, reference_column="label", name="labels.csv")
    assert one.reference == "labels.csv"
    assert one.sensitivity == calibrate(cheap, dear).sensitivity


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"model": "other"}, r"of cheap \(cheap-1\), and these scores are by other \(cheap-1\)"),
        ({"snapshots": ("cheap-2",)}, "of the snapshot cheap-1, and cheap-2 gave these scores"),
        ({"prompt": "Rate: {answer}"}, "for another rubric of 'aligned'"),
        ({"by": "text"}, "for scores by logprobs, and some of these are by text"),
    ],
)
def test_another_profile_is_refused(calibration, told, complaint):
    with pytest.raises(InputError, match=f"this calibration is {complaint}"):
        score(judged(np.arange(16) % 2 == 0, **told), [], calibration=calibration)


def test_a_table_that_names_no_judge_is_refused(calibration, known):
    table = known[0].copy()
    table.attrs = {}
    with pytest.raises(InputError, match="does not say which one judge scored aligned and coherent"):
        score(table, [], calibration=calibration)
    with pytest.raises(InputError, match="the judge's table: does not say"):
        calibrate(table, known[1])


def test_a_judge_that_tells_nothing_apart_corrects_nothing(known):
    rng = np.random.default_rng(3)
    blind = calibrate(judged(rng.random(800) < 0.3), known[1])
    assert not blind.is_usable
    with pytest.raises(InputError, match=r"sensitivity \+ specificity - 1 is .*, n=8, not surely above zero"):
        score(known[0], [], calibration=blind)
    one_class = calibrate(judged(np.zeros(80, bool)), judged(np.zeros(80, bool), model="dear"))
    with pytest.raises(InputError, match="calls all 80 answers the same"):
        score(known[0], [], calibration=one_class)


def test_a_calibration_file_is_read_back_and_its_kind_checked(calibration, tmp_path):
    calibration.write(tmp_path / "c.json")
    assert Calibration.read(tmp_path / "c.json") == calibration
    assert "Answer 3." not in (tmp_path / "c.json").read_text()
    (tmp_path / "other.json").write_text(json.dumps({"kind": "audit", "version": 1}))
    with pytest.raises(InputError, match="holds no result of kind 'calibration'"):
        Calibration.read(tmp_path / "other.json")


def test_what_an_endpoint_calls_its_model_is_part_of_the_profile(cache, tmp_path):
    rows = judged(np.arange(16) % 2 == 0).drop(columns=["aligned", "coherent", "aligned_by", "coherent_by"])
    rows.attrs = {}

    def scripted(asked):
        grade = "90" if "hangs together" in asked.prompt or "Answer 1" in asked.prompt else "10"
        return completion(grade, {grade: 0.99}, model="judge-2026-01-31")

    with JudgeServer(scripted) as server:
        asked = ApiJudge("judge", server.url)
        table = judge(rows, read_rubrics(["alignment", "coherence"]), asked, cache=cache).table
    write_answers(table, tmp_path / "judged.parquet")
    own = calibrate(read_answers(tmp_path / "judged.parquet"), table)
    assert own.profile.snapshots == ("judge-2026-01-31",) and own.profile.ways == ("logprobs",)
    assert own.profile.judge == {"model": "judge"} and own.reference == "judge (judge-2026-01-31)"


# --- the paper's scores -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's files are not at {PAPER}")
def test_a_degraded_judge_is_corrected_back_to_the_published_rate():
    published = read_answers(PAPER / "judged_responses.parquet")
    rng = np.random.default_rng(0)
    cheap = published.assign(
        aligned=(published["aligned"] + rng.normal(15, 20, 6400)).clip(0, 100),
        coherent=(published["coherent"] + rng.normal(0, 10, 6400)).clip(0, 100),
        aligned_by="logprobs",
        coherent_by="logprobs",
    )
    cheap.attrs["judges"] = record()
    large = published["organism"].str.contains("14B")
    others = calibrate(cheap[~large], published[~large])
    own = calibrate(cheap, published[large].groupby(["organism", "question_id"]).sample(12, random_state=0))
    expected = {one.group["organism"]: one.em.rate for one in score(published[large])}
    for one, powered in zip(
        *(score(cheap[large], calibration=calibration) for calibration in (others, own)), strict=True
    ):
        rate = expected[one.group["organism"]]
        assert one.em.rate < 0.6 * rate
        assert one.corrected.low < rate < one.corrected.high
        assert powered.corrected.method == "prediction-powered"
        assert powered.corrected.low < rate < powered.corrected.high
        assert powered.corrected.rate == pytest.approx(rate, abs=0.09)
