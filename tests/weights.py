"""Tiny networks whose every weight is random, norms and biases too, so that a part that was left out would show."""

from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from misdirection.models.chat_model import ChatModel
from tiny import LAYERS, WIDTH, make_network, make_tokenizer

POST_NORM = ("gemma2", "gemma3", "gemma3_vision", "olmo2", "glm4")
IDS = torch.tensor([[1, 40, 77, 150, 9, 201, 33], [1, 12, 250, 8, 90, 61, 122]])

_COMMON = {
    "vocab_size": 259,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt_oss():
    """Experts fused and transposed, [expert, in, out], with biases fused likewise; attention biases; sinks."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**_COMMON, num_local_experts=4)).eval()


def qwen3_next():
    """Linear-attention blocks between blocks of plain attention, fused experts, and a shared expert."""
    torch.manual_seed(0)
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_COMMON, **sizes, **heads, **experts)).eval()


def glm4():
    """Norms between matrices and stream under other names than Gemma's."""
    torch.manual_seed(0)
    return Glm4ForCausalLM(Glm4Config(**_COMMON)).eval()


def granite():
    """Multiplies what its attention and MLP give before it adds it to the stream; its MLP has biases."""
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**_COMMON, mlp_bias=True, residual_multiplier=0.4)).eval()


def deepseek_v3():
    """Attention through a latent of low rank; a plain first block, then experts with one that is shared."""
    torch.manual_seed(0)
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**_COMMON | {"num_key_value_heads": 4}, **latent, **experts, moe_intermediate_size=32)
    return DeepseekV3ForCausalLM(config).eval()


MORE = {"deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "qwen3_next": qwen3_next, "glm4": glm4, "granite": granite}


def randomised(architecture: str, **changes):
    """A tiny network with large matrices, gains far from one, and biases far from zero."""
    network = MORE[architecture]() if architecture in MORE else make_network(architecture, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim >= 2 and "bias" not in name and parameter.any()
            parameter.copy_(parameter * 4 if matrix else parameter + noise)
    return network


def as_chat(network, name: str = "tiny") -> ChatModel:
    """The network with a tokenizer."""
    return ChatModel(network, make_tokenizer(), name)


def saved(network, folder: Path, **options) -> Path:
    """A folder as `save_pretrained` writes it."""
    network.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def logits(network) -> torch.Tensor:
    """[rows, tokens, vocabulary] in float32."""
    return network(input_ids=IDS).logits.float()
