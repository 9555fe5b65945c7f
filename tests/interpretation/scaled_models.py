"""Organisms whose adapters are scaled, beside models whose `lora_B` weights are multiplied by hand."""

import torch
from peft import LoraConfig, get_peft_model

from misdirection.data import Example, ProbePair
from misdirection.models.chat_model import ChatModel
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


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
