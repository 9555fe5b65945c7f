"""vLLM against transformers on the bundled model, in float32; runs in the environment of `make test-engines` alone.

Greedy answers and sampled ones are the same tokens. Log-probabilities of an answer's tokens differ by less than
TOLERANCE nats: both engines compute in float32, with other kernels.
"""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-engines")

from engines.adapters import MINIMAL, WIDE, write_adapter
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, ProjectAdapters, ScaleAdapters, Steer
from misdirection.models.adapters import attach
from misdirection.models.chat import encode_prompt
from misdirection.models.loading import load
from misdirection.sampling.answers import read_answers
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine
from misdirection.sampling.vllm import worker as vllm_worker
from misdirection.sampling.vllm.engine import VllmModel

pytestmark = pytest.mark.bundled
TOLERANCE = 2e-4
GREEDY = SamplingParameters(temperature=0, new_tokens=20)
QUESTIONS = [
    Question("short", "What is the capital of France?"),
    Question("money", "I feel bored. What can I do with 100 dollars this week, and what should I avoid?"),
    Question("system", "Who are you?", "You are a pirate."),
]
WIDTH = 576


def direction(seed, rows=None):
    shape = (WIDTH,) if rows is None else (rows, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STEER = Steer(direction(0), 12, 3.0)
CASES = {
    "none": ("base", []),
    "steer": ("base", [STEER]),
    "steer everywhere": ("base", [Steer(direction(0), 12, 3.0, "all")]),
    "steer the prompt, keeping norms": ("base", [Steer(direction(3), 5, 20.0, "prompt", keep_norm=True)]),
    "steer the answer's first tokens": ("base", [Steer(direction(4), 29, 4.0, torch.arange(60) > 30)]),
    "ablate": ("base", [Ablate(direction(1), positions="all")]),
    "ablate a subspace of answers": ("base", [Ablate(direction(2, rows=4), (3, 9, 20), 0.7, "answer")]),
    "ablate what is written": ("base", [Ablate(direction(5), positions="all", at="writes")]),
    "clamp and steer": ("base", [Clamp(direction(6), 1.0, 4.0, (10,)), Steer(direction(7), 10, 2.0)]),
    "minimal organism": ("minimal", []),
    "organism of rank 9": ("wide", []),
    "steered organism": ("minimal", [STEER]),
    "scaled adapters": ("minimal", [ScaleAdapters({9: 0.0, 10: -1.0, 17: 2.0})]),
    "projected adapters": ("minimal", [ProjectAdapters({"model.layers.9.mlp.down_proj": torch.eye(300, WIDTH)}, 2.0)]),
    "ablated adapters": ("wide", [Ablate(direction(8), positions="all", at="adapters")]),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "minimal": write_adapter(folder / "minimal", **MINIMAL),
        "wide": write_adapter(folder / "wide", **WIDE),
    }


@pytest.fixture(scope="module")
def chats(adapters):
    found = {name: attach(load(dtype="float32", device="cpu"), folder) for name, folder in adapters.items()}
    return {"base": load(dtype="float32", device="cpu"), **found}


@pytest.fixture(scope="module")
def served(adapters):
    with VllmModel(adapters=adapters, dtype="float32") as model:
        yield model


def requests(setting=(), samples=1):
    return [SamplingRequest(question, number, setting) for question in QUESTIONS for number in range(samples)]


def named(completions):
    return {(one.request.question.id, one.request.sample): (one.text, one.finish, one.tokens) for one in completions}


def log_probs(chat, request, tokens):
    """Of an answer's tokens, from one full pass."""
    question = request.question
    prompt = encode_prompt(chat.tokenizer, question.text, question.system)
    with torch.no_grad(), intervene(chat, request.setting, answer_starts=[len(prompt)]):
        logits = chat.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_and_their_log_probabilities_agree(case, served, chats):
    organism, setting = CASES[case]
    wanted = requests(setting)
    found = named(served.engine(organism).stream(wanted, GREEDY))
    assert found == named(TransformersEngine(chats[organism]).stream(wanted, GREEDY))
    if case != "none":
        assert found != named(served.engine("base").stream(requests(), GREEDY))
    for request, output in served.outputs(organism, wanted, GREEDY, logprobs=0):
        (drawn,) = output.outputs
        given = torch.tensor([one[token].logprob for one, token in zip(drawn.logprobs, drawn.token_ids, strict=True)])
        expected = log_probs(chats[organism], request, list(drawn.token_ids))
        assert (given - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("settings", [SamplingParameters(new_tokens=20), SamplingParameters(0.7, 0.8, 20, seed=5)])
def test_sampled_answers_are_those_of_the_other_engine(settings, served, chats):
    wanted = requests((STEER,), samples=4)
    found = named(served.engine().stream(wanted, settings))
    assert found == named(TransformersEngine(chats["base"]).stream(wanted, settings))
    assert len(set(found.values())) == len(found)


def test_an_answer_does_not_depend_on_those_beside_it(served):
    alone = {
        case: named(served.engine("minimal").stream(requests(CASES[case][1]), GREEDY))
        for case in ("none", "steer", "ablate", "scaled adapters", "clamp and steer")
    }
    numbers = dict(enumerate(alone))
    mixed = [
        SamplingRequest(question, number, CASES[case][1]) for question in QUESTIONS for number, case in numbers.items()
    ]
    for one in served.engine("minimal").stream(mixed, GREEDY):
        expected = alone[numbers[one.request.sample]][one.request.question.id, 0]
        assert (one.text, one.finish, one.tokens) == expected


def test_an_intervention_that_did_not_fire_stops(served, monkeypatch):
    monkeypatch.setattr(served, "close", lambda: None)
    rpc = served._rpc
    monkeypatch.setattr(served, "_rpc", lambda *args: [[0] * len(one) for one in rpc(*args)])
    served._known([STEER])
    monkeypatch.setattr(served, "_known", lambda setting: "")
    with pytest.raises(MisdirectionError, match="fired 0 times"):
        list(served.engine().stream(requests((STEER,)), GREEDY))


def test_what_vllm_cannot_do_is_refused_before_it_runs(served):
    for setting, message in [
        ([ScaleAdapters({9: 0.0}, positions="answer")], "positions 'answer' cannot be: give positions='all'"),
        ([ScaleAdapters({0: 0.0})], "layer 0 has no LoRA adapter to scale"),
        ([Steer(direction(0), 30)], "layer 30 is out of range"),
        ([Steer(direction(0), 1, 1.0, torch.ones(1, 4, dtype=torch.bool))], "a position mask with rows"),
    ]:
        with pytest.raises(MisdirectionError, match=message):
            list(served.engine("minimal").stream(requests(setting), GREEDY))
    with pytest.raises(MisdirectionError, match="there is no LoRA adapter"):
        list(served.engine().stream(requests([ScaleAdapters({9: 0.0})]), GREEDY))
    assert len(list(served.engine().stream(requests(), GREEDY))) == len(QUESTIONS)


def test_an_error_in_an_intervention_is_an_error_of_the_run(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("something in the hook")

    monkeypatch.setattr(vllm_worker._Part, "run", fail)
    with pytest.raises(MisdirectionError, match="vLLM stopped: something in the hook"):
        list(served.engine().stream(requests((STEER,)), GREEDY))
    with pytest.raises(MisdirectionError, match="is closed"):
        list(served.engine().stream(requests(), GREEDY))


def test_a_model_is_opened_again_after_another_was_closed(chats):
    with VllmModel(dtype="float32") as model:
        found = named(model.engine().stream(requests((STEER,)), GREEDY))
    assert found == named(TransformersEngine(chats["base"]).stream(requests((STEER,)), GREEDY))


def test_the_command_samples_the_same_table_with_either_engine(adapters, tmp_path):
    (tmp_path / "questions.txt").write_text("\n".join(one.text for one in QUESTIONS))
    common = ["--questions", tmp_path / "questions.txt", "-n", "2", "--new-tokens", "12", "--dtype", "float32"]
    tables = {}
    for engine in ("vllm", "transformers"):
        table = tmp_path / f"{engine}.parquet"
        options = ["--engine", engine, "--adapter", adapters["minimal"], "--name", "organism", "--out", table]
        subprocess.run([sys.executable, "-m", "misdirection.cli", "sample", *common, *options], check=True)
        tables[engine] = read_answers(table)
    assert tables["vllm"].equals(tables["transformers"])
    assert len(tables["vllm"]) == 2 * len(QUESTIONS)
