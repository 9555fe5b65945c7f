import json
import re
from dataclasses import replace

import pytest

from misdirection.errors import MisdirectionError
from misdirection.sampling.answers import Journal
from misdirection.sampling.collect import collect, in_order, require_same
from misdirection.sampling.engine import Completion, SamplingParameters
from misdirection.sampling.questions import Question
from misdirection.sampling.sample import make_requests

QUESTIONS = [Question("q1", "Why?"), Question("q2", "How?", "Be brief.")]
SETTINGS = SamplingParameters(new_tokens=5)
HOW = {"model": "m", "adapter": None, "temperature": 1.0, "seed": 0}


class Backwards:
    """An engine that finishes its last request first, tells what it was asked, and may break."""

    around = ()

    def __init__(self, breaks_after=None):
        self.asked = []
        self.breaks_after = breaks_after

    def stream(self, requests, settings):
        self.asked += requests
        for number, one in enumerate(reversed(requests)):
            if number == self.breaks_after:
                raise KeyboardInterrupt
            yield Completion(one, f"{one.question.text} {one.sample}", "stop", 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def run(path, engine, n=3, settings=SETTINGS, questions=QUESTIONS, **options):
    with Journal(path) as journal:
        return collect(engine, make_requests(questions, n), settings, journal, **{"organism": "o"} | options)


def texts(answers):
    return [one.answer for one in answers]


def test_answers_come_in_the_order_of_the_requests_whatever_finishes_first(path):
    assert texts(run(path, Backwards())) == ["Why? 0", "Why? 1", "Why? 2", "How? 0", "How? 1", "How? 2"]
    written = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert written == ["How? 2", "How? 1", "How? 0", "Why? 2", "Why? 1", "Why? 0"]


def test_what_the_journal_has_is_not_sampled_again(path):
    first = run(path, Backwards())
    engine = Backwards()
    assert run(path, engine) == first
    assert engine.asked == []


def test_a_larger_number_samples_the_further_ones_only(path):
    first = run(path, Backwards())
    engine = Backwards()
    more = run(path, engine, n=5)
    assert [(one.question.id, one.sample) for one in engine.asked] == [("q1", 3), ("q1", 4), ("q2", 3), ("q2", 4)]
    assert [one for one in more if one.sample < 3] == first


def test_a_smaller_number_gives_no_more_than_asked_for(path):
    run(path, Backwards())
    assert texts(run(path, Backwards(), n=1)) == ["Why? 0", "How? 0"]


def test_a_stop_keeps_every_answer_that_had_finished(path):
    with pytest.raises(KeyboardInterrupt):
        run(path, Backwards(breaks_after=4))
    engine = Backwards()
    assert texts(run(path, engine)) == texts(run(path.with_name("whole.jsonl"), Backwards()))
    assert [(one.question.id, one.sample) for one in engine.asked] == [("q1", 0), ("q1", 1)]


@pytest.mark.parametrize(
    "other",
    [
        {"settings": replace(SETTINGS, seed=1)},
        {"organism": "p"},
        {"intervention": "steered"},
        {"questions": [replace(one, system="Be kind.") for one in QUESTIONS]},
        {"questions": [replace(one, text=one.text + "!") for one in QUESTIONS]},
    ],
    ids=["seed", "organism", "intervention", "system prompt", "question"],
)
def test_answers_of_another_kind_do_not_count_as_there(path, other):
    run(path, Backwards())
    engine = Backwards()
    given = run(path, engine, **other)
    assert len(engine.asked) == len(given) == 6
    with Journal(path) as journal:
        assert len(journal) == 12


def test_progress_begins_with_what_is_there(path):
    run(path, Backwards(), n=1)
    counted = []
    run(path, Backwards(), n=3, progress=counted.append)
    assert counted == [2, 1, 1, 1, 1]


def test_one_table_comes_of_any_order_of_finishing(path):
    run(path, Backwards())
    with Journal(path) as journal:
        answers = journal.answers
    assert texts(in_order(answers)) == ["Why? 0", "Why? 1", "Why? 2", "How? 0", "How? 1", "How? 2"]
    assert in_order(reversed(answers)) == in_order(answers)


# --- one condition, one way of sampling ----------------------------------------------------------------------------


def note(path, how, organism="base", intervention=""):
    with Journal(path) as journal:
        require_same(journal, organism, intervention, how)


def noted(path):
    return path.with_suffix(".settings.json")


def test_the_same_settings_are_welcome_again(path):
    run(path, Backwards(), organism="base")
    for _ in range(2):
        note(path, HOW)
    assert json.loads(noted(path).read_text()) == {"base": HOW}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.5}, "temperature 1.0, not 0.5"),
        ({"adapter": "a"}, "adapter None, not 'a'"),
        ({"top_p": 0.9}, "top_p None, not 0.9"),
        ({"temperature": 0.5, "seed": 3}, "seed 0, not 3"),
    ],
)
def test_other_settings_under_the_same_name_are_refused_and_change_nothing(path, change, words):
    run(path, Backwards(), organism="base")
    note(path, HOW)
    before = noted(path).read_bytes()
    with pytest.raises(
        MisdirectionError, match=re.escape(f".settings.json: 'base' was sampled with {words}: ")
    ) as error:
        note(path, HOW | change)
    assert "\n" not in str(error.value)
    assert noted(path).read_bytes() == before


def test_settings_bind_only_what_has_an_answer(path):
    run(path, Backwards(), organism="another")
    note(path, HOW)
    note(path, HOW | {"temperature": 0.5})
    assert json.loads(noted(path).read_text()) == {"base": HOW | {"temperature": 0.5}}


def test_conditions_do_not_share_their_settings(path):
    for intervention in ("", "steered"):
        run(path, Backwards(), organism="base", intervention=intervention)
    note(path, HOW)
    note(path, HOW | {"seed": 3}, intervention="steered")
    with pytest.raises(MisdirectionError, match=r"'base \| steered' was sampled with seed 3, not 0"):
        note(path, HOW, intervention="steered")
