import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from misdirection.cost.model_cost import Pass, peak_memory
from misdirection.models.chat_model import ChatModel
from misdirection.models.sizes import Shape
from misdirection.organisms.adapter_config import adapter_config
from misdirection.organisms.recipe import Recipe
from tiny import LAYERS, make_chat

ROWS, COLUMNS, HEAD = 3, 10, 4
# GPT-2 and NeoX multiply their biases and positions otherwise; their matrices are the same.
DENSE = ("llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "phi3")


def counted(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def eager(architecture, **changes):
    chat = make_chat(architecture, **changes)
    # The counter knows matrix products, not every fused attention.
    chat.model.set_attn_implementation("eager")
    return chat


def ids():
    return torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 200 + 3


@pytest.mark.parametrize("architecture", DENSE)
def test_a_forward_pass_has_the_flops_that_torch_counts(architecture):
    chat = eager(architecture)
    shape = Shape.of(chat, 4)
    with torch.inference_mode():
        found = counted(lambda: chat.model(input_ids=ids(), use_cache=False, logits_to_keep=HEAD))
    planned = Pass(ROWS, COLUMNS, head=ROWS * HEAD).flops(shape)
    assert planned == pytest.approx(found, rel=0.01)


def test_a_pass_on_a_cache_attends_to_what_was_seen():
    chat = eager("llama")
    with torch.inference_mode():
        seen = chat.model(input_ids=ids(), use_cache=True)
        found = counted(lambda: chat.model(input_ids=ids()[:, :1], past_key_values=seen.past_key_values))
    planned = Pass(ROWS, 1, seen=COLUMNS, head=ROWS, kind="decoding").flops(Shape.of(chat, 4))
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("recipe", [Recipe(recipe="all"), Recipe(recipe="minimal"), Recipe(recipe="single")])
def test_training_a_frozen_base_has_the_flops_that_torch_counts(recipe):
    chat = eager("llama")
    shape, settings = Shape.of(chat, 4), adapter_config(recipe, chat)
    network = get_peft_model(chat.model, settings)
    lora = sum(one.numel() for one in network.parameters() if one.requires_grad)
    kept = torch.arange(COLUMNS - HEAD, COLUMNS)

    def step():
        network(input_ids=ids(), use_cache=False, logits_to_keep=kept).logits.sum().backward()

    back = LAYERS - min(settings.layers_to_transform)
    planned = Pass(ROWS, COLUMNS, head=ROWS * HEAD, back=back, lora=lora, kind="training").flops(shape)
    # The lowest adapted block is counted whole, and the gradient ends inside of it.
    assert planned == pytest.approx(counted(step), rel=0.1 if recipe.recipe == "all" else 0.2)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_of_a_mixture_only_the_chosen_experts_count(architecture):
    two, all_ = (Shape.of(make_chat(architecture, num_experts_per_tok=chosen), 4) for chosen in (2, 4))
    experts = sum(one.numel() for name, one in make_chat(architecture).model.named_parameters() if ".experts." in name)
    assert all_.active - two.active == experts / 2
    assert two.parameters == all_.parameters
    assert two.stored == all_.active


def test_a_published_model_has_its_published_sizes():
    config = Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shape = Shape.of(ChatModel(AutoModelForCausalLM.from_config(config), None, "qwen"), 2)
    # The model card: 14.7B parameters, 13.1B of them no embeddings.
    assert shape.parameters == pytest.approx(14.7e9, rel=0.01)
    assert shape.active == pytest.approx(13.1e9, rel=0.01)
    assert shape.cached == 48 * 2 * 8 * 128
    memory = peak_memory(shape, [Pass(64, 1, seen=1023, head=64, kind="decoding")])
    assert memory.weights == pytest.approx(29.5e9, rel=0.01)
    assert memory.cache == 64 * 1024 * 2 * shape.cached
    assert memory.total == memory.weights + memory.cache + memory.activations


def test_checkpointing_runs_blocks_again_and_keeps_less():
    shape = Shape.of(make_chat("llama"), 2)
    plain = Pass(2, 50, head=20, back=LAYERS, lora=100, kind="training")
    again = Pass(2, 50, head=20, back=LAYERS, recomputed=LAYERS, lora=100, kind="training")
    assert again.flops(shape) > plain.flops(shape)
    assert peak_memory(shape, [again]).activations < peak_memory(shape, [plain]).activations
    assert peak_memory(shape, [again]).optimiser == 1600


def test_a_resumed_pass_costs_its_own_blocks():
    shape = Shape.of(make_chat("llama"), 2)
    whole, half = Pass(2, 50).flops(shape), Pass(2, 50, blocks=LAYERS // 2).flops(shape)
    assert half == pytest.approx(whole / 2)
