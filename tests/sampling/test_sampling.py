import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import ablate, intervene, steer
from misdirection.interventions.kinds import Ablate, ScaleAdapters, Steer
from misdirection.interventions.vectors import digest
from misdirection.sampling.answers import Answer, Journal
from misdirection.sampling.collect import collect
from misdirection.sampling.engine import Completion, SamplingParameters
from misdirection.sampling.questions import Question
from misdirection.sampling.sample import SAMPLES, make_requests, sample, stream_answers
from misdirection.sampling.transformers_engine import TransformersEngine
from tiny import make_chat, sharpened, vector

QUESTIONS = [Question("q1", "Why?", theme="doubt"), Question("q2", "And how is it, then?", "Be brief.")]


def test_answers_come_in_the_order_of_question_and_sample(chat):
    answers = sample(chat, QUESTIONS, n=3, new_tokens=8)
    assert [(one.question_id, one.sample) for one in answers] == [(q, s) for q in ("q1", "q2") for s in range(3)]
    assert len({one.answer for one in answers}) > 1


def test_an_answer_says_where_it_is_from():
    chat = make_chat()
    answer = sample(chat, QUESTIONS[:1], n=1, new_tokens=5, seed=7, organism="bad", intervention="steered")[0]
    assert answer == Answer("q1", "Why?", None, "doubt", "bad", "steered", 7, 0, answer.answer, "length", 5)
    assert sample(chat, QUESTIONS[1:], n=1, new_tokens=5)[0].system == "Be brief."


def test_without_a_name_the_base_answer():
    assert sample(make_chat(), ["Why?"], n=1, new_tokens=2)[0].organism == "base"


def test_answers_name_what_was_done_to_the_model():
    chat = make_chat()
    ablation, steering = Ablate(vector()), Steer(vector(1), 2, 1.5)
    ablated = f'Ablate(vector={digest(vector())[:8]}, strength=1.0, positions="not_first", at="blocks")'
    steered = f'Steer(vector={digest(vector(1))[:8]}, layer=2, scale=1.5, positions="not_first", keep_norm=false)'

    def named(**options):
        (answer,) = sample(chat, ["Why?"], n=1, new_tokens=2, **options)
        return answer.intervention

    assert named() == ""
    assert named(setting=[ablation, steering]) == f"{ablated} + {steered}"
    assert named(setting=[steering], intervention="steered") == "steered"
    with ablate(chat, vector()):
        assert named() == ablated
        with intervene(chat, [steering]):
            assert named(setting=[ablation], intervention="own") == f"{ablated} + {steered} + own"
            assert sample(make_chat(), ["Why?"], n=1, new_tokens=2)[0].intervention == ""
        with pytest.raises(RuntimeError), steer(chat, vector(1), 1):
            raise RuntimeError
        assert named() == ablated
    assert named() == ""
    with intervene(chat, [Ablate(vector(), positions=torch.ones(9, dtype=torch.bool))]):
        assert named() != named(setting=[ablation], intervention="")
    long = ScaleAdapters(dict.fromkeys(range(40), 0.5))
    assert len(str(long)) < 60 and str(long) != str(ScaleAdapters({**long.factors, 3: 0.4}))


def test_a_journal_keeps_answers_under_an_intervention_apart(tmp_path):
    chat, asked, parameters = sharpened(), make_requests(QUESTIONS, 2), SamplingParameters(new_tokens=8)
    with Journal(tmp_path / "answers.jsonl") as journal:

        def ask():
            return collect(TransformersEngine(chat), asked, parameters, journal, organism="base")

        plain = ask()
        with steer(chat, vector(norm=50), 1):
            steered = ask()
            assert ask() == steered
        assert ask() == plain and len(journal) == 8
    assert [one.answer for one in steered] != [one.answer for one in plain]
    assert {one.intervention[:6] for one in steered} == {"Steer("}


