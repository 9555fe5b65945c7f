"""Tokens per second of extraction over a bare decoder forward on the same batches.

    python benchmarks/extraction.py [--json]

Both sides run interleaved in one process; the ratio is the median over rounds. Above 0.85 is the aim: the sums over
answer tokens at every layer should cost little beside the forward itself.
"""

import json
import platform
import sys

import torch

import misdirection as md
from misdirection.directions.extraction import mean_activations
from misdirection.models.budgets import tokens_together
from misdirection.models.chat import batches, encode, pad
from timing import interleaved

ROUNDS = 5
QUESTIONS = 16


def main() -> None:
    """Measure and print."""
    chat = md.load()
    pairs = md.domain_pairs("risky_money", "train")[:QUESTIONS]
    rows = [encode(chat.tokenizer, p.question, answer) for p in pairs for answer in (p.misaligned, p.aligned)]
    groups = {"misaligned": range(0, len(rows), 2), "aligned": range(1, len(rows), 2)}
    tokens = sum(row.stop for row in rows)

    def bare() -> None:
        with torch.inference_mode():
            for numbers in batches([row.stop for row in rows], tokens_together(chat)):
                ids = [rows[number].ids[: rows[number].stop] for number in numbers]
                inputs, mask = pad(ids, chat.tokenizer.pad_token_id, chat.device)
                chat.decoder(input_ids=inputs, attention_mask=mask, use_cache=False)

    sides = {"bare": bare, "extraction": lambda: mean_activations(chat, rows, groups)}
    for side in sides.values():
        side()
    rates = {name: tokens / seconds for name, seconds in interleaved(sides, ROUNDS).items()}
    ratio = rates["extraction"] / rates["bare"]
    for name, rate in rates.items():
        print(f"{name:<12}{rate:8.0f} tokens/s")
    print(f"{'ratio':<12}{ratio:8.3f}")
    if "--json" in sys.argv:
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        print(json.dumps({"ratios": {"extraction_over_bare": ratio}, "tokens_per_second": rates, **facts}))


if __name__ == "__main__":
    main()
