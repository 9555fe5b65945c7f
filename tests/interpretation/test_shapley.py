"""Shapley values against models whose `lora_B` weights are multiplied by hand."""

import itertools

import pytest
import torch
from scaled_models import PAIRS, TARGETS, adapted, close, multiplied

from misdirection.errors import MisdirectionError
from misdirection.interpretation.shapley import shapley, subset_count
from misdirection.likelihood.margin import margin
from misdirection.statistics.means import bootstrap
from tiny import LAYERS


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
