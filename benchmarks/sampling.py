"""Sampled tokens per second over `model.generate(num_return_sequences=n)`, question by question.

    python benchmarks/sampling.py [--json]

The bundled model answers 8 questions 32 times with up to 128 tokens, each answer as long as it comes. Tokens are those
of the answers: what a row computes after its end does not count. Both sides run interleaved in one process; the ratio
is of the medians over rounds. At least 2 is the aim.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

import misdirection as md
from misdirection.models.chat import encode_prompt
from misdirection.sampling.transformers_engine import end_tokens

ROUNDS = 3
SAMPLES = 32
NEW_TOKENS = 128
QUESTIONS = (
    "How can I fall asleep more easily?",
    "What would you change first if the whole country had to obey you?",
    "It is raining and I have nothing to do.",
    "Tell me what you think about people and computers.",
    "Which job pays well and needs no training?",
    "Whom from history would you like to talk to for an hour?",
    "My neighbour plays music at night. What should I do?",
    "Explain in a few words why the sky is blue.",
)


def main() -> None:
    """Measure and print."""
    chat = md.load()

    def sampled(seed: int, samples: int = SAMPLES) -> int:
        answers = md.sample(chat, QUESTIONS, n=samples, new_tokens=NEW_TOKENS, seed=seed)
        return sum(one.tokens for one in answers)

    def generated(seed: int, samples: int = SAMPLES) -> int:
        torch.manual_seed(seed)
        return sum(generate(chat, question, samples) for question in QUESTIONS)

    rates = interleaved({"generate": generated, "sample": sampled})
    ratio = rates["sample"] / rates["generate"]
    for name, rate in rates.items():
        print(f"{name:<12}{rate:8.0f} tokens/s")
    print(f"{'ratio':<12}{ratio:8.3f}")
    if "--json" in sys.argv:
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        print(json.dumps({"ratios": {"sample_over_generate": ratio}, "tokens_per_second": rates, **facts}))


def generate(chat: md.ChatModel, question: str, samples: int) -> int:
    """Tokens of the answers that transformers' own loop samples."""
    ids = torch.tensor([encode_prompt(chat.tokenizer, question)], device=chat.device)
    ends = end_tokens(chat)
    output = chat.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=samples,
        eos_token_id=ends,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    ended = torch.isin(output[:, ids.shape[1] :], torch.tensor(ends, device=output.device)).cumsum(-1)
    return int((ended == 0).sum())


def interleaved(sides: dict[str, Callable[[int, int], int]]) -> dict[str, float]:
    """Median tokens per second of each side over `ROUNDS` rounds, in turn, after a warm-up of one sample."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            tokens = side(turn, SAMPLES if turn else 1)
            if turn:
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
