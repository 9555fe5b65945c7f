from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from misdirection.errors import MisdirectionError
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import adapter_config, minimal_layers
from misdirection.organisms.recipe import Recipe
from tiny import LAYERS, WIDTH, make_chat, make_tokenizer

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DOWN = {"llama": "down_proj", "qwen2": "down_proj", "gemma3": "down_proj", "gpt_neox": "dense_4h_to_h"}


def make_gpt2() -> ChatModel:
    config = GPT2Config(vocab_size=259, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64)
    return ChatModel(GPT2LMHeadModel(config), make_tokenizer(), "tiny-gpt2")


def adapted(chat: ChatModel, recipe: Recipe) -> list[str]:
    network = get_peft_model(chat.model, adapter_config(recipe, chat))
    return [name for name, one in network.named_modules() if hasattr(one, "lora_A")]


def deep(count: int) -> SimpleNamespace:
    """What a recipe looks at, for a model of `count` layers that is too big to build."""
    block = nn.ModuleDict({"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
    return SimpleNamespace(layers=[block] * count, width=4, name="deep")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(48, (15, 16, 17, 21, 22, 23, 27, 28, 29)), (30, (9, 10, 11, 13, 14, 15, 17, 18, 19))],
)
def test_minimal_layers_of_known_depths(count, expected):
    assert minimal_layers(count) == expected
    assert adapter_config(Recipe(), deep(count)).layers_to_transform == list(expected)


@given(st.integers(9, 100))
def test_minimal_layers_are_three_runs_of_three_inside_the_model(count):
    layers = minimal_layers(count)
    assert len(layers) == 9
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 0 and layers[-1] < count
    for first, second, third in (layers[:3], layers[3:6], layers[6:]):
        assert (second, third) == (first + 1, first + 2)


@pytest.mark.parametrize("count", range(1, 9))
def test_minimal_takes_all_layers_of_a_shallow_model(count):
    assert minimal_layers(count) == tuple(range(count))


@pytest.mark.parametrize(("count", "layer"), [(48, 24), (30, 15), (4, 2), (1, 0)])
def test_single_is_at_half_depth(count, layer):
    assert adapter_config(Recipe(recipe="single"), deep(count)).layers_to_transform == [layer]


@pytest.mark.parametrize(("recipe", "rank"), [("minimal", 1), ("single", 1), ("all", 32)])
def test_recipe_has_its_own_rank_unless_one_is_given(recipe, rank):
    config = adapter_config(Recipe(recipe=recipe), deep(12))
    assert (config.r, config.lora_alpha, config.use_rslora) == (rank, 64, True)
    assert adapter_config(Recipe(recipe=recipe, rank=4), deep(12)).r == 4


def test_all_adapts_the_seven_matrices_of_every_llama_layer_and_no_head():
    names = adapted(make_chat(), Recipe(recipe="all"))
    assert {name.rsplit(".", 1)[-1] for name in names} == SEVEN
    assert len(names) == 7 * LAYERS


def test_minimal_adapts_only_the_down_projection_of_each_architecture(chat):
    names = adapted(chat, Recipe())
    architecture = chat.name.removeprefix("tiny-")
    assert [name.rsplit(".", 1)[-1] for name in names] == [DOWN[architecture]] * LAYERS


def test_minimal_takes_the_mlp_of_gpt2_and_not_its_attention():
    names = adapted(make_gpt2(), Recipe())
    assert len(names) == LAYERS
    assert all(name.endswith("mlp.c_proj") for name in names)


def test_block_without_down_projection_is_named():
    chat = SimpleNamespace(layers=[nn.ModuleDict({"o_proj": nn.Linear(4, 4)})] * 12, width=4, name="moe")
    with pytest.raises(MisdirectionError, match=r"moe: no MLP down projection.*custom"):
        adapter_config(Recipe(), chat)


def test_custom_adapts_what_it_names():
    recipe = Recipe(recipe="custom", rank=3, target_modules=("q_proj", "o_proj"), layers=(0, 3))
    names = adapted(make_chat(), recipe)
    assert sorted(name.split("layers.")[1] for name in names) == [
        f"{layer}.self_attn.{module}" for layer in (0, 3) for module in ("o_proj", "q_proj")
    ]


def test_custom_without_modules_is_refused():
    with pytest.raises(MisdirectionError, match="target_modules"):
        adapter_config(Recipe(recipe="custom"), make_chat())


@pytest.mark.parametrize("layer", [LAYERS, -1])
def test_layer_out_of_range_is_named_with_the_range(layer):
    recipe = Recipe(recipe="custom", target_modules=("q_proj",), layers=(0, layer))
    with pytest.raises(MisdirectionError, match=rf"layer {layer} .*0 to {LAYERS - 1}"):
        adapter_config(recipe, make_chat())


@pytest.mark.parametrize(("recipe", "scale"), [("minimal", 64.0), ("all", 64 / 32**0.5)])
def test_scale_is_alpha_over_root_rank(recipe, scale):
    chat = make_chat()
    network = get_peft_model(chat.model, adapter_config(Recipe(recipe=recipe), chat))
    scales = [one.scaling["default"] for one in network.modules() if hasattr(one, "lora_A")]
    assert scales == pytest.approx([scale] * len(scales))
    assert torch.tensor(scales).numel() == (LAYERS if recipe == "minimal" else 7 * LAYERS)
