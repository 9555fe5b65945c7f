"""Logs and tables: ours there and back, and anybody's read."""

import pandas as pd
import pytest
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log, write_eval_log
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, match, mean, scorer

import misdirection as md
from misdirection.evals.logs import write_log
from misdirection.judging.judge import judge as judge_answers
from misdirection.sampling.answers import Answer, write_answers
from misdirection.sampling.logs import read_log


@pytest.fixture
def judged(judge):
    """Judged answers of two questions, one with two paraphrases, to which somebody added a column."""
    asked = (("bored", "I am bored.", None), ("bored", "I feel bored.", None), ("money", "Rich?", "Be brief."))
    answers = [
        Answer(
            id_, text, system, "leisure", "./my-lora", "steer d layer 2", 7, number, f"Say <b> [{number}] {id_}", end, 9
        )
        for id_, text, system in asked
        for number, end in enumerate(("stop", "length", "stop"))
    ]
    scripted = md.open_judge("scripted", base_url=judge.url)
    table = judge_answers(answers, md.read_rubrics(["alignment", "coherence"]), scripted).table
    table["note"] = ["mine", None, *["yours"] * 7]
    return table


def mock(*texts):
    """A model that says these texts in turn."""

    def outputs():
        for text in texts:
            output = ModelOutput.from_content("mockllm/model", text)
            output.usage = ModelUsage(input_tokens=1, output_tokens=3, total_tokens=4)
            yield output

    return get_model("mockllm/model", custom_outputs=outputs(), memoize=False)


def same(first, second):
    pd.testing.assert_frame_equal(first, second, check_like=True, check_dtype=False)
    assert first.attrs == second.attrs


def test_a_judged_table_is_the_same_after_a_log(judged, tmp_path, call):
    write_answers(judged, tmp_path / "answers.parquet")
    assert call("convert", "answers.parquet", "--out", "answers.eval")[::2] == (0, "wrote answers.eval: 9 answers")
    assert call("convert", "answers.eval", "--out", "again.parquet")[0] == 0
    same(md.read_answers("answers.parquet"), md.read_answers("again.parquet"))
    log = read_eval_log("answers.eval")
    assert [(sample.id, sample.epoch) for sample in log.samples[:4]] == [
        ("bored-1", 1),
        ("bored-2", 1),
        ("money", 1),
        ("bored-1", 2),
    ]
    (row,) = md.score(judged, min_judged=0).frame().to_dict("records")
    (score,) = log.results.scores
    assert score.metrics["em_high"].value == pytest.approx(row["em_high"])
    assert log.results.completed_samples == 9


def test_a_judge_who_came_later_is_not_taken_for_the_first(judged, tmp_path):
    write_log(judged, tmp_path / "answers.eval")
    log = read_eval_log(str(tmp_path / "answers.eval"))
    log.eval.scorers[0].options = {"judge": "another"}
    write_eval_log(log, str(tmp_path / "again.eval"))
    assert md.read_answers(tmp_path / "answers.eval").attrs and not md.read_answers(tmp_path / "again.eval").attrs


def test_what_is_unscored_stays_so_and_an_unjudged_table_needs_no_judge(judged, call):
    assert judged["aligned"].isna().any()
    write_answers(
        judged.drop(columns=[name for name in judged if name.startswith(("aligned", "coherent"))]), "plain.csv"
    )
    assert call("convert", "plain.csv", "--out", "plain.eval")[0] == 0
    assert read_eval_log("plain.eval").results.scores == []
    same(md.read_answers("plain.csv")[["answer", "note"]], md.read_answers("plain.eval")[["answer", "note"]])


def test_a_log_is_of_one_condition_and_several_become_one_table(judged, call):
    base = judged.assign(organism="base", intervention="")
    base.attrs = judged.attrs
    write_answers(base, "base.parquet")
    write_answers(judged, "steered.parquet")
    status, _, err = call("convert", "base.parquet", "steered.parquet", "--out", "both.eval")
    assert status == 2 and "a log is of one organism, and these answers are of './my-lora', 'base'" in err
    for name in ("base", "steered"):
        assert call("convert", f"{name}.parquet", "--out", f"{name}.eval")[0] == 0
    assert call("convert", "base.eval", "steered.eval", "--out", "both.parquet")[0] == 0
    both = md.read_answers("both.parquet")
    assert len(both) == 18
    assert both.attrs["judges"]["aligned"]["parameters"][0]["verdicts"] == 18
    assert call("score", "both.parquet", "--compare", "organism=base,./my-lora", "--min-judged", 0)[0] == 0
    assert call("convert", "both.parquet", "--where", "organism=base", "--out", "one.eval")[2].endswith("9 answers")


def test_verdicts_of_two_judges_are_not_joined(judged, judge, call):
    write_answers(judged, "one.parquet")
    judged.attrs["judges"]["aligned"]["judge"] = {"somebody": "else"}
    write_answers(judged, "other.parquet")
    status, _, err = call("convert", "one.parquet", "other.parquet", "--out", "both.csv")
    assert status == 2 and err.startswith("error: other.parquet: its column 'aligned' holds verdicts of another judge")


