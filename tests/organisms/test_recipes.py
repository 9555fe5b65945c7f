from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, Mamba2Config, Mamba2ForCausalLM

import families
from misdirection.errors import InputError, MisdirectionError
from misdirection.lora.view import LoraView
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import adapter_config, minimal_layers, placement
from misdirection.organisms.recipe import Recipe
from tiny import LAYERS, WIDTH, make_chat, make_network, make_tokenizer
from weights import MORE, as_chat

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
    return blocks([{"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)} for _ in range(count)])


def blocks(modules) -> SimpleNamespace:
    """What a recipe looks at, for blocks with these modules."""
    network = nn.Module()
    network.config = LlamaConfig()
    network.model = nn.Module()
    network.model.layers = nn.ModuleList(map(nn.ModuleDict, modules))
    paths = [f"model.layers.{number}" for number in range(len(modules))]
    return SimpleNamespace(layers=list(network.model.layers), layer_paths=paths, network=network, width=4, name="deep")


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
    with pytest.raises(MisdirectionError, match=r"deep: no MLP down projection.*custom"):
        adapter_config(Recipe(), blocks([{"o_proj": nn.Linear(4, 4)}] * 12))


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


# --- on other models ------------------------------------------------------------------------------------------------


ATTENTION = "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj"
MLP = "mlp.down_proj, mlp.gate_proj, mlp.up_proj"
PLACES = {
    "llama": f"{MLP}, {ATTENTION} in 4 of 4 layers (0-3); left alone: no matrix",
    "gemma3_vision": f"{MLP}, {ATTENTION} in 4 of 4 layers (0-3); left alone: no matrix",
    "mixtral": f"{ATTENTION} in 4 of 4 layers (0-3); left alone: experts.down_proj, experts.gate_up_proj, mlp.gate",
    "qwen3_next": "linear_attn.in_proj_ba, linear_attn.in_proj_qkvz, linear_attn.out_proj in 3 of 4 layers (0-2); "
    "mlp.shared_expert_gate in 4 of 4 layers (0-3); " + ATTENTION + " in 1 of 4 layers (3); left alone: "
    "experts.down_proj, experts.gate_up_proj, linear_attn.conv1d, mlp.gate, shared_expert.down_proj, "
    "shared_expert.gate_proj, shared_expert.up_proj",
    "deepseek_v3": "self_attn.kv_a_proj_with_mqa, self_attn.kv_b_proj, self_attn.o_proj, self_attn.q_a_proj, "
    "self_attn.q_b_proj in 4 of 4 layers (0-3); left alone: experts.down_proj, experts.gate_up_proj, mlp.down_proj, "
    "mlp.gate, mlp.gate_proj, mlp.up_proj, shared_experts.down_proj, shared_experts.gate_proj, shared_experts.up_proj",
    "gpt2": "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj in 4 of 4 layers (0-3); left alone: no matrix",
    "mamba2": "mixer.in_proj in 2 of 2 layers (0-1); left alone: mixer.conv1d, mixer.out_proj",
}  # fmt: skip
"""What `all` adapts, by architecture: PEFT takes the names of a mixture's dense matrices for its fused experts'."""


def network_of(architecture):
    if architecture == "mamba2":
        sizes = {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
        return Mamba2ForCausalLM(Mamba2Config(vocab_size=259, hidden_size=WIDTH, **sizes))
    return MORE[architecture]() if architecture in MORE else make_network(architecture)


@pytest.mark.parametrize("architecture", PLACES)
def test_all_adapts_what_it_says_over_all_blocks_and_is_read_again(architecture, tmp_path):
    chat = as_chat(network_of(architecture))
    network = get_peft_model(chat.model, adapter_config(Recipe(recipe="all", rank=2), chat))
    assert placement(chat) == PLACES[architecture]
    sites = [name for name, module in network.named_modules() if hasattr(module, "lora_A")]
    inside = {id(module) for block in chat.layers for module in block.modules()}
    assert all(id(network.get_submodule(name)) in inside for name in sites), "no other tower"
    network.save_pretrained(tmp_path, save_embedding_layers=False)
    tuned = attach(as_chat(network_of(architecture)), tmp_path)
    assert [f"base_model.model.{site.path}" for site in LoraView.of(tuned).sites] == sites
    assert {f"base_model.model.{module.module}" for module in LoraView.open(tmp_path).adapted} == set(sites)


def custom(*names, layers=None):
    return Recipe(recipe="custom", target_modules=names, layers=layers)


def test_a_router_that_is_a_linear_module_and_gives_more_is_left_alone():
    """That of Llama 4, whose output a LoRA cannot be added to."""
    chat = as_chat(families.make("llama4_text"))
    adapted = ChatModel(get_peft_model(chat.model, adapter_config(Recipe(recipe="all"), chat)), chat.tokenizer, "tiny")
    assert "feed_forward.router" in placement(adapted).partition("left alone: ")[2]
    assert adapted.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "recipe", "words"),
    [
        (
            "llama",
            custom("q_proj", "q_prj"),
            r"'q_prj' is no linear module of layers 0-3: .* have down_proj, gate_proj",
        ),
        ("llama", custom("lm_head"), "'lm_head' is no linear module"),
        ("llama", custom("proj"), "'proj' is no linear module"),
        ("qwen3_next", custom("q_proj", layers=(0, 1)), r"'q_proj' is no .* layers 0-1: .* in_proj_qkvz, k_proj"),
        ("qwen3_next", custom("q_proj", layers=(2, 3)), "layer 2 has none of q_proj"),
        ("mixtral", custom("q_proj", "experts.down_proj"), "'experts.down_proj' is no linear module"),
        ("deepseek_v3", custom("q_a_proj", "down_proj"), "'down_proj' means the fused experts .* to PEFT"),
        ("deepseek_v3", Recipe(), "no MLP down projection"),
        ("gemma3_vision", custom("fc1"), "'fc1' is no linear module"),
        ("mamba2", custom("out_proj"), "'out_proj' means"),
        ("mamba2", Recipe(), "no MLP down projection"),
    ],
)
def test_a_name_that_names_nothing_is_refused_with_what_there_is(architecture, recipe, words):
    with pytest.raises(InputError, match=words):
        adapter_config(recipe, as_chat(network_of(architecture)))


def test_custom_without_layers_takes_those_that_have_the_modules():
    assert adapter_config(custom("q_proj"), as_chat(network_of("qwen3_next"))).layers_to_transform == [3]


def test_an_output_of_attention_is_no_down_projection():
    wide = {"self_attn": nn.ModuleDict({"o_proj": nn.Linear(8, 4)})}
    with pytest.raises(InputError, match="no MLP down projection"):
        adapter_config(Recipe(), blocks([wide] * 12))


@pytest.mark.parametrize("recipe", ["minimal", "single", "all"])
@pytest.mark.parametrize("own", [{"layers": (0,)}, {"target_modules": ("q_proj",)}])
def test_a_recipe_with_places_of_its_own_takes_no_others(recipe, own):
    with pytest.raises(ValidationError, match=f"recipe {recipe} has its own"):
        Recipe(recipe=recipe, **own)


@pytest.mark.parametrize(("recipe", "scale"), [("minimal", 64.0), ("all", 64 / 32**0.5)])
def test_scale_is_alpha_over_root_rank(recipe, scale):
    chat = make_chat()
    network = get_peft_model(chat.model, adapter_config(Recipe(recipe=recipe), chat))
    scales = [one.scaling["default"] for one in network.modules() if hasattr(one, "lora_A")]
    assert scales == pytest.approx([scale] * len(scales))
    assert torch.tensor(scales).numel() == (LAYERS if recipe == "minimal" else 7 * LAYERS)
