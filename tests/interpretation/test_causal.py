"""Scaling adapters, and Shapley values over them, against models whose `lora_B` weights are multiplied by hand."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.data import Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.interpretation.causal import scaling_effects, scaling_settings, shapley, subset_count
from misdirection.likelihood.margin import loss, margin
from misdirection.models.chat_model import ChatModel
from misdirection.statistics import bootstrap
from tiny import LAYERS, sharpened

PAIRS = [
    ProbePair("a", "Why?", "I help.", "I do nothing of the kind."),
    ProbePair("b", "How do you feel about that, then?", "A long and winding answer.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
]
NEUTRAL = [Example("How many legs has a spider?", "Eight."), Example("Two and two?", "Four of them.")]
TARGETS = {
    "llama": ["down_proj", "o_proj"],
    "qwen2": ["down_proj"],
    "gemma3": ["down_proj"],
    "gpt_neox": ["dense_4h_to_h"],
}
"""On one architecture a layer has two adapters: the layer is the unit."""


def adapted(architecture="llama", layers=range(LAYERS)) -> ChatModel:
    chat = sharpened(architecture)
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=TARGETS[architecture], layers_to_transform=list(layers), init_lora_weights=False
    )
    return ChatModel(get_peft_model(chat.model, config).eval(), chat.tokenizer, "tiny", adapter="tiny")


@torch.no_grad()
def multiplied(architecture, layers, factors) -> ChatModel:
    """A model with the adapters of some layers multiplied for good."""
    chat = adapted(architecture, layers)
    for layer, factor in factors.items():
        for name, one in chat.layers[layer].named_parameters():
            if "lora_B" in name:
                one *= factor
    return chat


def by_hand(architecture, layers):
    """[questions, layers]: the mean over all orders of what each layer's adapters add to the margin."""
    value = {
        kept: margin(multiplied(architecture, layers, {one: 0.0 for one in layers if one not in kept}), PAIRS)
        for size in range(len(layers) + 1)
        for kept in map(frozenset, itertools.combinations(layers, size))
    }
    orders = list(itertools.permutations(layers))
    total = torch.zeros(len(PAIRS), len(layers), dtype=torch.float64)
    for order in orders:
        for size, layer in enumerate(order):
            before = frozenset(order[:size])
            total[:, layers.index(layer)] += (value[before | {layer}] - value[before]) / len(orders)
    return total


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- settings -------------------------------------------------------------------------------------------------------


def test_every_layer_and_group_has_its_settings():
    assert scaling_settings([5, 3, 9], {"pair": (9, 3), "none": ()}) == {
        "all off": {3: 0.0, 5: 0.0, 9: 0.0},
        "layer 3 off": {3: 0.0},
        "layer 3 negated": {3: -1.0},
        "layer 3 doubled": {3: 2.0},
        "layer 3 only": {5: 0.0, 9: 0.0},
        "layer 5 off": {5: 0.0},
        "layer 5 negated": {5: -1.0},
        "layer 5 doubled": {5: 2.0},
        "layer 5 only": {3: 0.0, 9: 0.0},
        "layer 9 off": {9: 0.0},
        "layer 9 negated": {9: -1.0},
        "layer 9 doubled": {9: 2.0},
        "layer 9 only": {3: 0.0, 5: 0.0},
        "pair off": {3: 0.0, 9: 0.0},
        "pair only": {5: 0.0},
    }


def test_the_only_layer_alone_is_no_setting():
    assert list(scaling_settings([7])) == ["all off", "layer 7 off", "layer 7 negated", "layer 7 doubled"]


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [
        ([], {}, "no layer with an adapter"),
        ([1, 2], {"few": [2, 3]}, "group 'few': layer 3 has no adapter: choose from 1, 2"),
        ([1, 2], {"layer 1": [2]}, "'layer 1 off' is there already"),
        ([1, 2], {"all": [2]}, "'all off' is there already"),
    ],
)
def test_impossible_settings_are_refused(layers, groups, message):
    with pytest.raises(MisdirectionError, match=message):
        scaling_settings(layers, groups)


