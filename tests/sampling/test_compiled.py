"""Sampling with compiled blocks: on a processor inductor's code is C++, and it is really run."""

import json
import logging
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import misdirection as md
from misdirection.errors import InputError
from misdirection.experiment.answering import Asking, Condition
from misdirection.models.chat import encode_prompt
from misdirection.sampling import compiled, row_cache
from misdirection.sampling.config import SamplingConfig
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.samplers import open_sampler
from misdirection.sampling.transformers_engine import TransformersEngine
from misdirection.settings import validate
from tiny import brisk, make_hybrid, sharpened, vector

QUESTIONS = [Question("short", "Why?"), Question("long", "How do you feel about the weather in the mountains, then?")]
STEER, ABLATE = md.Steer(vector(0), 1), md.Ablate(vector(1), positions="answer")
INSIDE = md.Ablate(vector(1), at="writes")
PLAIN, ALL = ((),), ((), (STEER,), (ABLATE,), (ABLATE, STEER))


@pytest.fixture(autouse=True)
def small_room(monkeypatch):
    """Answers outgrow their storage, and the columns of a pass change their number."""
    monkeypatch.setattr(row_cache, "ROOM", 16)


@pytest.fixture
def only_traced(monkeypatch):
    """What is compiled runs as it was traced: no code is made."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


@pytest.fixture(scope="module")
def chat():
    return brisk(sharpened("llama", num_hidden_layers=2))


def run(chat, settings, compile, n=3, rows=5, new_tokens=30):
    """What is answered with at most `rows` rows in a batch; as many rows as heads would be a size of its own."""
    wanted = [
        SamplingRequest(question, number * len(settings) + place, setting)
        for question in QUESTIONS
        for number in range(n)
        for place, setting in enumerate(settings)
    ]
    longest = max(len(encode_prompt(chat.tokenizer, question.text)) for question in QUESTIONS)
    engine = TransformersEngine(chat, budget=rows * (longest + new_tokens), compile=compile)
    done = engine.stream(wanted, SamplingParameters(new_tokens=new_tokens))
    return {(one.request.question.id, one.request.sample): (one.text, one.finish, one.tokens) for one in done}


def both(chat, settings, **options):
    return (run(chat, settings, compile, **options) for compile in (False, True))


def said(caplog):
    """What this package has told the log; torch tells its own traces."""
    return [record.getMessage() for record in caplog.records if record.name == "misdirection"]


def graphs():
    """How many graphs have been compiled so far."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", [PLAIN, ((STEER,),), ALL], ids=["plain", "steered", "mixed"])
def test_answers_are_those_of_uncompiled_blocks(chat, settings, caplog):
    fired = Counter()
    with chat.layers[1].register_forward_hook(lambda _block, _args, output: fired.update(passes=1, rows=len(output))):
        expected, found = both(chat, settings)
    assert found == expected
    assert len({tokens for _, _, tokens in expected.values()}) > 3
    assert fired["rows"] > fired["passes"] > 0
    assert not said(caplog) and graphs() > 0


def test_what_is_compiled_serves_longer_answers_and_other_numbers_of_rows(chat):
    run(chat, PLAIN, True)
    before = graphs()
    expected, found = both(chat, ALL, n=4, rows=7, new_tokens=70)
    assert found == expected and max(tokens for _, _, tokens in found.values()) > 30
    assert graphs() == before


VIEWS = {"slice", "select", "unsqueeze", "view", "reshape", "expand", "transpose", "detach", "as_strided", "alias"}


def operations(chat, compile):
    """How many operations that are no views the host calls in a step, outside of what is compiled."""
    steps = TransformersEngine(chat, compile=compile).steps(
        [SamplingRequest(QUESTIONS[0], number) for number in range(3)], SamplingParameters(new_tokens=30)
    )
    next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        next(steps)
    steps.close()
    outside = (event.name for event in profiled.events() if event.cpu_parent is None)
    return sum(name.startswith("aten::") and name[6:] not in VIEWS for name in outside)


def test_a_compiled_block_costs_the_host_no_operation(chat):
    run(chat, PLAIN, True)
    four = brisk(sharpened("llama", num_hidden_layers=4))
    eager = {network: operations(network, False) for network in (chat, four)}
    assert eager[four] - eager[chat] > 2 * 20
    assert operations(chat, True) == operations(four, True) < eager[chat] - 2 * 20


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_neox"])
def test_families(architecture, only_traced, caplog):
    chat = brisk(sharpened(architecture, num_hidden_layers=3))
    before = graphs()
    expected, found = both(chat, ALL, n=2)
    assert found == expected
    # One for a row alone, and one or two for all else.
    assert graphs() - before <= 3 and not said(caplog)


def test_nothing_is_left_changed(chat):
    run(chat, ALL, True)
    assert not any("forward" in vars(block) for block in chat.layers)
    assert chat.model.config._attn_implementation == "sdpa"
    assert torch._dynamo.eval_frame._stance.stance == "default"


# --- what cannot be compiled ------------------------------------------------------------------------------------------


def asking():
    """A model that asks the device what it has computed."""
    chat = sharpened("llama")
    own = chat.layers[2].mlp.forward
    chat.layers[2].mlp.forward = lambda x: own(x) if x.sum().item() < 1e9 else x
    return chat


CASES = {
    "recurrent": (make_hybrid, PLAIN, "more than keys and values by token"),
    "inside": (lambda: sharpened("llama"), ((INSIDE,),), "hooked inside of its blocks"),
    "untraceable": (asking, ((STEER,),), "data-dependent"),
}


@pytest.mark.parametrize(("make", "settings", "reason"), CASES.values(), ids=CASES)
def test_it_runs_as_before_and_one_line_says_why(make, settings, reason, only_traced, caplog):
    chat = brisk(make())
    with caplog.at_level(logging.WARNING, "misdirection"):
        expected, found = both(chat, settings, n=2)
    assert found == expected
    (line,) = said(caplog)
    assert line.startswith(f"{chat.name}: sampling runs uncompiled: ") and reason in line
    assert "\n" not in line


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("transformers", "transformers"),
        ({"transformers": {"compile": True}}, {"transformers": {"compile": True}}),
        ({"transformers": {"compile": False}}, "transformers"),
    ],
)
def test_artifacts_do_not_depend_on_it(given, written):
    config = validate(SamplingConfig, {"engine": given}, "sampling")
    assert config.model_dump(mode="json")["engine"] == written
    assert config == SamplingConfig.model_validate(config.model_dump(mode="json"))
    asked = [Asking(one, Condition("base"), QUESTIONS).inputs() for one in (config, SamplingConfig())]
    assert json.dumps(asked[0]) == json.dumps(asked[1])


def test_there_is_one_engine():
    with pytest.raises(InputError, match="give transformers or vllm"):
        validate(SamplingConfig, {"engine": {"transformers": {"compile": True}, "vllm": {}}}, "sampling")
    with pytest.raises(InputError, match="--compile: vLLM compiles by itself"):
        open_sampler("any", engine="vllm", compile=True)
