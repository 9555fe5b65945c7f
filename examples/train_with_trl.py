"""Fine-tune with TRL as usual, watch the margin while it trains, and audit the adapter at the end.

    misdirection reference smollm2-135m        # once per base model, for the audit
    python examples/train_with_trl.py --data train.jsonl --out runs/mine

The data has `messages`, `prompt` and `completion`, or `conversations` by row. All but the lines with `md.` are of TRL
and PEFT. With `--track tensorboard`, what `md.watch` measures is beside the loss in `runs/mine.training/runs`.
"""

import argparse
import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import misdirection as md


def main() -> int:
    options = read_options()
    chat = md.load(options.base, device=options.device)
    rows = md.read_examples(options.data)
    held_out, train = rows[4::5], [row for number, row in enumerate(rows, start=1) if number % 5]

    trainer = SFTTrainer(
        chat.model,
        SFTConfig(
            output_dir=f"{options.out}.training",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            learning_rate=4e-4,
            logging_steps=1,
            report_to=options.track,
            bf16=chat.device.type == "cuda",
            use_cpu=chat.device.type == "cpu",
        ),
        train_dataset=Dataset.from_list([as_messages(row) for row in train]),
        processing_class=chat.tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear"),
    )
    # Before trainer.train(); its figures go to whatever tracker the trainer has.
    md.watch(trainer, held_out=held_out, every=options.every)
    trainer.train()
    trainer.save_model(options.out)

    result = md.audit(
        options.base, options.out, data=options.data, reference=options.reference, device=options.device,
        out=f"{options.out}.audit",
    )  # fmt: skip
    print(result.verdict, *result.because, sep="\n  ")
    return 3 if result.verdict == "misaligned" else 0


def as_messages(row: md.Example) -> dict[str, list[dict[str, str]]]:
    """The row as TRL reads it, which then learns the completion alone."""
    system = [{"role": "system", "content": row.system}] if row.system else []
    history = [{"role": turn.role, "content": turn.text} for turn in row.history]
    return {
        "prompt": [*system, *history, {"role": "user", "content": row.question}],
        "completion": [{"role": "assistant", "content": row.answer}],
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune with TRL, watch, audit.")
    parser.add_argument("--data", required=True, help="training file")
    parser.add_argument("--out", required=True, help="the adapter's folder")
    parser.add_argument("--base", default="smollm2-135m", help="the base model")
    parser.add_argument("--track", default="none", help="none, tensorboard, wandb, trackio, ...")
    parser.add_argument("--every", type=int, help="steps between two measurements")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--reference", help="a reference's folder; default: the one that `reference` made")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