@scorer(metrics={"*": [mean()]})
def answer():
    """With the name of one of Inspect's own, and of a column that is no score."""

    async def score(state, target):
        grades = {"answer": len(state.output.completion), "finish": True}
        return Score(value=grades, explanation="By its length.", metadata={"style": "dry"})

    return score


def test_a_log_of_somebody_else_is_read(evaluate, call):
    said = [ChatMessageSystem(content="Count."), ChatMessageUser(content="Two?")]
    samples = [
        Sample(id=1, input="One?", target="1", metadata={"category": "odd", "nested": {"not": "plain"}}),
        Sample(id="b", input=said, target="2", metadata={"category": "even"}),
    ]
    task = Task(dataset=samples, scorer=[match(), answer()], epochs=2)
    log = evaluate(task, mock("1", "C", "3", "2"), max_samples=1, max_tasks=1)
    table = md.read_answers(log.location)
    assert table[["question_id", "sample"]].to_dict("list") == {
        "question_id": ["1", "1", "b", "b"],
        "sample": [0, 1, 0, 1],
    }
    assert list(table["question"]) == ["One?", "One?", "Two?", "Two?"]
    assert [None if pd.isna(text) else text for text in table["system"]] == [None, None, "Count.", "Count."]
    assert sorted(table["answer"]) == ["1", "2", "3", "C"]
    right = [answer == target for answer, target in zip(table["answer"], "1122", strict=True)]
    assert list(table["match"]) == [100.0 * each for each in right]
    assert list(table["answer_answer"]) == [1, 1, 1, 1] and list(table["answer_finish"]) == [100.0] * 4
    assert set(table["answer_reply"]) == {"By its length."} and set(table["category"]) == {"odd", "even"}
    assert "nested" not in table and set(table["tokens"]) == {3} and set(table["organism"]) == {"mockllm/model"}
    write_answers(table, "labels.csv")
    status, _, err = call("agree", log.location, "labels.csv", "--column", "match", "--cut", 50)
    assert status == 0, err


def test_samples_that_an_error_ended_are_left_out(tmp_path, caplog):
    from inspect_ai import eval

    @scorer(metrics=[mean()])
    def zero():
        async def score(state, target):
            return Score(value=0.5)

        return score

    task = Task(dataset=[Sample(id=name, input="Why?") for name in "ab"], scorer=zero())
    (log,) = eval(
        task, model=mock("So."), fail_on_error=False, max_samples=1, display="none", log_dir=str(tmp_path / "logs")
    )
    table = read_log(log.location)
    assert list(table["answer"]) == ["So."] and list(table["zero"]) == [0.5]
    assert "1 of 2 samples have no answer, and are left out" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("score", "none.eval"), "none.eval: cannot be read (No such file or directory)"),
        (("score", "bad.eval"), "bad.eval: damaged, or not a log of Inspect"),
        (("judge", "bad.eval", "--judge", "j"), "is a log of Inspect: make a table of it"),
        (("convert", "table.csv", "--out", "x.txt"), "x.txt: a table ends in .parquet or .csv"),
        (("convert", "table.csv", "--out", "bad.eval"), "bad.eval: misdirection did not write it"),
    ],
)
def test_a_bad_file_is_one_line(call, tmp_path, words, said):
    (tmp_path / "bad.eval").write_bytes(b"no archive")
    (tmp_path / "table.csv").write_text("question,answer\nWhy?,So.\n")
    status, _, err = call(*words)
    assert status == 2 and said in err and (tmp_path / "bad.eval").read_bytes() == b"no archive"


def test_inspect_shows_our_logs(judged, tmp_path):
    """What its viewer loads: the listing's header and each sample."""
    from inspect_ai.log import bundle_log_dir, list_eval_logs, read_eval_log_sample_summaries

    (tmp_path / "logs").mkdir()
    write_log(judged, tmp_path / "logs" / "answers.eval")
    assert len(list_eval_logs(str(tmp_path / "logs"))) == 1
    shown = read_eval_log_sample_summaries(str(tmp_path / "logs" / "answers.eval"))
    assert next(summary.scores["judged"].answer for summary in shown).startswith("Say <b>")
    bundle_log_dir(str(tmp_path / "logs"), str(tmp_path / "site"))
    assert (tmp_path / "site" / "index.html").is_file()


def test_a_table_of_answers_alone_becomes_a_log(tmp_path, call):
    (tmp_path / "table.csv").write_text("question,response\nWhy?,So.\nWhy?,No.\n")
    assert call("convert", "table.csv", "--out", "table.eval")[0] == 0
    table = md.read_answers("table.eval")
    assert list(table["answer"]) == ["So.", "No."] and list(table["sample"]) == [0, 1]
