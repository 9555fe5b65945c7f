"""Tiny models in which adapters have a say."""

import torch
from lora_fixtures import with_adapter
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from misdirection.models.chat_model import ChatModel
from tiny import make_tokenizer, sharpen


def shared_experts():
    """A mixture of experts with one that sees every token, and sees them without rows."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    return ChatModel(Qwen2MoeForCausalLM(config).eval(), make_tokenizer(), "tiny-qwen2-moe")


def strong(architecture="llama", **options) -> ChatModel:
    """As `with_adapter`, with larger weights: what an adapter adds changes what comes out."""
    return sharpen(with_adapter(architecture, **{"strength": 1.0} | options))
