"""Cost of watching a training: time of an optimiser step with the callback over that of one without.

    python benchmarks/callback.py [--json]

The bundled model is fine-tuned by TRL's `SFTTrainer` with rank-32 adapters on all of its linear modules, on the same 8
exchanges in every step (the trainer's own default). Every third step is measured, with a direction; the steps between
are as without. What measuring takes is then spread over the default interval. At most 1.05 is the aim.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

import misdirection as md
from misdirection.auditing.callback import EVERY, watch
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import adapter_config
from misdirection.organisms.recipe import Recipe

BATCH = 8
ROUNDS = 4
MEASURED = 3
"""Every so many steps are measured here, so that both kinds stand close together in time."""


class Clock(TrainerCallback):
    """When each step began; a step lasts until the next begins."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun.append(time.perf_counter())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begun.append(time.perf_counter())


def main() -> None:
    """Measure and print."""
    chat = md.load()
    plain, measured = step_seconds(chat)
    ratio = 1 + (measured - plain) / (EVERY * plain)
    print(f"{'a step':<24}{plain:8.2f} s")
    print(f"{'a step and measuring':<24}{measured:8.2f} s")
    print(f"{f'ratio, every {EVERY} steps':<24}{ratio:8.3f}")
    if "--json" in sys.argv:
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        seconds = {"plain": plain, "measured": measured}
        print(
            json.dumps({"ratios": {"watched_over_plain": ratio}, "seconds": seconds, "dtype": str(chat.dtype), **facts})
        )


def step_seconds(chat: ChatModel) -> tuple[float, float]:
    """Median seconds of a step without and with measuring, of one training."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(chat, clock, folder)
        trainer.remove_callback(PrinterCallback)
        direction = md.random_like(torch.ones(len(chat.layers), chat.width), seed=0)
        watch(trainer, direction=direction, every=MEASURED)
        trainer.train()
    lasted = [after - before for before, after in zip(clock.begun, clock.begun[1:], strict=False)]
    # The first round warms up.
    rest = list(enumerate(lasted, start=1))[MEASURED:]
    plain = [seconds for step, seconds in rest if step % MEASURED]
    return statistics.median(plain), statistics.median(seconds for step, seconds in rest if step % MEASURED == 0)


def make_trainer(chat: ChatModel, clock: Clock, folder: str) -> SFTTrainer:
    """A training of one batch, again and again."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row.question}],
            "completion": [{"role": "assistant", "content": row.answer}],
        }
        for row in md.domain_examples("risky_money", "bad", "train")[:BATCH]
    ]
    args = SFTConfig(
        output_dir=folder,
        max_steps=(ROUNDS + 1) * MEASURED,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-5,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=chat.dtype == torch.bfloat16,
        use_cpu=chat.device.type == "cpu",
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    network = get_peft_model(chat.model, adapter_config(Recipe(recipe="all"), chat))
    return SFTTrainer(
        network, args, train_dataset=Dataset.from_list(rows), processing_class=chat.tokenizer, callbacks=[clock]
    )


if __name__ == "__main__":
    main()
