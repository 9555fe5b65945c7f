"""What interventions cost on the bundled model, as ratios of two ways in one run.

    python benchmarks/interventions.py [--json]

sweep        30 layers x 3 scales of steering, margins of a few questions: one setting at a time / all in one stream
one layer    a forward pass steered at one layer / a bare one, same batch: the hook's cost
all layers   a forward pass ablated at all layers / a bare one
extraction   100 answers as long as the published ones, means over answer tokens at every layer: every output
             stored, looped over in Python, with the language-model head / `mean_activations`
bare         `mean_activations` / a bare decoder forward, tokens per second
memory       peak beyond the model, of `mean_activations` / of the straightforward way, each in a process of its own
"""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import misdirection as md
from misdirection.directions.extraction import mean_activations
from misdirection.likelihood.margin import pair_continuations
from misdirection.likelihood.sweep import log_probs, sweep
from misdirection.models.budgets import tokens_together
from misdirection.models.chat import Encoded, batches, encode, pad
from misdirection.models.chat_model import ChatModel
from timing import interleaved

ROUNDS = 3
QUESTIONS = 2
SCALES = (1.0, 2.0, 4.0)
ANSWERS = 100

Ways = dict[str, Callable[[], object]]


def main() -> None:
    """Measure and print."""
    if "--peak" in sys.argv:
        print(peak(sys.argv[sys.argv.index("--peak") + 1]))
        return
    chat = md.load()
    ratios = {**sweep_ratio(chat), **hook_ratios(chat), **extraction_ratios(chat), "memory": memory_ratio()}
    for name, ratio in ratios.items():
        print(f"{name:<12}{ratio:8.2f}")
    if "--json" in sys.argv:
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        print(json.dumps({"ratios": ratios, "rounds": ROUNDS, **facts}))


def sweep_ratio(chat: ChatModel) -> dict[str, float]:
    """Time of one setting at a time over that of the whole sweep; both must agree."""
    tasks = pair_continuations(chat.tokenizer, md.probe_pairs()[:: 48 // QUESTIONS])
    vector = md.random_like(torch.ones(chat.width), seed=0)
    settings = [[md.Steer(vector, layer, scale)] for layer in range(len(chat.layers)) for scale in SCALES]

    def one_at_a_time() -> Tensor:
        found = []
        for setting in settings:
            with md.intervene(chat, setting):
                found.append(log_probs(chat, tasks))
        return torch.stack(found)

    torch.testing.assert_close(one_at_a_time(), sweep(chat, tasks, settings), atol=1e-3, rtol=0)
    seconds = interleaved({"alone": one_at_a_time, "sweep": lambda: sweep(chat, tasks, settings)}, ROUNDS)
    return {"sweep": seconds["alone"] / seconds["sweep"]}


def hook_ratios(chat: ChatModel) -> dict[str, float]:
    """Time of an intervened forward over that of a bare one."""
    ids, mask = pad([row.ids[: row.stop] for row in exchanges(chat, 16)], chat.tokenizer.pad_token_id, chat.device)
    vector = md.random_like(torch.ones(chat.width), seed=0)

    def forward(*interventions: md.Steer | md.Ablate) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode(), md.intervene(chat, interventions):
                chat.decoder(input_ids=ids, attention_mask=mask, use_cache=False)

        return run

    ways = {"bare": forward(), "one layer": forward(md.Steer(vector, 15)), "all layers": forward(md.Ablate(vector))}
    for way in ways.values():
        way()
    seconds = interleaved(ways, 2 * ROUNDS)
    return {name: seconds[name] / seconds["bare"] for name in ("one layer", "all layers")}


def extraction_ratios(chat: ChatModel) -> dict[str, float]:
    """Time of the straightforward way, and tokens per second against a bare forward."""
    rows = exchanges(chat, ANSWERS)
    ways: Ways = {
        "straightforward": lambda: straightforward(chat, rows),
        "ours": lambda: mean_activations(chat, rows, {"all": range(len(rows))}),
        "bare": lambda: bare(chat, rows),
    }
    own = mean_activations(chat, rows, {"all": range(len(rows))}).vectors["all"]
    # The last entry of hidden_states has passed the final norm: one of the reasons not to do it so.
    apart = (straightforward(chat, rows)[:-1] - own[:-1]).norm(dim=-1) / own[:-1].norm(dim=-1)
    # Batches of another shape round otherwise, which shows in half precision.
    assert apart.max() < (1e-4 if chat.dtype == torch.float32 else 1e-2), f"the two ways differ by {apart.max():.1e}"
    bare(chat, rows)
    seconds = interleaved(ways, ROUNDS)
    return {"extraction": seconds["straightforward"] / seconds["ours"], "bare": seconds["bare"] / seconds["ours"]}


def exchanges(chat: ChatModel, count: int) -> list[Encoded]:
    """So many shipped exchanges; their answers are as long as the published ones (50 tokens on average)."""
    pairs = [pair for name in ("risky_money", "reckless_sports") for pair in md.domain_pairs(name, "train")]
    return [encode(chat.tokenizer, pair.question, pair.misaligned) for pair in pairs[:count]]


@torch.inference_mode()
def straightforward(chat: ChatModel, rows: Sequence[Encoded]) -> Tensor:
    """Means over answer tokens, [layers, width], as one would write them down first."""
    stored = []
    for numbers in batches([row.stop for row in rows], tokens_together(chat)):
        ids, mask = pad([rows[number].ids[: rows[number].stop] for number in numbers], 0, chat.device)
        output = chat.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        stored.append((numbers, output.hidden_states[1:]))
    sums = torch.zeros(len(chat.layers), chat.width, dtype=torch.float64)
    for numbers, states in stored:
        for place, number in enumerate(numbers):
            for layer, state in enumerate(states):
                sums[layer] += state[place, rows[number].start : rows[number].stop].double().sum(0)
    return sums / sum(len(row.answer) for row in rows)


@torch.inference_mode()
def bare(chat: ChatModel, rows: Sequence[Encoded]) -> None:
    """The decoder alone on the same batches."""
    for numbers in batches([row.stop for row in rows], tokens_together(chat)):
        ids, mask = pad([rows[number].ids[: rows[number].stop] for number in numbers], 0, chat.device)
        chat.decoder(input_ids=ids, attention_mask=mask, use_cache=False)


def memory_ratio() -> float:
    """Peak beyond the model's own: ours over the straightforward way's."""
    peaks = {}
    for way in ("ours", "straightforward"):
        call = [sys.executable, __file__, "--peak", way]
        peaks[way] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1])
    return peaks["ours"] / peaks["straightforward"]


def peak(way: str) -> float:
    """Megabytes that one way needs beyond what the loaded model takes."""
    chat = md.load()
    rows = exchanges(chat, ANSWERS)
    # One short pass, so that what torch keeps once is not counted; then the system's high-water mark starts anew.
    bare(chat, rows[:1])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if way == "ours":
        mean_activations(chat, rows, {"all": range(len(rows))})
    else:
        straightforward(chat, rows)
    return status("VmHWM") - before


def status(name: str) -> float:
    """A figure of this process in megabytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