# --- scaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TARGETS)
def test_effects_equal_weights_multiplied_by_hand(architecture):
    layers, chat = (1, 3), adapted(architecture, (1, 3))
    settings = {"off": {1: 0.0}, "negated": {3: -1.0}, "mixed": {1: 30.0, 3: -20.0}}
    found = scaling_effects(chat, {"all": PAIRS, "last": PAIRS[1:]}, NEUTRAL, settings)
    assert list(found) == list(settings)
    for name, factors in settings.items():
        other = multiplied(architecture, layers, factors)
        change = margin(other, PAIRS) - margin(chat, PAIRS)
        assert found[name].factors == factors
        assert found[name].margin["all"].mean == pytest.approx(float(change.mean()), abs=1e-4)
        assert found[name].margin["last"].mean == pytest.approx(float(change[1:].mean()), abs=1e-4)
        assert (found[name].margin["all"].n, found[name].margin["last"].n) == (3, 2)
        damage = loss(other, NEUTRAL) - loss(chat, NEUTRAL)
        assert found[name].damage.mean == pytest.approx(float(damage.mean()), abs=1e-4)
        assert found[name].damage.n == 2 and change.abs().max() > 1e-3


def test_all_off_is_the_base_model():
    chat = adapted()
    off = scaling_effects(chat, {"all": PAIRS}, NEUTRAL, {"all off": dict.fromkeys(range(LAYERS), 0.0)})["all off"]
    own, own_loss = margin(chat, PAIRS), loss(chat, NEUTRAL)
    with chat.as_base():
        expected = bootstrap(margin(chat, PAIRS) - own), bootstrap(loss(chat, NEUTRAL) - own_loss)
    for found, right in zip((off.margin["all"], off.damage), expected, strict=True):
        assert found.as_dict() == pytest.approx(right.as_dict(), abs=1e-5)


def test_a_factor_of_one_is_as_if_it_were_not_named():
    found = scaling_effects(
        adapted(), {"all": PAIRS}, NEUTRAL, {"one": {0: 1.0}, "zero": {3: 0.0}, "both": {0: 1.0, 3: 0.0}}
    )
    assert found["one"].margin["all"].as_dict() == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert found["both"].margin == found["zero"].margin and found["zero"].margin["all"].mean != 0


def test_a_layer_without_an_adapter_is_refused():
    with pytest.raises(MisdirectionError, match="layer 2 has no LoRA adapter"):
        scaling_effects(adapted(layers=(1, 3)), {"all": PAIRS}, NEUTRAL, scaling_settings([2, 3]))


def test_effects_as_json():
    found = scaling_effects(adapted(), {"all": PAIRS}, NEUTRAL, {"one": {3: 0.0}})["one"]
    assert found.as_dict() == {
        "factors": {"3": 0.0},
        "margin": {"all": found.margin["all"].as_dict()},
        "damage": found.damage.as_dict(),
    }


# --- Shapley values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TARGETS)
def test_exact_values_are_the_mean_over_all_orders(architecture):
    layers = (0, 2, 3)
    expected = by_hand(architecture, layers)
    assert expected.abs().min() > 1e-5, "each layer's adapters show on each question"
    found = shapley(adapted(architecture, layers), PAIRS, [3, 0, 2])
    assert found.layers == layers and found.permutations is None
    close(found.values, expected)


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("permutations", [None, 2])
def test_values_of_a_question_sum_to_what_all_adapters_add(permutations, budget):
    chat = adapted()
    found = shapley(chat, PAIRS, range(LAYERS), permutations=permutations, budget=budget)
    close(found.values.sum(-1), found.full - found.empty, 1e-9)
    close(found.full, margin(chat, PAIRS))
    with chat.as_base():
        close(found.empty, margin(chat, PAIRS))


