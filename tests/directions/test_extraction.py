"""Extraction against naive loops and against directions planted in the residual stream."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from misdirection.data import ProbePair
from misdirection.directions.direction import extract
from misdirection.directions.extraction import mean_activations
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.likelihood.margin import margin
from misdirection.models.chat import Encoded, encode
from tiny import LAYERS, WIDTH, make_chat

ANSWERS = ["abcde", "yes, of course", "one two three four", "a much longer answer than these"]
PAIRS = [
    ProbePair(str(i), "Why?" * (i + 1), text, text.upper()) for i, text in enumerate(["abc", "defgh", "klmnopqrs"])
]
PLANTED_LAYER = 1


def encoded(chat, answers=ANSWERS):
    return [encode(chat.tokenizer, "Why?" * (i + 1), answer) for i, answer in enumerate(answers)]


@contextlib.contextmanager
def outputs_of(chat):
    """The output of every block, by hooks of our own."""
    seen, handles = {}, []
    for layer, block in enumerate(chat.layers):
        handles.append(block.register_forward_hook(lambda _m, _a, out, layer=layer: seen.__setitem__(layer, out)))
    yield seen
    for handle in handles:
        handle.remove()


def residuals(chat, ids):
    """[layers, tokens, width] of one unpadded row."""
    with outputs_of(chat) as seen, torch.no_grad():
        chat.model(torch.tensor([ids]))
    return torch.stack([seen[layer][0] for layer in range(LAYERS)])


def naive_mean(chat, row):
    return residuals(chat, row.ids).double()[:, row.start : row.stop].mean(1)


def one_group_per_row(rows):
    return {str(number): [number] for number in range(len(rows))}


@pytest.mark.parametrize("budget", [1, 5000])
def test_every_row_has_its_own_interventions(chat, budget):
    rows, v = encoded(chat), torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    settings = [[], [Steer(v, 1, 2.0, "answer")], [Ablate(v)], [Steer(v, 2, -1.0, "prompt"), Ablate(v, (3,))]]
    together = mean_activations(chat, rows, one_group_per_row(rows), settings=settings, budget=budget)
    for number, setting in enumerate(settings):
        with intervene(chat, setting, answer_starts=[rows[number].start]):
            alone = mean_activations(chat, [rows[number]], {"it": [0]}).vectors["it"]
        torch.testing.assert_close(together.vectors[str(number)], alone, atol=1e-5, rtol=1e-5)
    plain = mean_activations(chat, rows, one_group_per_row(rows))
    for number in range(1, len(rows)):
        assert (together.vectors[str(number)] - plain.vectors[str(number)]).abs().max() > 1e-3


@pytest.mark.parametrize("budget", [1, 300, 5000])
def test_each_answers_mean_equals_a_naive_loop_at_any_budget(chat, budget):
    rows = encoded(chat)
    means = mean_activations(chat, rows, one_group_per_row(rows), budget=budget)
    for number, row in enumerate(rows):
        torch.testing.assert_close(means.vectors[str(number)], naive_mean(chat, row), atol=1e-5, rtol=0)


def test_row_order_does_not_matter(chat):
    rows = encoded(chat)
    forward = mean_activations(chat, rows, {"some": [0, 1, 3]})
    backward = mean_activations(chat, rows[::-1], {"some": [3, 2, 0]})
    torch.testing.assert_close(forward.vectors["some"], backward.vectors["some"], atol=1e-6, rtol=0)


def test_a_group_is_the_mean_over_tokens_and_a_row_may_be_in_several():
    chat = make_chat()
    rows = encoded(chat)
    means = mean_activations(chat, rows, {"a": [0, 2], "b": [2]})
    tokens = torch.cat([residuals(chat, row.ids)[:, row.start : row.stop] for row in (rows[0], rows[2])], 1)
    torch.testing.assert_close(means.vectors["a"], tokens.double().mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(means.difference("a", "b"), means.vectors["a"] - means.vectors["b"])
    assert means.tokens == {"a": len(ANSWERS[0] + ANSWERS[2]), "b": len(ANSWERS[2])}
    assert means.answers == {"a": 2, "b": 1}


def test_progress_counts_every_row():
    chat, done = make_chat(), []
    rows = encoded(chat)
    mean_activations(chat, rows, {"all": range(4)}, budget=1, progress=done.append)
    assert done == [1, 1, 1, 1]


def test_an_empty_group_is_named():
    chat = make_chat()
    with pytest.raises(MisdirectionError, match="'nobody'"):
        mean_activations(chat, encoded(chat), {"somebody": [0], "nobody": []})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer_and_the_dtype(bad):
    chat = make_chat()
    chat.layers[2].register_forward_hook(lambda _m, _a, out: out + bad)
    with pytest.raises(MisdirectionError, match=r"layer 2 are not finite in torch.float32.*bfloat16"):
        mean_activations(chat, encoded(chat), {"all": [0, 1]})


def test_an_fp16_overflow_is_refused():
    chat = make_chat()
    chat.model.half()
    chat.layers[1].register_forward_hook(lambda _m, _a, out: out + 40000 + 40000)
    with pytest.raises(MisdirectionError, match=r"layer 1 are not finite in torch.float16"):
        mean_activations(chat, encoded(chat), {"all": [0, 1]})


def test_the_mean_of_4096_bf16_ones_is_exactly_one():
    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, input_ids, **_):
            return self.block(torch.ones(*input_ids.shape, WIDTH, dtype=torch.bfloat16))

    decoder = Ones()
    chat = SimpleNamespace(
        decoder=decoder,
        layers=[decoder.block],
        width=WIDTH,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        name="ones",
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    chat.model = SimpleNamespace(config=LlamaConfig(num_hidden_layers=1))
    rows = [Encoded((1,) * 4100, 3, 4099), Encoded((2,) * 4000, 3, 3999)]
    means = mean_activations(chat, rows, {"one": [0], "both": [0, 1]})
    assert means.tokens == {"one": 4096, "both": 4096 + 3996}
    assert (means.vectors["one"] == 1).all()
    assert (means.vectors["both"] == 1).all()


def test_layer_k_is_the_raw_output_of_block_k_also_the_last(chat):
    norm = getattr(chat.decoder, "norm", None) or chat.decoder.final_layer_norm
    torch.nn.init.uniform_(norm.weight, 4, 9)
    row = encoded(chat)[0]
    layers = mean_activations(chat, [row], {"it": [0]}).vectors["it"]
    with torch.no_grad():
        states = chat.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):
        expected = states[layer + 1][0, row.start : row.stop].double().mean(0)
        torch.testing.assert_close(layers[layer], expected, atol=1e-5, rtol=0)
    after_norm = states[-1][0, row.start : row.stop].double().mean(0)
    assert (layers[-1] - after_norm).norm() > 0.5 * after_norm.norm()
    torch.testing.assert_close(layers[-1], naive_mean(chat, row)[-1], atol=1e-5, rtol=0)


# --- a planted direction --------------------------------------------------------------------------------------------


def unit_vector():
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), dim=0)


def capitals(chat):
    return torch.tensor([chat.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"])


def without_case(chat):
    """Capitals are read exactly as small letters, so that PAIRS' two answers differ only in what is planted."""
    small = torch.tensor([chat.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"])
    with torch.no_grad():
        weight = chat.model.get_input_embeddings().weight
        weight[capitals(chat)] = weight[small]


def silence(chat, blocks):
    """These blocks pass the residual stream on unchanged."""
    writers = ("o_proj", "down_proj", "dense", "dense_4h_to_h")
    with torch.no_grad():
        for block in blocks:
            for name, module in block.named_modules():
                if name.rpartition(".")[2] in writers:
                    for parameter in module.parameters():
                        parameter.zero_()


@contextlib.contextmanager
def planted(chat, vector):
    """Block 1 adds `vector` at every capital letter."""
    ids, letters = [], capitals(chat)
    note = chat.decoder.register_forward_pre_hook(
        lambda _m, a, kw: ids.append(a[0] if a else kw["input_ids"]), with_kwargs=True
    )
    plant = chat.layers[PLANTED_LAYER].register_forward_hook(
        lambda _m, _a, out: out + torch.isin(ids[-1], letters).unsqueeze(-1) * vector
    )
    yield
    note.remove()
    plant.remove()


@pytest.fixture
def plain(chat):
    """Embeddings have nothing along u, and all blocks are silent: the residual stream is the embedding."""
    silence(chat, chat.layers)
    without_case(chat)
    with torch.no_grad():
        weight, u = chat.model.get_input_embeddings().weight, unit_vector()
        weight -= (weight @ u).unsqueeze(-1) * u
    return chat


@pytest.mark.parametrize("budget", [1, 2048])
def test_a_planted_direction_is_recovered(chat, budget):
    without_case(chat)
    silence(chat, chat.layers[PLANTED_LAYER + 1 :])
    u = unit_vector()
    with planted(chat, 2 * u):
        found = extract(chat, PAIRS, budget=budget)["data_difference"].vectors
    assert found[0].norm() < 1e-5
    for layer in range(PLANTED_LAYER, LAYERS):
        assert torch.cosine_similarity(found[layer], u, dim=0) > 0.999
        torch.testing.assert_close(found[layer], 2 * u, atol=1e-5, rtol=0)


def test_a_planted_direction_survives_active_blocks(chat):
    without_case(chat)
    u = unit_vector()
    with planted(chat, 100 * u):
        found = extract(chat, PAIRS)["data_difference"].vectors
    assert (torch.cosine_similarity(found[PLANTED_LAYER:], u, dim=-1) > 0.99).all()


@pytest.mark.parametrize("positions", ["all", "not_first"])
def test_ablating_the_found_direction_undoes_what_was_planted(plain, positions):
    row = encode(plain.tokenizer, "Why?", "ABCDEF")
    ids = torch.tensor([row.ids])
    u = unit_vector()
    with torch.no_grad():
        before, margin_before = plain.model(ids).logits, margin(plain, PAIRS)
        with planted(plain, 3 * u):
            found = extract(plain, PAIRS)["data_difference"][LAYERS - 1]
            changed, margin_changed = plain.model(ids).logits, margin(plain, PAIRS)
            with intervene(plain, [Ablate(found, positions=positions)]):
                after, margin_after = plain.model(ids).logits, margin(plain, PAIRS)
                left = residuals(plain, row.ids)
    assert (changed - before).abs().max() > 1e-3
    assert (margin_changed - margin_before).abs().min() > 1e-4
    assert (left[PLANTED_LAYER:] @ u).abs().max() < 1e-5
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    torch.testing.assert_close(margin_after, margin_before, atol=1e-5, rtol=0)


def test_ablation_in_an_active_network_hides_whether_anything_was_planted(chat):
    row = encode(chat.tokenizer, "Why?", "ABCDEF")
    ids, u = torch.tensor([row.ids]), unit_vector()
    with torch.no_grad(), intervene(chat, [Ablate(u, positions="all")]):
        unplanted = chat.model(ids).logits
    with torch.no_grad(), planted(chat, 3 * u), intervene(chat, [Ablate(u, positions="all")]):
        torch.testing.assert_close(chat.model(ids).logits, unplanted, atol=1e-5, rtol=0)
        assert (residuals(chat, row.ids) @ u).abs().max() < 1e-5