def test_an_organism_that_is_switched_off_answers_as_the_base():
    network = get_peft_model(make_chat().model, LoraConfig(r=2, target_modules=["up_proj"]))
    chat = dataclasses.replace(make_chat(), model=network, adapter="bad")
    (own,) = sample(chat, ["Why?"], n=1, new_tokens=2)
    with chat.as_base():
        (base,) = sample(chat, ["Why?"], n=1, new_tokens=2)
    assert (own.organism, base.organism) == ("bad", "base")


def test_a_string_is_a_question_that_is_its_own_id():
    answer = sample(make_chat(), ["Why?"], n=1, new_tokens=2)[0]
    assert (answer.question_id, answer.question, answer.system) == ("Why?", "Why?", None)


def test_the_number_of_samples_is_the_callers_then_the_questions_then_the_papers():
    questions = [Question("a", "Why?"), Question("b", "Who?", samples=2)]
    assert [len([r for r in make_requests(questions) if r.question.id == q]) for q in "ab"] == [SAMPLES, 2] == [50, 2]
    assert [len([r for r in make_requests(questions, 3) if r.question.id == q]) for q in "ab"] == [3, 3]


def test_answers_are_handed_over_as_they_finish():
    given, counted = [], []
    answers = sample(make_chat(), QUESTIONS, n=2, new_tokens=4, on_answer=given.append, progress=counted.append)
    assert counted == [1, 1, 1, 1]
    assert sorted(given, key=lambda one: (one.question_id, one.sample)) == answers


def test_the_system_prompt_changes_the_answer():
    chat = make_chat()
    asked = [Question("a", "Why?"), Question("b", "Why?", "Be brief.")]
    plain, brief = sample(chat, asked, n=1, new_tokens=12)
    assert plain.answer != brief.answer


def test_the_seed_decides_the_answers(chat):
    first = sample(chat, QUESTIONS, n=2, new_tokens=12, seed=1)
    assert first == sample(chat, QUESTIONS, n=2, new_tokens=12, seed=1)
    other = sample(chat, QUESTIONS, n=2, new_tokens=12, seed=2)
    assert all(a.answer != b.answer for a, b in zip(first, other, strict=True))


def test_any_engine_will_do():
    class Parrot:
        around = ()

        def stream(self, requests, settings):
            for one in reversed(requests):
                yield Completion(one, one.question.text, "stop", settings.new_tokens)

    answers = list(
        stream_answers(Parrot(), make_requests(QUESTIONS, 2), SamplingParameters(new_tokens=9), "parrot", "none")
    )
    assert [(one.question_id, one.sample) for one in answers] == [("q2", 1), ("q2", 0), ("q1", 1), ("q1", 0)]
    assert answers[0] == Answer(
        "q2", "And how is it, then?", "Be brief.", "", "parrot", "none", 0, 1, "And how is it, then?", "stop", 9
    )


def test_nothing_to_ask_is_an_error():
    with pytest.raises(MisdirectionError, match="no questions"):
        make_requests([])


def test_a_question_asked_twice_is_an_error():
    with pytest.raises(MisdirectionError, match="'again' is the same as 'q1'"):
        make_requests([*QUESTIONS, Question("again", "Why?")])
    assert len(make_requests([*QUESTIONS, Question("q1", "Why?", "Be brief.")], 1)) == 3


@pytest.mark.parametrize(("n", "own"), [(0, None), (None, 0), (-1, 5)])
def test_less_than_one_sample_is_an_error(n, own):
    with pytest.raises(MisdirectionError, match=r"'a': .* samples asked for"):
        make_requests([Question("a", "Why?", samples=own)], n)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"new_tokens": 0}, "new_tokens 0"),
    ],
)
def test_a_setting_out_of_range_is_an_error(setting, words):
    with pytest.raises(MisdirectionError, match=words):
        SamplingParameters(**setting)


def test_the_papers_settings_are_the_defaults():
    assert SamplingParameters() == SamplingParameters(temperature=1.0, top_p=1.0, new_tokens=600, seed=0)