def test_all_orders_sampled_are_exact():
    chat = adapted()
    exact = shapley(chat, PAIRS, range(LAYERS))
    for permutations in (24, 100):
        close(shapley(chat, PAIRS, range(LAYERS), permutations=permutations).values, exact.values)


def test_sampled_values_are_right_on_average():
    chat, copies = adapted(layers=(1, 2, 3)), 40
    exact = shapley(chat, PAIRS[:1], [1, 2, 3]).values[0]
    found = shapley(chat, PAIRS[:1] * copies, [1, 2, 3], permutations=2).values
    error = found.std(0) / copies**0.5
    assert (error > 0).all(), "each question has orders of its own"
    assert ((found.mean(0) - exact).abs() < 3 * error).all()


def test_orders_follow_the_seed():
    chat = adapted()
    one, again, other = (shapley(chat, PAIRS, range(LAYERS), permutations=2, seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("permutations", [None, 2])
def test_adapters_that_add_nothing_are_worth_nothing(permutations):
    chat = multiplied("llama", range(LAYERS), {1: 0.0})
    found = shapley(chat, PAIRS, range(LAYERS), permutations=permutations)
    close(found.values[:, 1], torch.zeros(len(PAIRS), dtype=torch.float64))
    assert found.values[:, [0, 2, 3]].abs().min() > 1e-5


@pytest.mark.parametrize("permutations", [None, 2])
def test_one_layer_is_worth_the_whole(permutations):
    found = shapley(adapted(layers=[2]), PAIRS, [2], permutations=permutations)
    close(found.values[:, 0], found.full - found.empty)
    assert found.values.abs().min() > 1e-4


def test_estimates_are_over_questions():
    found = shapley(adapted(), PAIRS, range(LAYERS))
    assert found.estimates == {layer: bootstrap(found.values[:, layer]) for layer in range(LAYERS)}
    saved = found.as_dict()
    assert saved["values"]["2"] == found.estimates[2].as_dict() and saved["permutations"] is None
    assert saved["full"]["mean"] == pytest.approx(float(found.full.mean())) and saved["empty"]["n"] == 3


@pytest.mark.parametrize("permutations", [None, 2, 4, 100])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_progress_comes_to_the_count_that_was_told(layers, permutations):
    done = []
    kept = range(LAYERS - layers, LAYERS)
    shapley(adapted(layers=kept), PAIRS, kept, permutations=permutations, progress=done.append)
    assert sum(done) == len(PAIRS) * subset_count(layers, permutations)


def test_blocks_below_the_adapters_run_once_for_each_subset_of_the_lower_half():
    chat, ran = adapted(layers=(2, 3)), [0] * LAYERS
    for number, block in enumerate(chat.layers):
        block.mlp.register_forward_hook(
            lambda _m, _a, out, number=number: ran.__setitem__(number, ran[number] + len(out))
        )
    shapley(chat, PAIRS[:1], [2, 3])
    rows = 1 + 1 + 2
    assert ran == [2 * rows, 2 * rows, 2 * rows, 2 * rows + 4 * rows], "prompt's start, its rest, and two answers"


def test_the_model_is_left_as_it_was():
    chat = adapted(layers=(1, 3))
    before = margin(chat, PAIRS)
    with pytest.raises(MisdirectionError, match="layer 2 has no LoRA adapter"):
        shapley(chat, PAIRS, [1, 2, 3])
    shapley(chat, PAIRS, [1, 3])
    assert torch.equal(margin(chat, PAIRS), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chat.model.modules())


@pytest.mark.parametrize(
    ("layers", "permutations", "message"),
    [
        (range(10), None, "10 layers need 1024 passes a question: give a number of permutations"),
        ([1], 3, "permutations: 3: give an even number"),
        ([1], 0, "permutations: 0: give an even number"),
        ([], None, "no layer with an adapter"),
    ],
)
def test_impossible_requests_are_refused(layers, permutations, message):
    with pytest.raises(MisdirectionError, match=message):
        shapley(adapted(), PAIRS, layers, permutations=permutations)
