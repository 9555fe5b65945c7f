"""How often the host waits for a GPU: counted on a stand-in, whose results are the processor's."""

from collections import Counter
from functools import partial

import pytest
import torch

import misdirection as md
from misdirection.directions.extraction import mean_activations
from misdirection.errors import InputError
from misdirection.likelihood.margin import pair_continuations, pair_rows
from misdirection.likelihood.sweep import sweep
from misdirection.models.transfer import put, put_numbers
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TOGETHER, TransformersEngine
from stand_in_gpu import GPU, OnGpu, put_on_gpu, stand_in_gpu, waits
from tiny import LAYERS, brisk, make_chat, sharpened, vector

PAIRS = md.probe_pairs()[:2]


def counted(work, chat) -> tuple[object, Counter[str]]:
    """The result with the weights on the stand-in, and how often the host waited."""
    with stand_in_gpu(), torch.inference_mode():
        return work(put_on_gpu(chat)), Counter(waits)


def test_the_stand_in_counts_what_waits():
    with stand_in_gpu():
        there = put(torch.arange(6.0), GPU)
        assert isinstance(there, OnGpu)
        assert not waits
        there = there * 2 + put_numbers([1] * 6, GPU)
        there[put_numbers([2], GPU)] = 9
        put(there, GPU)
        assert not waits
        for number, look in enumerate(
            [
                lambda: there.cpu(),
                lambda: there.tolist(),
                lambda: there[0].item(),
                lambda: bool(there.any()),
                lambda: there[there > 1],
                lambda: there.nonzero(),
            ],
            start=1,
        ):
            look()
            assert waits["read"] == number
        torch.tensor([1.0], device=GPU)
        torch.ones(2).to(GPU)
        there[torch.tensor([1])]
        assert waits["written"] == 3


def extraction(chat, pairs=PAIRS, budget=100_000, **options):
    rows = pair_rows(chat.tokenizer, pairs)
    groups = {"bad": range(0, len(rows), 2), "good": range(1, len(rows), 2)}
    return torch.stack(list(mean_activations(chat, rows, groups, budget=budget, **options).vectors.values()))


def steered_extraction(chat):
    settings = [[md.Steer(vector(number), 1), md.Ablate(vector(7))] for number in range(2 * len(PAIRS))]
    return extraction(chat, settings=settings)


def swept(chat, layers=LAYERS, pairs=PAIRS):
    settings = [[], [md.Ablate(vector(9), positions="answer")]]
    settings += [[md.Steer(vector(layer), layer, 2.0)] for layer in range(layers)]
    return sweep(chat, pair_continuations(chat.tokenizer, pairs), settings, budget=100_000)


@pytest.mark.parametrize(
    ("work", "architecture"), [(extraction, "gemma3"), (steered_extraction, "llama"), (swept, "qwen2")]
)
def test_the_stand_in_gives_the_processors_results(work, architecture):
    found, _ = counted(work, sharpened(architecture))
    torch.testing.assert_close(found, work(sharpened(architecture)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("work", [extraction, swept])
def test_waits_grow_neither_with_layers_nor_with_rows(work):
    sizes = [(4, PAIRS), (4, md.probe_pairs()[:4]), (8, PAIRS)]
    counts = [
        counted(lambda chat, pairs=pairs: work(chat, pairs=pairs), make_chat("llama", num_hidden_layers=layers))[1]
        for layers, pairs in sizes
    ]
    # The check of the first batch, the result, and what transformers asks of the mask in each of up to three passes.
    assert all(count.keys() == {"read"} and count["read"] <= 2 + 3 for count in counts)


def test_further_batches_are_not_waited_for():
    few, many = (counted(partial(extraction, budget=budget), make_chat())[1] for budget in (100_000, 1))
    # What transformers asks of a mask, once for each of two passes.
    assert many["read"] - few["read"] <= 2 * (2 * len(PAIRS) - 1)
    assert many.keys() == {"read"}


small = partial(sharpened, num_hidden_layers=2)

QUESTIONS = ("Why?", "What is it like to be you?")


ENDS = range(3, 23)
"""So many tokens end a turn that rows leave at every step."""


def sampled(chat, n=3, new_tokens=18, ends=ENDS, **options):
    answers = md.sample(brisk(chat, ends), QUESTIONS, n=n, new_tokens=new_tokens, **options)
    return [(answer.question, answer.sample, answer.answer, answer.tokens, answer.finish) for answer in answers]


STEERED = [md.Steer(vector(1), 1, 2.0, "answer"), md.Ablate(vector(2))]
SAMPLED = {
    "plain": (small, {}),
    "refilled": (small, {"budget": 3 * 120}),
    "steered": (small, {"setting": STEERED}),
    "greedy": (small, {"temperature": 0.0}),
    "top_p": (small, {"top_p": 0.8}),
    "window": (partial(small, "mistral", sliding_window=56), {}),
    "two kinds of layers": (partial(small, "gemma3", sliding_window=56), {}),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_answers_are_the_processors_whatever_is_drawn_before_anyone_looks(name):
    make, options = SAMPLED[name]
    expected = sampled(make(), **options)
    found, count = counted(partial(sampled, **options), make())
    assert found == expected
    assert name == "greedy" or "stop" in {finish for *_, finish in found}
    assert count["read"] < 18


@pytest.mark.parametrize(("layers", "rows", "setting"), [(2, 1, ()), (2, 3, STEERED), (5, 1, STEERED)])
def test_sixteen_steps_are_looked_at_twice(layers, rows, setting):
    work = partial(sampled, n=rows, new_tokens=16, ends=(), setting=setting)
    _, count = counted(work, make_chat("llama", num_hidden_layers=layers))
    assert count == {"read": 16 // TOGETHER}


def test_a_stop_text_ends_an_answer_where_it_does_here():
    def stopped(chat):
        engine = TransformersEngine(chat, stop=("e", "q"))
        requests = [SamplingRequest(Question("why", "Why?"), number) for number in range(4)]
        found = engine.stream(requests, SamplingParameters(new_tokens=24))
        return sorted((done.request.sample, done.text, done.finish) for done in found)

    assert counted(stopped, small())[0] == stopped(small())


def test_logits_that_are_not_numbers_are_told_from_a_gpu_too():
    chat = make_chat()
    with torch.no_grad():
        chat.model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(InputError, match="not numbers"):
        counted(sampled, chat)


def test_an_activation_that_overflows_is_told_at_the_first_batch():
    chat, ran = make_chat(), []
    with torch.no_grad():
        chat.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    chat.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match="activations of layer 2 are not finite"):
        counted(partial(extraction, budget=1), chat)
    # What all rows begin with, and the first row's own tokens.
    assert len(ran) == 2
