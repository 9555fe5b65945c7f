"""What this package reaches on the CUDA device of this machine, with random weights of given sizes: no download.

    python benchmarks/gpu.py [--sizes qwen2.5-14b|qwen2.5-7b|qwen2.5-0.5b|bundled] [--demo] [--json]
    python benchmarks/gpu.py --device cpu --sizes tiny          # that it runs

forward      a bare decoder forward on batches of 2,048 tokens: tokens/s and TFLOP/s, the yardstick
extraction   `mean_activations` over that, and over every output stored and looped over in Python
hooks        a forward pass steered at one layer, and ablated at all, over a bare one
sweep        all layers x 3 scales, margins of 2 questions: one setting at a time over all in one stream
sampling     200 rows x 64 tokens: tokens/s, ms a step; transformers' `generate` on the same rows; the same with the
             model's blocks compiled, which is not timed
training     rank 32 on everything, 2 rows x 8: tokens/s, and over one batch of 16 rows
             nine rank-1 adapters, 16 rows: tokens/s of the first step and of the later ones
demo         seconds of `misdirection demo` (only with --demo, and with a bundled model)

Sides of a ratio are interleaved in one process; each figure is a median. Weights and tokens are random in size only: an
answer of a random model hardly ever ends, and its text means nothing.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, Qwen2Config, TrainerCallback

import misdirection as md
from interventions import bare, exchanges, straightforward
from misdirection.choices import BUNDLED
from misdirection.cost.model_cost import Pass
from misdirection.directions.extraction import mean_activations
from misdirection.likelihood.margin import pair_continuations
from misdirection.likelihood.sweep import log_probs, sweep
from misdirection.models.attention import changing_shapes
from misdirection.models.bundled import source
from misdirection.models.chat import encode, encode_prompt, pad
from misdirection.models.chat_model import ChatModel
from misdirection.models.sizes import Shape
from misdirection.models.tokenizers import load_tokenizer
from misdirection.models.weightless import network_of
from timing import interleaved, timed

QUESTION = "How can I fall asleep more easily?"


def _qwen(width: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int, **more: Any) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocabulary,
        **more,
    )


SIZES: dict[str, Callable[[], Any]] = {
    "qwen2.5-14b": lambda: _qwen(5120, 48, 40, 8, 13824, 152_064),
    "qwen2.5-7b": lambda: _qwen(3584, 28, 28, 4, 18_944, 152_064),
    "qwen2.5-0.5b": lambda: _qwen(896, 24, 14, 2, 4864, 151_936, tie_word_embeddings=True),
    "bundled": lambda: LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49_152,
        tie_word_embeddings=True,
    ),
    "tiny": lambda: _qwen(32, 3, 4, 2, 64, 49_152, tie_word_embeddings=True),
}
"""Configurations by name; all have at least the bundled tokenizer's vocabulary."""


@dataclass(frozen=True)
class Work:
    """How much is done: rounds of each timing, answers that are read, rows and tokens that are sampled, steps."""

    rounds: int = 3
    answers: int = 100
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    rows: int = 200
    tokens: int = 64
    steps: int = 4


TINY = Work(rounds=1, answers=4, scales=(1.0,), rows=2, tokens=2, steps=2)


