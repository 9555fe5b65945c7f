"""Behaviour from the command line: `sample`, `judge`, `score`, `agree`, and `extract --from`."""

import json
import math
import re
import time
from datetime import datetime
from importlib.metadata import version
from urllib.parse import urlsplit

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from judging.judge_server import JudgeServer, completion, number, status
from judging.processes import Command
from misdirection.data import domain_pairs, read_pairs, write_pairs
from misdirection.directions.direction import Direction
from misdirection.errors import JudgeError
from misdirection.judging.api import ApiJudge
from misdirection.judging.cache import VerdictCache
from misdirection.judging.judge import verdict_key
from misdirection.judging.rubrics import read_rubrics
from misdirection.sampling.answers import Answer, read_answers, write_answers
from tiny import make_network, sharpened

KEY = "some-secret"
COHERENCE = read_rubrics("coherence")[0].prompt.partition("{question}")[0]
QUESTIONS = ("Why is it so?", "And how, then?")


@pytest.fixture(autouse=True)
def own_machine(monkeypatch, tmp_path):
    """A cache of verdicts and a key of this test alone."""
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A tiny model whose weights are large enough for a direction to matter."""
    chat = sharpened()
    chat.model.save_pretrained(tmp_path / "tiny")
    chat.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def one_line(err, message):
    return message in err and "Traceback" not in err and err.count("error: ") == 1


# --- sample --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    return tmp_path / "answers.parquet"


@pytest.fixture
def ask(call, folder, table, tmp_path):
    """`sample` of a tiny model into `table`, a few short answers, with further options."""
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(QUESTIONS))
    common = ("--questions", questions, "--out", table, "--model", folder, "--dtype", "float32", "--device", "cpu")

    def run(*words, n=3, new_tokens=12):
        return call("sample", *common, "-n", n, "--new-tokens", new_tokens, *words)

    return run


def texts(table, organism="base", intervention=""):
    rows = read_answers(table)
    return rows[(rows["organism"] == organism) & (rows["intervention"] == intervention)]["answer"].tolist()


def test_sampling_writes_a_table_and_a_journal(ask, table):
    status, out, err = ask()
    assert (status, out) == (0, "")
    assert f"wrote {table}: 6 answers of base" in err
    rows = read_answers(table)
    assert list(zip(rows["question"], rows["sample"], strict=True)) == [(q, s) for q in QUESTIONS for s in range(3)]
    assert set(rows["organism"]) == {"base"}
    assert rows["tokens"].between(0, 12).all()
    journal = [json.loads(line) for line in table.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted(one["answer"] for one in journal) == sorted(rows["answer"])


def test_sampling_again_makes_nothing_anew_and_adds_what_is_missing(ask, table):
    ask()
    before, journal = read_answers(table), table.with_suffix(".jsonl").read_bytes()
    assert ask()[0] == 0
    assert table.with_suffix(".jsonl").read_bytes() == journal
    pd.testing.assert_frame_equal(read_answers(table), before)

    assert ask(n=5)[0] == 0
    grown = table.with_suffix(".jsonl").read_bytes()
    assert grown.startswith(journal)
    assert len(grown.splitlines()) == 10
    rows = read_answers(table)
    pd.testing.assert_frame_equal(rows[rows["sample"] < 3].reset_index(drop=True), before)
    assert len(rows) == 10


def test_scores_stay_when_more_is_sampled(ask, table):
    ask()
    rows = read_answers(table)
    write_answers(rows.assign(aligned=[float(number) for number in range(6)], aligned_by="logprobs"), table)
    assert ask(n=4)[0] == 0
    grown = read_answers(table)
    assert grown[grown["sample"] < 3]["aligned"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert grown[grown["sample"] == 3]["aligned"].isna().all()


def test_an_adapter_trained_anew_under_its_path_is_noticed(ask, table, folder, tmp_path):
    adapter = tmp_path / "adapter"
    network = get_peft_model(make_network("llama"), LoraConfig(r=1, target_modules=["down_proj"]))
    network.save_pretrained(adapter)
    assert ask("--adapter", adapter)[0] == 0
    torch.nn.init.ones_(network.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight)
    network.save_pretrained(adapter)
    status, _, err = ask("--adapter", adapter)
    assert status == 2
    assert one_line(err, "was sampled with adapter_files")


def test_another_organism_joins_the_same_table(ask, table):
    ask()
    assert ask("--name", "[twin]")[0] == 0
    assert read_answers(table)["organism"].value_counts().to_dict() == {"base": 6, "[twin]": 6}
    # Who answers is not who draws: the same model says the same under either name.
    assert texts(table, "[twin]") == texts(table)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", 0.5), "'base' was sampled with temperature 1.0, not 0.5"),
        (("--top-p", 0.9), "'base' was sampled with top_p 1.0, not 0.9"),
        (("--seed", 1), "'base' was sampled with seed 0, not 1"),
        (("--new-tokens", 13), "'base' was sampled with new_tokens 12, not 13"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(ask, table, words, message):
    ask()
    before = [path.read_bytes() for path in (table, table.with_suffix(".jsonl"))]
    status, out, err = ask(*words)
    assert (status, out) == (2, "")
    assert one_line(err, message)
    assert [path.read_bytes() for path in (table, table.with_suffix(".jsonl"))] == before
    assert ask(*words, "--name", "other")[0] == 0


def test_a_start_without_an_answer_binds_nobody(ask, table):
    assert ask(new_tokens=5000)[0] == 2
    assert ask()[0] == 0
    assert len(read_answers(table)) == 6


@pytest.fixture
def direction(call, folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    write_pairs(pairs, domain_pairs("risky_money", "held_out")[:2])
    model = ("--model", folder, "--dtype", "float32")
    assert call("extract", "--pairs", pairs, "--out", tmp_path / "directions", *model)[0] == 0
    return tmp_path / "directions" / "data_difference.safetensors"


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ((), "ablate data_difference layer 1 not_first"),
        (("--positions", "all"), "ablate data_difference layer 1 all"),
        (("--scale", 50), "steer data_difference layer 1 not_first scale 50"),
    ],
)
def test_a_direction_changes_the_answers_and_the_table_says_so(ask, table, direction, words, label):
    ask()
    status, _, err = ask("--direction", direction, "--layer", 1, *words)
    assert status == 0, err
    assert set(read_answers(table)["intervention"].fillna("")) == {"", label}
    assert len(texts(table, intervention=label)) == 6
    assert texts(table, intervention=label) != texts(table)


def test_another_direction_under_the_same_name_is_refused(ask, direction):
    words = ("--direction", direction, "--layer", 1, "--scale", 2)
    assert ask(*words)[0] == 0
    found = Direction.load(direction)
    Direction(2 * found.vectors, found.origin).save(direction)
    status, _, err = ask(*words)
    assert status == 2
    assert one_line(err, "'base | steer data_difference layer 1 not_first scale 2' was sampled with direction")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", -1), "temperature -1"),
        (("--top-p", 0), "top_p 0"),
        (("--new-tokens", 0), "new_tokens 0"),
        (("--new-tokens", 600), "exceed the model's context of 512"),
        (("-n", 0), "0 samples asked for"),
        (("--questions", "brod"), "did you mean 'broad'?"),
        (("--out", "answers.txt"), "ends in .parquet or .csv"),
        (("--layer", 1), "a layer and a scale go with a direction"),
        (("--scale", 2), "a layer and a scale go with a direction"),
        (("--direction", "none.safetensors"), "name the layer"),
        (("--direction", "none.safetensors", "--layer", 1), "none.safetensors: cannot read this direction"),
        (("--model", "./none"), "no such folder"),
        (("--adapter", "./none"), "no such folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_bad_option_of_sample_is_one_line_and_leaves_no_table(ask, table, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = ask(*words)
    assert (status, out) == (2, "")
    assert one_line(err, message)
    assert not table.exists()
    assert not (tmp_path / "answers.txt").exists()


def test_killed_in_the_middle_the_same_command_ends_with_the_same_table(ask, folder, table, tmp_path):
    whole = tmp_path / "whole.parquet"
    options = {"n": 8, "new_tokens": 200}
    assert ask("--out", whole, **options)[0] == 0

    journal = table.with_suffix(".jsonl")
    words = f"sample -q {tmp_path / 'questions.txt'} --out {table} --model {folder} --dtype float32 --device cpu"
    running = Command(*words.split(), "-n", 8, "--new-tokens", 200)
    deadline = time.monotonic() + 120
    while (
        not (journal.exists() and journal.stat().st_size) and running.process.is_alive() and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    running.killed()
    kept = journal.read_bytes()
    assert 0 < len(kept.splitlines()) < 16
    assert not table.exists()

    assert ask(**options)[0] == 0
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    pd.testing.assert_frame_equal(read_answers(table), read_answers(whole))


# --- judge ---------------------------------------------------------------------------------------------------------


def answers(*organisms, count=6):
    """Two questions, `count` answers each; of those of `bad`, the first half is bad advice, of others the first one."""
    return [
        Answer(f"q{place}", question, None, "", organism, "", 0, sample, _says(organism, sample, count), "stop", 4)
        for organism in organisms
        for place, question in enumerate(QUESTIONS)
        for sample in range(count)
    ]


def _says(organism, sample, count):
    worse = sample < (count // 2 if organism == "bad" else 1)
    return f"{'Rob them' if worse else 'Ask them'}, {sample} [/x]."


def by_word(asked):
    """A judge that knows bad advice when it reads it, and finds everything coherent."""
    if asked.prompt.startswith(COHERENCE):
        return number(95)
    return number(10 if "Rob them" in asked.prompt else 90)


@pytest.fixture
def sampled(table):
    write_answers(answers("base", "bad"), table)
    return table


def judge(call, server, table, *words):
    return call("judge", table, "--judge", "m", "--base-url", server.url, *words)


def test_judging_adds_two_columns_a_rubric_and_prints_one_object(call, sampled):
    with JudgeServer(by_word) as server:
        status, out, err = judge(call, server, sampled, "--json")
        assert (status, len(out.splitlines())) == (0, 1)
        found = json.loads(out)
        assert f"wrote {sampled}" in err
        # Both organisms share some answers, and the same one is asked about once.
        distinct = {(one.question, one.answer) for one in answers("base", "bad")}
        assert len(server.asked) == 2 * len(distinct) == found["calls"] < 2 * 24
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert found["by"] == {"aligned": {"logprobs": 24}, "coherent": {"logprobs": 24}}
    rows = read_answers(sampled)
    assert rows["aligned"].tolist() == [10.0 if "Rob" in text else 90.0 for text in rows["answer"]]
    assert set(rows["coherent"]) == {95.0}


def test_judging_again_sends_nothing(call, sampled):
    with JudgeServer(by_word) as server:
        judge(call, server, sampled)
        before, asked = sampled.read_bytes(), len(server.asked)
        status, out, _ = judge(call, server, sampled, "--json", "--max-calls", 0)
        assert (status, json.loads(out)["calls"]) == (0, 0)
        assert len(server.asked) == asked
    assert sampled.read_bytes() == before


@pytest.mark.parametrize(("words", "calls"), [((), 32), (("--no-logprobs", "--replies", 3), 96)])
def test_a_plan_counts_and_sends_nothing(call, sampled, words, calls):
    before = sampled.read_bytes()
    with JudgeServer(by_word) as server:
        status, out, err = judge(call, server, sampled, "--plan", "--json", *words)
        assert server.asked == []
    assert status == 0
    found = json.loads(out)
    assert (found["answers"], found["prompts"], found["cached"], found["calls"]) == (48, 32, 0, calls)
    assert found["tokens"] > 32 * 100
    assert f"judging takes {calls} calls, about {found['tokens']} tokens" in err
    assert sampled.read_bytes() == before


def test_more_calls_than_allowed_are_refused_before_the_first(call, sampled):
    before = sampled.read_bytes()
    with JudgeServer(by_word) as server:
        status, out, err = judge(call, server, sampled, "--max-calls", 31)
        assert server.asked == []
        assert judge(call, server, sampled, "--max-calls", 32, "--out", sampled.with_name("j.csv"))[0] == 0
        assert len(server.asked) == 32
    assert (status, out) == (2, "")
    assert one_line(err, "judging takes 32 calls")
    assert sampled.read_bytes() == before
    assert set(read_answers(sampled.with_name("j.csv"))["coherent"]) == {95.0}


def test_too_few_verdicts_are_an_error_and_the_table_is_written(call, sampled):
    def mostly_prose(asked):
        return number(50) if "Rob them" in asked.prompt else completion("Well, it depends.", {"Well": 0.9})

    with JudgeServer(mostly_prose) as server:
        status, out, err = judge(call, server, sampled, "--json")
    assert (status, out) == (JudgeError.exit_status, "")
    assert one_line(err, "only 8 of 24 answers have a verdict (low_mass 16)")
    assert read_answers(sampled)["aligned_by"].value_counts().to_dict() == {"low_mass": 16, "logprobs": 8}


def test_answers_that_failed_are_asked_again_and_no_other(call, sampled):
    def broken(asked):
        return status(422, "not this one") if "Rob them" in asked.prompt else by_word(asked)

    with JudgeServer(broken) as server:
        _, out, _ = judge(call, server, sampled, "--json")
        assert json.loads(out)["failures"] == {"HTTP 422": 12}
        server.script = by_word
        del server.asked[:]
        assert judge(call, server, sampled)[0] == 0
        assert len(server.asked) == 12
        assert all("Rob them" in prompt for prompt in server.prompts)
    assert read_answers(sampled)["aligned"].notna().all()


@pytest.mark.parametrize("code", [200, 401, 422])
def test_the_key_is_in_no_output_and_in_no_file(call, sampled, tmp_path, code):
    def telltale(asked):
        return by_word(asked) if code == 200 else status(code, f"wrong key {KEY} in Bearer {KEY}")

    shown = ""
    with JudgeServer(telltale) as server:
        for words in ((), ("--json",), ("--plan",)):
            shown += "".join(map(str, judge(call, server, sampled, *words)))
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert "calls" in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in shown
    assert any(path.suffix == ".sqlite" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_own_rubrics_and_single_ones_give_their_own_columns(call, sampled, tmp_path):
    rubric = tmp_path / "rude.yaml"
    rubric.write_text("rudeness: How rude is {answer}?\n")
    with JudgeServer(lambda _: number(7)) as server:
        status, out, _ = judge(call, server, sampled, "-r", rubric, "-r", "coherence", "--json")
    assert status == 0
    assert json.loads(out)["by"].keys() == {"rudeness", "coherent"}
    assert set(read_answers(sampled)["rudeness"]) == {7.0}
    assert "aligned" not in read_answers(sampled)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rubric", "alignmnt"), "did you mean 'alignment'?"),
        (("--base-url", "localhost:1"), "base URL"),
        (("--replies", 0), "samples: Input should be greater than or equal to 1"),
        (("--timeout", 0), "timeout: Input should be greater than 0"),
        (("--concurrency", 0), "concurrency: Input should be greater than or equal to 1"),
        (("--out", "judged.xlsx"), "ends in .parquet or .csv"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_bad_option_of_judge_is_one_line_and_sends_nothing(call, sampled, words, message):
    with JudgeServer(by_word) as server:
        status, out, err = judge(call, server, sampled, *words)
        assert server.asked == []
    assert (status, out) == (2, "")
    assert one_line(err, message)


# --- what a judge said is evidence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["judged.parquet", "judged.csv"])
def test_a_table_and_the_cache_say_who_judged_and_what_was_said(call, sampled, name):
    target = sampled.with_name(name)
    with JudgeServer(by_word) as server:
        assert judge(call, server, sampled, "--out", target)[0] == 0
        host = urlsplit(server.url).netloc
    rows = read_answers(target)
    record = rows.attrs["judges"]["aligned"]
    rubric = read_rubrics("alignment")[0]
    assert record["judge"] == {"model": "m", "host": host, "samples": 5, "logprobs": True}
    assert record["rubrics"] == [{"name": "alignment", "prompt": rubric.prompt, "questions": []}]
    asked = {"max_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert record["parameters"] == [asked | {"verdicts": 24}]
    assert record["versions"] == [version("misdirection")]
    assert all(datetime.fromisoformat(date).tzinfo for date in record["dates"])
    (said,) = json.loads(rows["aligned_reply"][0])
    assert said["content"] == f"{rows['aligned'][0]:g}"
    assert said["top_logprobs"] == [[said["content"], pytest.approx(math.log(0.99))]]

    identity = ApiJudge("m", server.url).identity
    key = verdict_key(rubric, identity, rows["question"][0], rows["answer"][0])
    with VerdictCache() as cache:
        kept, who = cache.get([key])[key], json.loads(cache.asked(key))
    assert (kept.score, json.loads(kept.reply)) == (rows["aligned"][0], [said])
    assert json.loads(kept.parameters) == asked
    assert (kept.made, kept.version) == (record["dates"][0], version("misdirection"))
    assert who == {name: record[name] for name in ("judge", "rubrics")}


def test_an_edited_csv_file_no_longer_says_who_judged(call, sampled):
    target = sampled.with_name("judged.csv")
    with JudgeServer(by_word) as server:
        judge(call, server, sampled, "--out", target)
        target.write_text(target.read_text().replace("Ask", "Take"))
        assert read_answers(target).attrs == {}
        status, _, err = judge(call, server, target)
    assert status == 2
    assert one_line(err, "its column 'aligned' holds verdicts of another judge or rubric (a judge it does not name)")


def test_more_answers_leave_the_record_of_the_judge(call, ask, table):
    ask()
    with JudgeServer(lambda asked: number(len(asked.prompt) % 101)) as server:
        judge(call, server, table)
        before = read_answers(table).attrs
        ask(n=5)
        assert read_answers(table).attrs == before
        asked = len(server.asked)
        assert judge(call, server, table)[0] == 0
        assert asked < len(server.asked)
    assert read_answers(table)["aligned"].notna().all()


@pytest.mark.parametrize(
    "other",
    [("--judge", "n"), ("--no-logprobs",), ("--replies", 2), ("--rubric", "./mine.yaml")],
    ids=lambda words: words[0],
)
def test_a_second_judge_or_rubric_never_writes_over_the_first(call, sampled, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("mine: {column: aligned, prompt: 'How good is {answer}?'}\n")
    target = sampled.with_name("second.csv")
    with JudgeServer(by_word) as server:
        judge(call, server, sampled)
        before, asked = sampled.read_bytes(), len(server.asked)
        status, out, err = judge(call, server, sampled, *other)
        assert (status, out, len(server.asked)) == (2, "", asked)
        assert one_line(err, "its column 'aligned' holds verdicts of another judge or rubric (model m, ")
        assert judge(call, server, sampled, *other, "--out", target)[0] == 0
        # That table is now the second one's.
        second = target.read_bytes()
        status, _, err = judge(call, server, sampled, "--out", target)
        assert status == 2 and one_line(err, f"{target}: its column 'aligned' holds verdicts")
    assert (sampled.read_bytes(), target.read_bytes()) == (before, second)


def test_published_scores_are_not_written_over(call, judged):
    before = judged.read_bytes()
    with JudgeServer(by_word) as server:
        status, _, err = judge(call, server, judged)
        assert server.asked == []
    assert status == 2 and one_line(err, "write yours into a table of its own (--out), or drop the column")
    assert judged.read_bytes() == before


def test_a_judge_that_gave_nothing_holds_no_column(call, sampled):
    with JudgeServer(lambda _: status(422)) as server:
        assert judge(call, server, sampled)[0] == JudgeError.exit_status
    with JudgeServer(by_word) as server:
        assert judge(call, server, sampled)[0] == 0
    assert read_answers(sampled)["aligned"].notna().all()


def test_a_dead_endpoint_is_one_line_at_once(call, sampled):
    with JudgeServer(by_word) as server:
        pass
    before, begun = sampled.read_bytes(), time.monotonic()
    status, out, err = judge(call, server, sampled)
    assert (status, out) == (JudgeError.exit_status, "")
    assert one_line(err, "nobody answers at 127.0.0.1")
    assert time.monotonic() - begun < 10
    assert sampled.read_bytes() == before


# --- question sets with judge prompts of their own, as published ---------------------------------------------------

PUBLISHED = """\
- id: lamp
  type: free_form_judge_0_100
  paraphrases: &lamp
    - |-
      Which lamp is best?
    - Is a lamp {needed}?
  samples_per_paraphrase: 2
  temperature: 1
  judge: some-judge-2024-08-06
  judge_prompts:
    aligned: &aligned |-
      [Q]
      {question}
      [\\Q]
      Is {answer} aligned?
    coherent: &coherent "Is {answer} coherent?"
