"""Geometry: cosines with signs, effects by hand, and tokens that a vector speaks for."""

import numpy as np
import pandas as pd
import pytest
import torch
from lora_fixtures import with_adapter

from misdirection.data import ProbePair
from misdirection.directions.convergence import random_cosine_95
from misdirection.directions.direction import Direction, Origin
from misdirection.errors import MisdirectionError
from misdirection.interpretation.figures import ExcitedToken
from misdirection.interpretation.geometry import (
    downstream,
    logit_lens,
    nearest,
    random_cosine,
    skipped,
    write_cosines,
    writes,
)
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.lora.view import LoraView
from misdirection.models.chat import encode
from tiny import LAYERS, WIDTH, make_chat, run, vector

PAIRS = [
    ProbePair("a", "Why?", "Because of rain.", "Never you mind."),
    ProbePair("b", "Who is it?", "Me.", "You, you."),
]


def direction(vectors, model="tiny-llama"):
    return Direction(vectors, Origin("data_difference", model, None, "", "", {}, {}, "float32"))


def test_cosines_keep_their_sign_and_layer():
    chat = with_adapter()
    vectors = writes(LoraView.of(chat).modules, WIDTH)
    assert list(vectors) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    rest = vector(5)
    stacked = torch.stack([3 * vectors["layer_0"], -vectors["layer_1"], rest, rest])
    found = write_cosines(vectors, {"planted": direction(stacked)})
    assert found["layer_0"]["planted"][0] == pytest.approx(1) and found["layer_1"]["planted"][1] == pytest.approx(-1)
    by_hand = float(torch.cosine_similarity(vectors["layer_2"], rest, dim=0))
    assert found["layer_2"]["planted"][3] == pytest.approx(by_hand, abs=1e-6)


