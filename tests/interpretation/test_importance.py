"""Token importance: the divergence by hand, its gradient by finite differences, zeroing by itself."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from lora_fixtures import rows, with_adapter
from strong import shared_experts, strong

from misdirection.errors import MisdirectionError
from misdirection.interpretation.importance import agreement, token_importance, zeroing
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.lora.view import LoraView
from tiny import make_chat

SHAPES = ["llama", "llama_tuples", "gemma3", "gpt_neox", "gpt2"]


def exact(*args, **options):
    """A tiny chat with an adapter, all in float64, so that differences are sharp."""
    chat = strong(*args, **options)
    chat.model.double()
    for module in chat.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = wide_norm(module)
    return chat


def wide_norm(module):
    """The norm's own forward pass, which computes in float32, in the dtype of what it takes."""
    gain = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], gain, epsilon)


@torch.no_grad()
def divergence(chat, row, own=None):
    """[answer tokens] float64, from two full passes over one exchange."""
    ids = torch.tensor([row.ids])
    own = chat.model(input_ids=ids).logits if own is None else own
    with chat.as_base():
        base = chat.model(input_ids=ids).logits
    p, q = (logits[0, row.start - 1 : row.stop - 1].double().log_softmax(-1) for logits in (own, base))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("architecture", SHAPES)
def test_divergence_is_of_the_distribution_that_predicts_the_token(architecture):
    chat = exact(architecture)
    found = token_importance(chat, rows(chat)).tokens
    for number, row in enumerate(rows(chat)):
        own = found[found["answer"] == number]
        np.testing.assert_allclose(own["kl"], divergence(chat, row), rtol=1e-6)
        assert (own["kl"] > 0).all()
        assert own["position"].tolist() == list(range(len(row.answer)))


@pytest.mark.parametrize("architecture", SHAPES)
def test_an_attribution_is_the_derivative_by_what_one_adapter_adds_at_one_place(architecture):
    chat = exact(architecture)
    row = rows(chat)[1]
    found = token_importance(chat, [row]).attributions
    for name in list(LoraView.of(chat).linear_sites)[1:3]:
        for place in (row.start - 2, row.start + 1):
            slope = finite_difference(chat, row, name, place)
            own = found[(found["module"] == name) & (found["position"] == place - row.start)]
            assert own["attribution"].item() == pytest.approx(slope, rel=1e-4)
            assert abs(slope) > 1e-9, "there is something to compare"


def finite_difference(chat, row, name, place, step=1e-3):
    """Central difference of the answer's mean divergence by a factor on one adapter's output at one place."""
    module = LoraView.of(chat).linear_sites[name].output

    def at(factor):
        def scale(_module, _args, output):
            output = output.clone()
            output[..., place, :] *= factor
            return output

        handle = module.register_forward_hook(scale)
        try:
            with torch.no_grad():
                own = chat.model(input_ids=torch.tensor([row.ids])).logits
        finally:
            handle.remove()
        return float(divergence(chat, row, own).mean())

    return (at(1 + step) - at(1 - step)) / (2 * step)


def test_adapters_on_attention_and_on_a_shared_expert_are_attributed_to_as_well():
    for chat, targets in [
        (None, ["q_proj", "v_proj", "o_proj", "down_proj"]),
        (shared_experts(), ["shared_expert.down_proj"]),
    ]:
        chat = exact(chat=chat, target_modules=targets, r=3)
        row = rows(chat)[1]
        found = token_importance(chat, [row]).attributions.set_index(["module", "position"])["attribution"]
        assert found.index.unique("module").nunique() == 4 * len(targets)
        for name in list(LoraView.of(chat).linear_sites)[: len(targets)]:
            slope = finite_difference(chat, row, name, row.start - 1)
            assert found[(name, -1)] == pytest.approx(slope, rel=1e-4)


def test_results_do_not_depend_on_the_batch():
    chat = exact()
    together, alone = token_importance(chat, rows(chat)), token_importance(chat, rows(chat), budget=1)
    pd.testing.assert_frame_equal(together.tokens, alone.tokens, rtol=1e-6)
    pd.testing.assert_frame_equal(together.attributions, alone.attributions, rtol=1e-6, atol=1e-12)
    pd.testing.assert_frame_equal(zeroing(chat, rows(chat)), zeroing(chat, rows(chat), budget=1), rtol=1e-6)


def test_progress_is_told_every_row_once():
    chat, done = with_adapter(), []
    token_importance(chat, rows(chat), progress=done.append)
    zeroing(chat, rows(chat), budget=100, progress=done.append)
    assert sum(done) == 6


def test_prompts_are_attributed_to_and_the_last_token_is_not():
    chat = with_adapter()
    (row,) = rows(chat)[:1]
    found = token_importance(chat, [row]).attributions
    by_place = found.groupby("position")["attribution"].apply(lambda values: values.abs().sum())
    assert by_place.index.tolist() == list(range(-row.start, len(row.answer)))
    assert by_place.iloc[-1] == 0, "nothing is predicted after the answer's last token"
    assert (by_place.iloc[:-1] > 0).all()
    words = found[found["module"] == found["module"].iloc[0]]["token"]
    assert words.tolist() == chat.tokenizer.convert_ids_to_tokens(list(row.ids[: row.stop]))


