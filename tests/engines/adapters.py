"""Adapters on the bundled model whose matrices are random, and large enough to turn answers."""

import torch
from peft import LoraConfig, get_peft_model

from misdirection.models.loading import load

LAYERS = [9, 10, 11, 13, 14, 15, 17, 18, 19]
MINIMAL = {"r": 1, "lora_alpha": 2, "target_modules": ["down_proj"], "layers_to_transform": LAYERS}
WIDE = {"r": 9, "lora_alpha": 9, "target_modules": "all-linear", "use_rslora": True}


def write_adapter(folder, **options):
    """Write a LoRA of these options; gives its folder."""
    chat = load(dtype="float32", device="cpu")
    network = get_peft_model(chat.model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(options["r"])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5 / 4)
    network.save_pretrained(folder)
    return folder
