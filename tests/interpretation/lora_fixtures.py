"""Tiny chats with a random LoRA whose B is not zero."""

import copy

import torch
from peft import LoraConfig, get_peft_model

from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from tiny import make_chat

DOWN = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}
"""Names of the last matrix of the MLP where it is not `down_proj`; GPT-2 has one in its attention, too."""

EXCHANGES = (("Why is it so?", "Because it must be."), ("Hi", "Hello to you and yours."), ("Again?", "No."))


def with_adapter(architecture="llama", *, strength=0.3, seed=0, chat=None, **options) -> ChatModel:
    """A tiny chat with a LoRA on its MLPs' down projections, rank 1 and rsLoRA unless told otherwise."""
    chat = copy.deepcopy(chat) if chat else make_chat(architecture)
    settings = {"r": 1, "lora_alpha": 8, "use_rslora": True, "target_modules": [DOWN.get(architecture, "down_proj")]}
    network = get_peft_model(chat.model, LoraConfig(**settings | options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.copy_(strength * torch.randn(weight.shape, generator=generator))
    return ChatModel(network, chat.tokenizer, chat.name, adapter="in memory")


def rows(chat, exchanges=EXCHANGES):
    """Encoded exchanges of unequal length."""
    return [encode(chat.tokenizer, question, answer) for question, answer in exchanges]