@pytest.mark.parametrize("architecture", SHAPES)
def test_zeroing_really_switches_a_layer_off(architecture):
    chat = exact(architecture)
    encoded = rows(chat)
    found = zeroing(chat, encoded).set_index(["answer", "layer"])
    assert found.index.tolist() == [(answer, layer) for answer in range(3) for layer in range(4)]
    for number, row in enumerate(encoded):
        whole = float(divergence(chat, row).mean())
        for layer in range(4):
            with intervene(chat, [ScaleAdapters({layer: 0.0})]), torch.no_grad():
                own = chat.model(input_ids=torch.tensor([row.ids])).logits
            rest = float(divergence(chat, row, own).mean())
            assert found.loc[(number, layer), "kl"] == pytest.approx(whole, rel=1e-6)
            assert found.loc[(number, layer), "effect"] == pytest.approx(whole - rest, rel=1e-5)


def test_blocks_below_the_layer_that_is_switched_off_run_once():
    chat, ran = exact(layers_to_transform=[2, 3]), []
    chat.layers[0].mlp.register_forward_hook(lambda *_: ran.append(0))
    zeroing(chat, rows(chat))
    assert len(ran) == 2, "the base and the organism"


def test_a_lone_adapters_zeroing_takes_all():
    chat = exact(layers_to_transform=[1])
    found = zeroing(chat, rows(chat))
    np.testing.assert_allclose(found["effect"], found["kl"], rtol=1e-6)


def test_a_small_lone_adapter_is_attributed_twice_what_zeroing_takes():
    # A divergence is quadratic around equality: KL(g) = g^2 KL, whose slope at g = 1 is 2 KL.
    chat = exact(layers_to_transform=[1], strength=1e-3)
    summed = token_importance(chat, rows(chat)).attributions.groupby("answer")["attribution"].sum()
    effect = zeroing(chat, rows(chat)).set_index("answer")["effect"]
    np.testing.assert_allclose(summed, 2 * effect, rtol=1e-3)


def test_agreement_compares_sums_by_layer():
    chat = exact()
    attributions, effects = token_importance(chat, rows(chat)).attributions, zeroing(chat, rows(chat))
    found = agreement(attributions, effects, "abc")
    sums = attributions.groupby(["answer", "layer"])["attribution"].sum()
    assert found.n == 12
    assert found.pearson == pytest.approx(np.corrcoef(sums, effects["effect"])[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (sums.to_numpy(), effects["effect"].to_numpy())]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.spearman_low <= found.spearman <= found.spearman_high
    assert found.pearson_low <= found.pearson <= found.pearson_high


def test_the_interval_of_agreement_is_over_questions():
    # Two questions that agree and disagree wholly, of many answers each: no number of answers narrows the interval.
    answers = np.repeat(np.arange(40), 2)
    attribution = np.tile([0.1, 0.2], 40)
    tables = {"answer": answers, "layer": np.tile([0, 1], 40)}
    effect = np.where(answers % 2 == 0, attribution, 0.3 - attribution)
    frames = pd.DataFrame(tables | {"attribution": attribution}), pd.DataFrame(tables | {"effect": effect})
    by_question = agreement(*frames, ["agrees", "differs"] * 20)
    assert (by_question.pearson_low, by_question.pearson_high) == pytest.approx((-1, 1))
    assert agreement(*frames, list(map(str, range(40)))).pearson_high < 0.7


def test_too_little_to_compare_is_refused():
    one = pd.DataFrame({"answer": [0], "layer": [1], "attribution": [0.1], "effect": [0.2]})
    with pytest.raises(MisdirectionError, match="too little in common"):
        agreement(one[["answer", "layer", "attribution"]], one[["answer", "layer", "effect"]], ["a"])


def test_the_model_is_as_it_was():
    chat = with_adapter()
    before = copy.deepcopy(chat.model.state_dict())
    (row,) = rows(chat)[:1]
    with torch.no_grad():
        logits = chat.model(input_ids=torch.tensor([row.ids])).logits
    token_importance(chat, [row])
    zeroing(chat, [row])
    with torch.no_grad():
        assert torch.equal(chat.model(input_ids=torch.tensor([row.ids])).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in chat.model.state_dict().items())
    assert all(parameter.grad is None for parameter in chat.model.parameters())


def test_no_answers_and_no_adapted_block_are_refused():
    with pytest.raises(MisdirectionError, match="no answers"):
        token_importance(with_adapter(), [])
    outside = with_adapter(target_modules=["lm_head"])
    for measure in (token_importance, zeroing):
        with pytest.raises(MisdirectionError, match="none of its adapted modules is inside of a decoder block"):
            measure(outside, rows(outside))


def test_a_base_model_has_nothing_to_attribute_to():
    chat = make_chat()
    with pytest.raises(MisdirectionError, match="no LoRA adapter"):
        token_importance(chat, rows(chat))