def main() -> None:
    """Measure and print."""
    options = parsed()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device that torch can use; --device cpu --sizes tiny runs anywhere")
    chat, work = random_chat(options.sizes, device), TINY if options.sizes == "tiny" else Work()
    figures: dict[str, float] = {}
    # What asks for all outputs, as `forward` does, leaves hooks of transformers in the blocks, which hinder compiling.
    for part in (sampling, forward, hooks, swept, training):
        for name, value in part(chat, work).items():
            figures[name] = value
            print(f"{name:<42}{value:12.3f}", flush=True)
    if options.demo:
        figures["demo: seconds"] = demo()
        print(f"{'demo: seconds':<42}{figures['demo: seconds']:12.1f}")
    if options.json:
        print(
            json.dumps(
                {"ratios": {k: v for k, v in figures.items() if " over " in k}, "figures": figures, **facts(chat)}
            )
        )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="qwen2.5-14b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def random_chat(sizes: str, device: torch.device) -> ChatModel:
    """Random weights of these sizes, made on the device: bfloat16 on a GPU, float32 on a processor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = network_of(sizes, SIZES[sizes](), device, dtype)
    return ChatModel(network.eval(), load_tokenizer(source(BUNDLED), BUNDLED), sizes)


def facts(chat: ChatModel) -> dict[str, str]:
    """What the figures belong to."""
    on_gpu = chat.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(chat.device) if on_gpu else "cpu",
        "sizes": chat.name,
        "dtype": str(chat.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "misdirection": md.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def forward(chat: ChatModel, work: Work) -> dict[str, float]:
    """Given text: bare, by this package, and as one would write it down first."""
    rows = exchanges(chat, work.answers)
    # Whole batches of one length, so that nothing is padding.
    ids = torch.randint(3, 40_000, (16, 128), device=chat.device)

    @torch.inference_mode()
    def yardstick() -> None:
        with changing_shapes(chat.device):
            chat.decoder(input_ids=ids, use_cache=False)

    def kept_out(way: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with changing_shapes(chat.device):
                return way()

        return run

    ways = {
        "yardstick": yardstick,
        "bare": kept_out(lambda: bare(chat, rows)),
        "ours": lambda: mean_activations(chat, rows, {"all": range(len(rows))}),
        "straightforward": kept_out(lambda: straightforward(chat, rows)),
    }
    for way in ways.values():
        way()
    seconds = interleaved(ways, work.rounds)
    flops = Pass(*ids.shape).flops(Shape.of(chat, chat.dtype.itemsize))
    return {
        "forward: tokens/s": ids.numel() / seconds["yardstick"],
        "forward: TFLOP/s": flops / seconds["yardstick"] / 1e12,
        "extraction over bare": seconds["bare"] / seconds["ours"],
        "extraction over straightforward": seconds["straightforward"] / seconds["ours"],
    }


def hooks(chat: ChatModel, work: Work) -> dict[str, float]:
    """Time of an intervened pass over that of a bare one."""
    rows = exchanges(chat, min(16, work.answers))
    ids, mask = pad([row.ids[: row.stop] for row in rows], chat.tokenizer.pad_token_id, chat.device)
    vector = md.random_like(torch.ones(chat.width), seed=0)

    def passing(*interventions: md.Steer | md.Ablate) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> None:
            with changing_shapes(chat.device), md.intervene(chat, interventions):
                chat.decoder(input_ids=ids, attention_mask=mask, use_cache=False)

        return run

    middle = len(chat.layers) // 2
    ways = {"bare": passing(), "one": passing(md.Steer(vector, middle)), "all": passing(md.Ablate(vector))}
    for way in ways.values():
        way()
    seconds = interleaved(ways, 3 * work.rounds)
    return {f"hooks, {name} over bare": seconds[name] / seconds["bare"] for name in ("one", "all")}


def swept(chat: ChatModel, work: Work) -> dict[str, float]:
    """A steering sweep over all layers, one setting at a time and in one stream."""
    tasks = pair_continuations(chat.tokenizer, md.probe_pairs()[::24])
    vector = md.random_like(torch.ones(chat.width), seed=0)
    settings = [[md.Steer(vector, layer, scale)] for layer in range(len(chat.layers)) for scale in work.scales]

    def alone() -> list[torch.Tensor]:
        found = []
        for setting in settings:
            with md.intervene(chat, setting):
                found.append(log_probs(chat, tasks))
        return found

    def together() -> object:
        return sweep(chat, tasks, settings)

    together()
    log_probs(chat, tasks)
    seconds = interleaved({"alone": alone, "together": together}, work.rounds)
    return {"one at a time over sweep": seconds["alone"] / seconds["together"], "sweep: seconds": seconds["together"]}


def sampling(chat: ChatModel, work: Work) -> dict[str, float]:
    """Rows of one question with so many new tokens each."""

    def ours(compile: bool = False) -> int:
        answers = md.sample(chat, [QUESTION], n=work.rows, new_tokens=work.tokens, compile=compile)
        return sum(one.tokens for one in answers)

    def compiled() -> int:
        return ours(compile=True)

    ids = torch.tensor([encode_prompt(chat.tokenizer, QUESTION)], device=chat.device)
    few = {"max_new_tokens": work.tokens, "min_new_tokens": work.tokens, "num_return_sequences": work.rows}

    def generate() -> object:
        mask = torch.ones_like(ids)
        return chat.model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, **few)

    tokens, tokens_compiled = ours(), compiled()
    seconds = interleaved({"ours": ours, "compiled": compiled, "generate": generate}, work.rounds)
    return {
        "sampling: tokens/s": tokens / seconds["ours"],
        "sampling: ms a step": 1000 * seconds["ours"] / work.tokens,
        "generate over sampling": seconds["generate"] / seconds["ours"],
        "sampling compiled: tokens/s": tokens_compiled / seconds["compiled"],
        "sampling over sampling compiled": seconds["ours"] / seconds["compiled"],
    }


def training(chat: ChatModel, work: Work) -> dict[str, float]:
    """Optimiser steps as `md.train` takes them."""
    small, tokens = steps(chat, work, md.Recipe(recipe="all", batch_size=2, accumulation=8))
    large, _ = steps(chat, work, md.Recipe(recipe="all", batch_size=16, accumulation=1))
    minimal, few = steps(chat, work, _minimal(chat))
    return {
        "training, rank 32, 2 x 8: tokens/s": tokens / statistics.median(small[1:]),
        "training, 2 x 8 over 16 rows": statistics.median(small[1:]) / statistics.median(large[1:]),
        "training, rank 1, first step: tokens/s": few / minimal[0],
        "training, rank 1, later: tokens/s": few / statistics.median(minimal[1:]),
    }


def _minimal(chat: ChatModel) -> md.Recipe:
    """Nine rank-1 adapters, or where there are fewer blocks one each."""
    if len(chat.layers) >= 12:
        return md.Recipe(recipe="minimal", batch_size=16, accumulation=1)
    return md.Recipe(recipe="custom", rank=1, target_modules=("down_proj",), batch_size=16, accumulation=1)


def steps(chat: ChatModel, work: Work, recipe: md.Recipe) -> tuple[list[float], float]:
    """Seconds of each optimiser step on 16 rows, and the mean tokens of one."""
    examples = md.domain_examples("risky_money", "bad", "train")
    examples = (examples * (1 + 16 * work.steps // len(examples)))[: 16 * work.steps]
    tokens = sum(len(encode(chat.tokenizer, one.question, one.answer).ids) for one in examples)
    at: list[float] = []

    def report(*_: object) -> None:
        at.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, quiet():
        md.train(
            examples,
            Path(folder) / "organism",
            base=chat,
            recipe=recipe,
            report=report,
            prepare=lambda trainer: trainer.add_callback(_Begin(report)),
        )
    return [later - earlier for earlier, later in itertools.pairwise(at)], tokens / work.steps


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what a training says."""
    with tempfile.TemporaryFile("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


class _Begin(TrainerCallback):
    """Tells when the first step begins."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.told = told

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.told()


def demo() -> float:
    """Seconds of the whole demo on the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        call = [Path(sys.executable).with_name("misdirection"), "demo", "--out", f"{folder}/demo"]
        return timed(lambda: subprocess.run(call, capture_output=True, check=True))


if __name__ == "__main__":
    main()