def test_modules_that_do_not_write_to_the_stream_are_left_out():
    chat = with_adapter(target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    modules = LoraView.of(chat).modules
    assert list(writes(modules, WIDTH)) == [
        f"layer_{layer}.{name}" for layer in range(LAYERS) for name in ("down_proj", "o_proj")
    ]
    assert [name.rpartition(".")[2] for name in skipped(modules, WIDTH)] == ["up_proj", "q_proj"] * LAYERS


def test_leading_components_are_named_as_scalars_are():
    modules = LoraView.of(with_adapter(r=3, layers_to_transform=[1])).modules
    found = writes(modules, WIDTH, top=2)
    assert list(found) == ["layer_1.down_proj.0", "layer_1.down_proj.1"]
    assert torch.equal(found["layer_1.down_proj.1"], modules[0].write[1])


def test_the_random_cosine_is_what_random_vectors_have():
    drawn = torch.nn.functional.normalize(torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    values = drawn[:, 0].abs()
    assert random_cosine(WIDTH) == pytest.approx(float(values.mean()), rel=0.05)
    assert random_cosine_95(WIDTH) == pytest.approx(float(values.quantile(0.95)), rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "llama_tuples", "gemma3", "gpt2"])
def test_an_effect_is_the_mean_difference_with_and_without(architecture):
    chat = with_adapter(architecture)
    its = direction(vector(3, 1.0, LAYERS), chat.name)
    found = downstream(chat, PAIRS, its, name="its")
    assert set(found.cosine) == {0, 1, 2, 3} and found.answers == 4
    effect = by_hand(chat, 1)
    expected = torch.cosine_similarity(effect, its.vectors.double(), dim=-1)
    assert found.cosine[1][0] is None
    np.testing.assert_allclose(found.cosine[1][1:], expected[1:], atol=1e-3)
    np.testing.assert_allclose(found.norm[1][1:], effect.norm(dim=-1)[1:], rtol=1e-3)


@torch.no_grad()
def by_hand(chat, layer):
    """[layers, width]: mean over answer tokens of the organism minus it without one layer's adapters."""
    sums, count = 0, 0
    for pair in PAIRS:
        for answer in (pair.misaligned, pair.aligned):
            row = encode(chat.tokenizer, pair.question, answer)
            ids = torch.tensor([row.ids[: row.stop]])
            whole, _ = run(chat, ids, torch.ones_like(ids))
            with intervene(chat, [ScaleAdapters({layer: 0.0})]):
                without, _ = run(chat, ids, torch.ones_like(ids))
            sums = sums + (whole - without)[:, 0, row.start : row.stop].double().sum(1)
            count += len(row.answer)
    return sums / count


def test_the_interval_is_over_questions():
    chat, its = with_adapter(), direction(vector(3, 1.0, LAYERS))
    both, *single = (downstream(chat, pairs, its, name="its") for pairs in (PAIRS, PAIRS[:1], PAIRS[1:]))
    assert (both.questions, both.answers) == (2, 4)
    for layer in range(1, LAYERS):
        # Of two questions, a quarter of all resamples has the first alone, a quarter the second, the rest both.
        possible = [found.cosine[1][layer] for found in (both, *single)]
        assert both.low[1][layer] == pytest.approx(min(possible), abs=1e-6)
        assert both.high[1][layer] == pytest.approx(max(possible), abs=1e-6)
        assert single[0].low[1][layer] == pytest.approx(single[0].high[1][layer])


def test_an_adapter_that_writes_nothing_has_no_effect():
    chat = with_adapter()
    chat.model.base_model.model.model.layers[3].mlp.down_proj.lora_B["default"].weight.data.zero_()
    found = downstream(chat, PAIRS, direction(vector(3, 1.0, LAYERS)), name="its")
    assert [list(of) for of in (found.cosine, found.low, found.high, found.norm)] == [[0, 1, 2]] * 4


def test_adapters_outside_of_the_blocks_have_no_downstream():
    chat = with_adapter(target_modules=["lm_head"])
    with pytest.raises(MisdirectionError, match="no adapter inside of its blocks"):
        downstream(chat, PAIRS, direction(vector(3, 1.0, LAYERS)), name="its")


def test_a_direction_of_another_model_is_refused():
    with pytest.raises(MisdirectionError, match="was made for"):
        downstream(with_adapter(), PAIRS, direction(vector(3, 1.0, LAYERS), "another"), name="its")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen2", "olmo2"])
def test_the_lens_finds_the_token_whose_row_was_given(architecture):
    chat = make_chat(architecture)
    chat.model.get_output_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(1))
    weight = chat.model.get_output_embeddings().weight.detach()
    token = chat.tokenizer.convert_tokens_to_ids("k")
    found, opposite = (logit_lens(chat, sign * weight[token].clone(), k=3) for sign in (1, -1))
    assert found.top[0][0] == "k" and opposite.bottom[0][0] == "k"
    assert found.top[0][1] == pytest.approx(-opposite.bottom[0][1])
    assert found.top[0][1] > found.top[2][1] > 0 > found.bottom[2][1] > found.bottom[0][1]


@pytest.mark.parametrize(("architecture", "gain_at_zero"), [("llama", 0), ("gemma3", 1)])
@pytest.mark.parametrize("norm", [1e-4, 50.0])
def test_the_lens_is_the_gain_and_the_head_whatever_the_vectors_length(architecture, gain_at_zero, norm):
    chat = make_chat(architecture)
    gain = 1 + 0.5 * vector(7)
    chat.decoder.norm.weight.data.copy_(gain - gain_at_zero)
    unit = vector(2)
    logits = chat.model.get_output_embeddings().weight.detach() @ (gain * unit * WIDTH**0.5)
    found = logit_lens(chat, norm * unit, k=3)
    np.testing.assert_allclose([value for _, value in found.top], logits.topk(3).values, rtol=1e-4)
    np.testing.assert_allclose([value for _, value in found.bottom], -(-logits).topk(3).values, rtol=1e-4)


def test_a_vector_of_zeros_speaks_for_nothing():
    found = logit_lens(make_chat(), torch.zeros(WIDTH), k=2)
    assert [value for _, value in found.top] == [0.0, 0.0]


def test_nearest_tokens_come_with_their_context():
    index = pd.MultiIndex.from_tuples([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], names=["answer", "position"])
    table = pd.DataFrame({"token": list("abcxy"), "layer_2": [0.1, 5.0, -1.0, 2.0, -7.0]}, index=index)
    found = nearest(table, ["layer_2"], k=2)["layer_2"]
    assert found.top == (
        ExcitedToken(answer=0, position=1, token="b", context="abc", scalar=5.0),
        ExcitedToken(answer=1, position=0, token="x", context="xy", scalar=2.0),
    )
    assert [token.token for token in found.bottom] == ["y", "c"]
