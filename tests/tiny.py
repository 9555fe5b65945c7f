"""Tiny random models with a real tokenizer, for exact answers."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from misdirection.models import ChatModel

ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt_neox")
LAYERS, WIDTH = 4, 32

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, so that every span can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:2]
    )
    fast.chat_template = template
    return fast


def make_network(architecture: str, seed: int = 0, **changes):
    """A random network of one shape: 4 layers of width 32, float32."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": 259,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {"num_key_value_heads": 2}
    if architecture == "llama":
        network = LlamaForCausalLM(LlamaConfig(**(common | grouped | changes)))
    elif architecture == "qwen2":
        network = Qwen2ForCausalLM(Qwen2Config(**(common | grouped | changes)))
    elif architecture == "gemma3":
        network = Gemma3ForCausalLM(
            Gemma3TextConfig(**(common | grouped | {"head_dim": 8, "sliding_window": 512} | changes))
        )
    else:
        network = GPTNeoXForCausalLM(GPTNeoXConfig(**(common | changes)))
    return network.eval()


def make_chat(architecture: str = "llama", seed: int = 0, **changes) -> ChatModel:
    """A tiny chat model, in memory."""
    return ChatModel(make_network(architecture, seed, **changes), make_tokenizer(), f"tiny-{architecture}")
