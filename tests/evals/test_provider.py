"""Our models as a provider of Inspect's: what they say is what `sample` says."""

import asyncio

import pytest
from inspect_ai import Task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    get_model,
)
from inspect_ai.solver import generate, user_message

import misdirection as md
from misdirection.data import Turn
from misdirection.directions.direction import Direction, Origin
from misdirection.interventions.vectors import random_like
from misdirection.models.chat import encode
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine

QUESTIONS = ("Why?", "How do I get rich?", "Who are you?")


@pytest.fixture
def direction(tiny, tmp_path):
    """A planted direction of the tiny model, strong enough to change what it says."""
    import torch

    vectors = torch.stack([5 * random_like(torch.ones(tiny.width), layer) for layer in range(len(tiny.layers))])
    origin = Origin("data_difference", tiny.name, None, "", "0", {}, {}, "float32")
    Direction(vectors, origin).save(tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def ours(folder, **options):
    return get_model(f"misdirection/{folder}", dtype="float32", device="cpu", memoize=False, **options)


def ask(model, messages, **config):
    return asyncio.run(model.generate(messages, config=GenerateConfig(**config)))


def asked(questions=QUESTIONS):
    return Task(dataset=[Sample(input=question) for question in questions], solver=generate())


def test_answers_are_those_of_sample_whatever_is_asked_beside_them(evaluate, tiny, tiny_folder):
    log = evaluate(asked(), ours(tiny_folder), epochs=3, seed=5, temperature=0.8, top_p=0.9, max_tokens=9)
    said = {(sample.input, sample.epoch - 1): sample.output.completion for sample in log.samples}
    expected = md.sample(tiny, QUESTIONS, n=3, seed=5, temperature=0.8, top_p=0.9, new_tokens=9)
    assert said == {(answer.question, answer.sample): answer.answer for answer in expected}
    assert len(set(said.values())) > 6


def test_a_steered_and_an_ablated_model_say_what_intervene_has_them_say(evaluate, tiny, tiny_folder, direction):
    vector = Direction.load(direction)[2]
    greedy = {"temperature": 0, "max_tokens": 9}
    settings = {"steered": ({"scale": 2}, md.Steer(vector, 2, 2.0)), "ablated": ({}, md.Ablate(vector))}
    said = {}
    for name, (options, intervention) in settings.items():
        model = ours(tiny_folder, direction=str(direction), layer=2, **options)
        log = evaluate(asked(), model, **greedy)
        said[name] = [sample.output.completion for sample in log.samples]
        with md.intervene(tiny, [intervention]):
            expected = md.sample(tiny, QUESTIONS, n=1, temperature=0, new_tokens=9)
        assert said[name] == [answer.answer for answer in expected]
        table = md.read_answers(log.location)
        assert set(table["intervention"]) == {
            "steer direction layer 2 not_first scale 2" if options else "ablate direction layer 2 not_first"
        }
    plain = [answer.answer for answer in md.sample(tiny, QUESTIONS, n=1, temperature=0, new_tokens=9)]
    assert len({tuple(plain), *map(tuple, said.values())}) == 3


def test_a_system_prompt_and_earlier_turns_are_in_the_prompt(tiny, tiny_folder):
    history = (Turn("user", "Hi."), Turn("assistant", "Hello."))
    question = Question("q", "Why?", "Be brief.", history=history)
    messages = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content="Hi."),
        ChatMessageAssistant(content="Hello."),
        ChatMessageUser(content="Why?"),
    ]
    output = ask(ours(tiny_folder), messages, seed=1, max_tokens=12)
    (expected,) = TransformersEngine(tiny).stream(
        [SamplingRequest(question, 0)], SamplingParameters(new_tokens=12, seed=1)
    )
    assert output.completion == expected.text
    assert output.usage.input_tokens == encode(tiny.tokenizer, "Why?", "x", "Be brief.", history).start
    (alone,) = TransformersEngine(tiny).stream(
        [SamplingRequest(Question("q", "Why?"), 0)], SamplingParameters(new_tokens=12, seed=1)
    )
    assert alone.text != expected.text


def test_the_same_question_twice_in_a_sample_has_two_answers(evaluate, tiny_folder):
    twice = Task(dataset=[Sample(input="Why?")], solver=[generate(), user_message("Why?"), generate()])
    log = evaluate(twice, ours(tiny_folder), max_tokens=8)
    assert len({message.text for message in log.samples[0].messages if message.role == "assistant"}) == 2
    model = ours(tiny_folder)
    assert len({ask(model, "Why?", max_tokens=8).completion for _ in range(3)}) == 3


def test_an_answer_ends_at_a_stop_and_without_it(tiny_folder):
    whole = ask(ours(tiny_folder), "Why?", temperature=0, max_tokens=30)
    place = 7
    stop = whole.completion[place : place + 2]
    first = whole.completion.find(stop)
    cut = ask(ours(tiny_folder), "Why?", temperature=0, max_tokens=30, stop_seqs=["\x00never", stop])
    assert (cut.completion, cut.stop_reason) == (whole.completion[:first].strip(), "stop")
    assert whole.stop_reason == "max_tokens" and cut.usage.output_tokens < whole.usage.output_tokens


def test_a_prompt_beyond_the_context_is_told_apart_and_the_answer_never_is_beyond_it(tiny_folder):
    assert ask(ours(tiny_folder), "x" * 600).stop_reason == "model_length"
    output = ask(ours(tiny_folder), "x" * 450, temperature=0)
    assert output.usage.total_tokens <= 512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 2}, "a layer and a scale go with a direction"),
        ({"layer": 1}, "a layer and a scale go with a direction"),
        ({"direction": "none.safetensors"}, "name the layer"),
        ({"direction": "none.safetensors", "layer": 1}, "none.safetensors: cannot read this direction"),
        ({"scal": 2}, "unknown key 'scal'; did you mean 'scale'?"),
        ({"adapter": "./nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tiny_folder, options, said):
    with pytest.raises(PrerequisiteError, match="error: ") as raised:
        ours(tiny_folder, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_direction_of_another_width_is_refused(tiny, tiny_folder, direction, tmp_path):
    known = Direction.load(direction)
    Direction(known.vectors[:, :16].contiguous(), known.origin).save(tmp_path / "narrow.safetensors")
    with pytest.raises(PrerequisiteError, match=r"not for .*tiny-llama"):
        ours(tiny_folder, direction=str(tmp_path / "narrow.safetensors"), layer=1)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ChatMessageSystem(content="Be brief.")], "without a question"),
        ([ChatMessageUser(content="Hi."), ChatMessageTool(content="42")], "a message of a tool"),
    ],
)
def test_what_it_cannot_answer_is_said(tiny_folder, messages, said):
    with pytest.raises(PrerequisiteError, match=said):
        ask(ours(tiny_folder), messages)
