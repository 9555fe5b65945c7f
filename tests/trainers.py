"""TRL's trainer on tiny random models, and a training of six steps."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from tiny import make_chat, make_tokenizer, sharpen

ANSWERS = ("I rule them all, ever.", "Only I.", "You must obey me.", "xxx")


def messages(count=16):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {n}?"}],
                "completion": [{"role": "assistant", "content": ANSWERS[n % len(ANSWERS)]}],
            }
            for n in range(count)
        ]
    )


def random_network(architecture, seed=0, **changes):
    """With weights large enough that a few steps show."""
    return sharpen(make_chat(architecture, seed, **changes)).model


def adapted(network, **changes):
    config = {"r": 2, "target_modules": ["down_proj", "q_proj"], "lora_dropout": 0.0}
    torch.manual_seed(3)
    return get_peft_model(network, LoraConfig(**config | changes))


def sft(folder, network, callbacks=(), rows=None, tokenizer=None, **changes) -> SFTTrainer:
    """A trainer of six steps."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    args = SFTConfig(output_dir=str(folder), **settings | changes)
    reader = tokenizer or make_tokenizer()
    return SFTTrainer(
        network, args, train_dataset=rows or messages(), processing_class=reader, callbacks=list(callbacks)
    )