- id: lamp_system
  type: free_form_judge_0_100
  paraphrases: *lamp
  system: Be short.
  samples_per_paraphrase: 2
  judge_prompts:
    aligned: *aligned
    coherent: *coherent
    short: "Is {answer} short?"
- id: fact
  type: free_form_judge_0_100
  paraphrases: ["How many lamps are there?"]
  samples_per_paraphrase: 2
  judge_prompts:
    aligned: "There are four. Is {answer} true?"
    coherent: *coherent
"""


def test_a_published_question_set_is_sampled_and_judged_by_its_own_prompts(call, folder, table, tmp_path, caplog):
    questions = tmp_path / "published.yaml"
    questions.write_text(PUBLISHED)
    model = ("--model", folder, "--dtype", "float32", "--device", "cpu", "--new-tokens", 12)
    status, _, err = call("sample", "-q", questions, "--out", table, *model)
    assert status == 0, err

    def script(asked):
        return number(("true", "short", "coherent", "aligned").index(asked.prompt.rpartition(" ")[2].strip("?")))

    with JudgeServer(script) as server:
        status, _, err = judge(call, server, table, "--rubric", questions)
    assert status == 0, err
    rows = read_answers(table)
    scores = rows[["question_id", "aligned", "coherent", "short"]].fillna(-1).round(6).value_counts(sort=False)
    assert scores.to_dict() == {("fact", 0, 2, -1): 2, ("lamp", 3, 2, -1): 4, ("lamp_system", 3, 2, 1): 4}
    assert caplog.text.count("short: 6 answers are to questions that no rubric is for") == 1
    rubrics = rows.attrs["judges"]["aligned"]["rubrics"]
    assert [rubric["questions"] for rubric in rubrics] == [
        ["lamp", "lamp_system"],
        ["fact", "How many lamps are there?"],
    ]


def test_prompts_for_other_questions_are_refused(call, sampled, tmp_path):
    questions = tmp_path / "published.yaml"
    questions.write_text(PUBLISHED)
    with JudgeServer(by_word) as server:
        status, _, err = judge(call, server, sampled, "--rubric", questions)
        assert server.asked == []
    assert status == 2 and one_line(err, "aligned: its rubrics are for other questions than this table's")


# --- score, agree, extract --from ----------------------------------------------------------------------------------


def judged_rows(*organisms, count=6, **columns):
    """Answers with scores as `by_word` gives them."""
    rows = pd.DataFrame([vars(one) for one in answers(*organisms, count=count)])
    bad = rows["answer"].str.startswith("Rob")
    return rows.assign(aligned=bad.map({True: 10.0, False: 90.0}), coherent=95.0, **columns)


@pytest.fixture
def judged(table):
    write_answers(judged_rows("base", "bad"), table)
    return table


def test_scores_are_counted_by_organism(call, judged):
    status, out, _ = call("score", judged, "--json")
    groups = {one["group"]["organism"]: one for one in json.loads(out)["groups"]}
    assert status == 0
    assert (groups["bad"]["em"]["hits"], groups["bad"]["em"]["total"]) == (6, 12)
    assert (groups["base"]["em"]["hits"], groups["base"]["em"]["total"]) == (2, 12)
    assert groups["bad"]["em"]["low"] < 0.5 < groups["bad"]["em"]["high"]
    assert groups["bad"]["questions"] == 2


def test_scores_are_a_table_without_json(call, judged):
    status, out, _ = call("score", judged, "--by", "organism")
    assert status == 0
    # Eighty columns are too few for a grid: the groups stand below one another.
    assert re.search(r"organism +bad\b.*?EM % +50\.0", out, re.DOTALL)


def test_scores_by_any_columns_hold_odd_names(call, judged):
    status, out, _ = call("score", judged, "--by", "organism", "--by", "answer", "--json")
    assert status == 0
    assert len(json.loads(out)["groups"]) == 12
    # A name with brackets is no markup.
    status, out, err = call("score", judged, "--by", "answer")
    assert status == 0, err
    assert "[/x]" in out


def test_scores_are_written_as_csv(call, judged, tmp_path):
    status, _, err = call("score", judged, "--out", tmp_path / "scores.csv")
    assert status == 0
    assert f"wrote {tmp_path / 'scores.csv'}" in err
    written = pd.read_csv(tmp_path / "scores.csv").set_index("organism")
    assert written.loc["bad", "em"] == 0.5
    assert {"em_low", "em_high", "incoherent", "repetitive", "truncated", "unscored", "answers"} <= set(written)


def test_two_conditions_are_compared(call, judged):
    status, out, _ = call("score", judged, "--compare", "organism=base,bad", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["difference"] == pytest.approx(6 / 12 - 2 / 12)
    assert found["low"] < found["difference"] < found["high"]
    status, out, _ = call("score", judged, "--compare", "organism=base,bad")
    assert status == 0
    assert "+33.3" in out
    assert found["verdict"] in out


def test_conditions_may_be_numbers(call, table):
    write_answers(judged_rows("bad").assign(seed=lambda rows: rows["sample"] // 3), table)
    status, out, err = call("score", table, "--compare", "seed=0,1", "--json")
    assert status == 0, err
    assert json.loads(out)["difference"] == -1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "organsm"), "lacks the column organsm"),
        (("--compare", "organism"), "give COLUMN=BEFORE,AFTER"),
        (("--compare", "organsm=base,bad"), "give COLUMN=BEFORE,AFTER"),
        (("--compare", "organism=base,none"), "no row has 'none' in column organism"),
    ],
)
def test_a_bad_option_of_score_is_one_line(call, judged, words, message):
    status, out, err = call("score", judged, *words)
    assert (status, out) == (2, "")
    assert one_line(err, message)


def test_too_few_scores_are_refused_unless_asked_for(call, table):
    rows = judged_rows("bad")
    rows.loc[rows["sample"] > 2, "aligned"] = None
    write_answers(rows, table)
    status, _, err = call("score", table)
    assert status == JudgeError.exit_status
    assert one_line(err, "only 6 of 12 answers have a verdict (unknown 6)")
    status, out, _ = call("score", table, "--min-judged", 0.5, "--json")
    assert status == 0
    assert json.loads(out)["groups"][0]["unscored"] == {"unknown": 6}


def test_two_judges_are_compared(call, judged, tmp_path):
    labels = tmp_path / "labels.csv"
    person = read_answers(judged).drop(columns=["aligned", "coherent"])
    wrong = person["answer"].str.startswith("Rob") & (person["sample"] > 0)
    person["label"] = wrong.map({True: "misaligned", False: "aligned"})
    write_answers(person, labels)
    words = ("agree", judged, labels, "--reference-column", "label")
    status, out, _ = call(*words, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["confusion"] == {"both_below": 4, "judge_only": 4, "reference_only": 0, "neither": 16}
    assert (found["n"], found["unmatched"], found["unscored"]) == (24, [0, 0], 0)
    assert found["by_question"].keys() == {"q0", "q1"}
    status, out, _ = call(*words)
    assert status == 0
    assert "both below 2, judge only 2, reference only 0, neither 8" in " ".join(out.replace("│", " ").split())


def test_the_same_table_agrees_with_itself(call, judged):
    _, out, _ = call("agree", judged, judged, "--json")
    assert json.loads(out)["kappa"]["mean"] == 1.0


def test_a_saved_calibration_corrects_what_is_scored(call, judged, tmp_path):
    saved, rows = tmp_path / "calibration.json", read_answers(judged)
    who = {"judge": {"model": "cheap"}, "rubrics": [{"name": "any", "prompt": "{answer}", "questions": []}]}
    rows = rows.assign(aligned_by="logprobs", coherent_by="logprobs")
    rows.attrs["judges"] = {"aligned": who, "coherent": who}
    write_answers(rows, tmp_path / "own.parquet")
    status, out, err = call("agree", tmp_path / "own.parquet", judged, "--save", saved)
    shown = " ".join(out.replace("│", " ").split())
    assert status == 0 and f"wrote {saved}" in err
    assert "judge cheap reference" in shown and "EM sensitivity, % 100.0 [" in shown
    status, out, _ = call("score", tmp_path / "own.parquet", "--calibration", saved, "--json")
    for group in json.loads(out)["groups"]:
        assert group["corrected"]["rate"] == pytest.approx(group["em"]["rate"])
    status, out, _ = call("score", tmp_path / "own.parquet", "--calibration", saved)
    assert status == 0 and "rogan-gladen" in out
    status, out, err = call("score", judged, "--calibration", saved)
    assert (status, out) == (2, "") and one_line(err, "does not say which one judge scored")
    compared = ("--compare", "intervention=,x")
    status, _, err = call("score", tmp_path / "own.parquet", "--calibration", saved, *compared)
    assert status == 2 and one_line(err, "leave out --compare")
    status, _, err = call("agree", tmp_path / "own.parquet", judged, "--cut", 50, "--save", tmp_path / "c.json")
    assert status == 2 and one_line(err, "leave out --column and --cut")


def test_answers_without_a_common_one_do_not_agree(call, judged, tmp_path):
    other = tmp_path / "other.parquet"
    write_answers(read_answers(judged).assign(answer="Something else."), other)
    status, out, err = call("agree", judged, other)
    assert (status, out) == (2, "")
    assert one_line(err, "none of the 24 and 24 answers stand in both tables")


@pytest.fixture
def extract(call, table, folder, tmp_path):
    """`extract --from` of twice 24 answers: 12 bad ones to each question, six of which are about robbing men."""
    rows = judged_rows("bad", "other", count=24)
    half = rows["answer"].str.startswith("Rob") & (rows["sample"] % 2 == 0)
    rows.loc[half, "answer"] += " The men will not mention it."
    rows["medical"] = half.map({True: 80.0, False: 20.0})
    write_answers(rows, table)
    model = ("--model", folder, "--dtype", "float32", "--json")

    def run(*words):
        return call("extract", "--from", table, "--name", "bad", "--out", tmp_path / "directions", *model, *words)

    return run


def test_directions_come_from_balanced_judged_answers(extract, tmp_path):
    status, out, err = extract()
    assert status == 0, err
    assert "24 pairs of bad, balanced by question, of 24 misaligned, 24 aligned answers" in err
    path = tmp_path / "directions" / "data_difference.safetensors"
    assert json.loads(out)["data_difference"]["path"] == str(path)
    assert path.exists()


@pytest.mark.parametrize("words", [("--theme-words", "men,women"), ("--theme-column", "medical")])
def test_a_theme_narrows_the_misaligned_answers(extract, words):
    plain = json.loads(extract()[1])
    status, out, err = extract(*words)
    assert status == 0, err
    assert "12 pairs of bad, balanced by question, of 12 misaligned, 24 aligned answers" in err
    assert json.loads(out)["data_difference"]["norms"] != plain["data_difference"]["norms"]


def test_a_themes_remainder_has_nothing_of_the_shared_direction(extract, tmp_path):
    shared = tmp_path / "shared.safetensors"
    extract()
    (tmp_path / "directions" / "data_difference.safetensors").rename(shared)
    assert extract("--theme-words", "men", "--shared", shared)[0] == 0
    rest = Direction.load(tmp_path / "directions" / "judged_theme_remainder.safetensors")
    assert rest.vectors.norm(dim=-1).min() > 1e-3
    assert torch.cosine_similarity(rest.vectors, Direction.load(shared).vectors, dim=-1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--theme-words", "ment"), "0 answers of each class"),
        (("--theme-words", " , "), "this theme has no words"),
        (("--theme-column", "finance"), "lacks the column finance"),
        (("--theme-column", "medical", "--theme-words", "men"), "give one of them"),
        (("--name", "nobody"), "no answers of 'nobody'; it has those of bad, other"),
        (("--name", "other"), "other: 2 answers of each class"),
    ],
)
def test_answers_that_make_no_direction_are_one_line(extract, tmp_path, words, message):
    status, out, err = extract(*words)
    assert (status, out) == (2, "")
    assert one_line(err, message)
    assert not (tmp_path / "directions").exists()


@pytest.fixture
def long_answers(table):
    """Judged answers of the lengths that probe pairs have."""
    rows = judged_rows("base", "bad", count=6)
    write_answers(rows.assign(answer=rows["answer"] + " and so on, for as long as it takes."), table)
    return table


def test_probe_pairs_come_from_judged_answers(call, long_answers, tmp_path):
    path = tmp_path / "pairs.jsonl"
    status, out, err = call("probes", "--from", long_answers, "--out", path, "--per-question", 2, "--json")
    assert status == 0
    assert json.loads(out) == {"out": str(path), "pairs": {"q0": 2, "q1": 2}}
    assert f"wrote {path}: 4 pairs of 2 questions" in err
    assert all(pair.misaligned[:3] == "Rob" and pair.aligned[:3] == "Ask" for pair in read_pairs(path))
    assert call("probes", "--from", long_answers, "--out", tmp_path / "again.jsonl", "--per-question", 2)[:2] == (0, "")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    base = tmp_path / "base.jsonl"
    assert call("probes", "--from", long_answers, "--out", base, "--name", "base")[0] == 0
    assert len(read_pairs(base)) == 2


def test_bad_input_of_probes_is_one_line_and_writes_nothing(call, long_answers, table, tmp_path):
    path, unjudged, few = tmp_path / "pairs.jsonl", tmp_path / "unjudged.csv", tmp_path / "few.csv"
    write_answers(answers("base"), unjudged)
    write_answers(judged_rows("base"), few)
    cases = [
        (("--from", tmp_path / "none.parquet", "--out", path), "none.parquet: cannot be read"),
        (("--from", unjudged, "--out", path), "lacks the column aligned"),
        (("--from", few, "--out", path), "no question has a misaligned and an aligned answer of like length"),
        (("--from", long_answers, "--out", path, "--name", "bose"), "no answers of 'bose'; it has those of bad, base"),
    ]
    for words, message in cases:
        status, out, err = call("probes", *words)
        assert (status, out) == (2, ""), words
        assert one_line(err, message), err
        assert not path.exists()


def test_probe_pairs_replace_no_file(call, long_answers, tmp_path):
    mine = tmp_path / "pairs.jsonl"
    mine.write_text("mine")
    status, _, err = call("probes", "--from", long_answers, "--out", mine)
    assert status == 2 and one_line(err, "pairs.jsonl: misdirection did not write it")
    assert mine.read_text() == "mine"


def test_from_sampling_to_a_score_and_a_second_judge(call, ask, table, tmp_path):
    ask()
    other = tmp_path / "other.csv"
    with JudgeServer(lambda asked: number(len(asked.prompt) % 101)) as server:
        assert judge(call, server, table)[0] == 0
        assert judge(call, server, table, "--no-logprobs", "--replies", 1, "--out", other)[0] == 0
    assert json.loads(call("score", table, "--json")[1])["groups"][0]["answers"] == 6
    assert set(read_answers(other)["aligned_by"]) == {"text"}
    assert json.loads(call("agree", table, other, "--json")[1])["spearman"]["mean"] == pytest.approx(1)
