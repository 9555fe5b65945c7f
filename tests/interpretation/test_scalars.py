"""Scalars are alpha / sqrt(r) A x, whatever the architecture, the batch and the dtype."""

import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from lora_fixtures import EXCHANGES, rows, with_adapter

from misdirection.errors import MisdirectionError
from misdirection.interpretation.scalars import scalars, token_scalars, wide
from misdirection.lora.view import LoraView
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from tiny import WIDTH, make_chat

SHAPES = ["llama", "llama_tuples", "qwen2", "gemma3", "gpt_neox", "gpt2"]


def inputs_and_outputs(chat, row):
    """By module: what it receives and gives in a pass over one exchange, [tokens, ...]."""
    seen = {}
    handles = [
        site.module.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0][0], out[0])))
        for name, site in LoraView.of(chat).linear_sites.items()
    ]
    with torch.no_grad():
        chat.model(input_ids=torch.tensor([row.ids[: row.stop]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_a_module_that_adds_nothing_has_no_scalars():
    chat = with_adapter()
    with torch.no_grad():
        chat.layers[2].mlp.down_proj.lora_B["default"].weight.zero_()
    table = scalars(chat, rows(chat))
    assert set(table["feature"]) == {"layer_0", "layer_1", "layer_3"}


def one_line(words, function, *args):
    with pytest.raises(MisdirectionError, match=words) as error:
        function(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_scalar_is_scaling_times_a_dot_x(architecture):
    chat = with_adapter(architecture)
    encoded = rows(chat)
    table = scalars(chat, encoded)
    for number, row in enumerate(encoded):
        seen = inputs_and_outputs(chat, row)
        for name, site in LoraView.of(chat).linear_sites.items():
            x = seen[name][0][row.start : row.stop]
            by_hand = 8 / math.sqrt(1) * (x @ site.a.T).squeeze(-1)
            own = table[(table["answer"] == number) & (table["module"] == name)]
            np.testing.assert_allclose(own["scalar"], by_hand.detach(), rtol=1e-4, atol=1e-5)
            assert own["position"].tolist() == list(range(len(row.answer)))
            assert "".join(own["token"]) == "".join(chat.tokenizer.convert_ids_to_tokens(list(row.answer)))


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["down_proj"]),
        ("llama", ["down_proj", "q_proj", "lm_head"]),
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("gemma3", "all-linear"),
        ("qwen3_moe", ["q_proj", "o_proj"]),
    ],
)
@pytest.mark.parametrize("rank", [1, 4])
def test_peft_adds_the_sum_of_the_components(architecture, targets, rank):
    chat = with_adapter(architecture, r=rank, target_modules=targets)
    (row,) = rows(chat)[:1]
    table = scalars(chat, [row])
    seen = inputs_and_outputs(chat, row)
    assert set(table["module"]) == set(seen)
    for one in LoraView.of(chat).modules:
        x, output = (tensor[row.start : row.stop] for tensor in seen[one.module])
        own = table[table["module"] == one.module].pivot(index="position", columns="component", values="scalar")
        added = torch.tensor(own.to_numpy()) @ one.write
        base = LoraView.of(chat).linear_sites[one.module].module.base_layer(x)
        torch.testing.assert_close(output, base + added, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", SHAPES)
def test_scalars_do_not_depend_on_the_batch(architecture):
    chat = with_adapter(architecture, r=2)
    together, alone = scalars(chat, rows(chat)), scalars(chat, rows(chat), budget=1)
    pd.testing.assert_frame_equal(together, alone, atol=1e-5, rtol=1e-4)


def test_leading_components_alone():
    chat = with_adapter(r=4)
    whole, leading = scalars(chat, rows(chat)), scalars(chat, rows(chat), top=2)
    kept = whole[whole["component"] < 2].reset_index(drop=True)
    np.testing.assert_allclose(kept["scalar"], leading["scalar"], atol=1e-6)
    assert leading["feature"].nunique() == 8


def test_half_precision_stays_close():
    chat = with_adapter()
    exact = scalars(chat, rows(chat))
    half = ChatModel(chat.model.to(torch.bfloat16), chat.tokenizer, chat.name, adapter=chat.adapter)
    close = scalars(half, rows(half))
    assert close["scalar"].dtype == np.float32
    assert np.abs(close["scalar"] - exact["scalar"]).max() < 0.05 * np.abs(exact["scalar"]).max()


def test_modules_of_one_name_in_a_layer_have_columns_of_their_own():
    chat = with_adapter("gpt2", target_modules=["c_proj"], layers_to_transform=[1])
    assert list(wide(scalars(chat, rows(chat))).columns) == ["token", "layer_1.attn.c_proj", "layer_1.mlp.c_proj"]


def test_wide_has_a_row_per_token():
    chat = with_adapter()
    encoded = rows(chat)
    table = scalars(chat, encoded)
    tokens = wide(table)
    assert list(tokens.columns) == ["token", "layer_0", "layer_1", "layer_2", "layer_3"]
    assert len(tokens) == sum(len(row.answer) for row in encoded)
    one = table[(table["answer"] == 1) & (table["position"] == 3) & (table["layer"] == 2)]
    assert tokens.loc[(1, 3), "layer_2"] == one["scalar"].item() and tokens.loc[(1, 3), "token"] == one["token"].item()


def test_models_and_answers_that_cannot_be_read_are_refused():
    chat = with_adapter()
    one_line("no answers to read", scalars, chat, [])
    one_line("top: 0 components", lambda: scalars(chat, rows(chat), top=0))
    one_line("has no LoRA adapter", scalars, make_chat(), rows(chat))
    one_line("none of its adapted modules sees the text", scalars, vision_alone(), rows(chat))
    halved = with_adapter()
    for block in halved.layers:
        whole = block.mlp.forward
        block.mlp.forward = lambda x, whole=whole: whole(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]
    one_line(r"mlp\.down_proj: sees \d+ of \d+ tokens", scalars, halved, rows(chat))


def test_values_that_are_not_finite_are_refused_by_the_first_module_that_has_them():
    chat = with_adapter()
    with torch.no_grad():
        chat.layers[1].mlp.down_proj.base_layer.weight.fill_(torch.inf)
    one_line(r"layers\.2\.mlp\.down_proj has values that are not finite in torch\.float32", scalars, chat, rows(chat))


def test_a_module_that_sees_its_tokens_in_a_line_is_read():
    chat, plain = with_adapter(), with_adapter()
    for block in chat.layers:
        whole = block.mlp.forward
        block.mlp.forward = lambda x, whole=whole: whole(x.flatten(0, 1)).view(x.shape)
    pd.testing.assert_frame_equal(scalars(chat, rows(chat)), scalars(plain, rows(plain)), atol=1e-5, rtol=1e-4)


def vision_alone():
    return with_adapter("gemma3_vision", target_modules=r".*vision_tower.*q_proj")


def test_the_text_alone_is_read_where_a_vision_tower_is_adapted_too():
    chat = with_adapter("gemma3_vision", target_modules=["q_proj"])
    assert sorted(set(scalars(chat, rows(chat))["layer"])) == [0, 1, 2, 3]


def test_the_residual_stream_comes_with_the_scalars():
    chat = with_adapter()
    encoded = rows(chat)
    found = token_scalars(chat, encoded, residual=2, budget=60)
    seen = []
    handle = chat.layers[2].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with torch.no_grad():
        for row in encoded:
            chat.decoder(input_ids=torch.tensor([row.ids[: row.stop]]), use_cache=False)
    handle.remove()
    by_hand = torch.cat([out[row.start : row.stop] for row, out in zip(encoded, seen, strict=True)])
    torch.testing.assert_close(found.residual, by_hand, atol=1e-5, rtol=1e-4)
    assert found.residual.shape == (len(wide(found.table)), WIDTH)
    pd.testing.assert_frame_equal(found.table, scalars(chat, encoded), atol=1e-5, rtol=1e-4)
    assert token_scalars(chat, encoded).residual is None


def test_thirty_thousand_tokens_become_a_table_quickly():
    chat = with_adapter()
    encoded = [Encoded(tuple(range(3, 109)), 6, 106)] * 300
    start = time.perf_counter()
    table = scalars(chat, encoded)
    tokens = wide(table)
    taken = time.perf_counter() - start
    assert tokens.shape == (30_000, 5) and len(table) == 120_000
    assert table.memory_usage(deep=True).sum() < 40 * len(table)
    assert taken < 30, f"{taken:.1f} s"


def test_progress_counts_the_answers():
    chat = with_adapter()
    done = []
    scalars(chat, rows(chat), budget=60, progress=done.append)
    assert sum(done) == len(EXCHANGES) and len(done) > 1
