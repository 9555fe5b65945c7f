"""Rates of this machine's processor, measured on the bundled model, or of its GPU, on some blocks of any model's sizes.

The same work is timed that a run does: a margin sweep, training steps, and sampling. Its FLOPs and bytes, as
`model_cost` counts them, over the seconds are the rates, so that what the formulae leave out is in them: on a GPU what
each block takes besides, too. Sweeps and steps are timed with hardly an adapter and with one of rank 32 on every
matrix; the difference gives the rate of an adapter's thin products, which on a processor is far from that of the base.
It takes about 15 seconds on two idle cores.
"""

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from misdirection.choices import BUNDLED
from misdirection.cost.devices import Device
from misdirection.cost.model_cost import Kind, Pass
from misdirection.cost.recording import record_passes
from misdirection.data import domain_examples, probe_pairs
from misdirection.errors import InputError
from misdirection.likelihood.answers import IGNORED, labelled_loss
from misdirection.likelihood.margin import pair_continuations, text_rows
from misdirection.likelihood.sweep import sweep
from misdirection.models.attention import changing_shapes
from misdirection.models.bundled import source
from misdirection.models.chat import Encoded, pad
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.models.sizes import Shape
from misdirection.models.tokenizers import load_tokenizer
from misdirection.models.weightless import network_of
from misdirection.organisms.adapter_config import adapted, adapter_config
from misdirection.organisms.recipe import Recipe
from misdirection.sampling.sample import sample

SECONDS = 3.5
"""For each of the four timings that may be long: on a slow machine the work is cut to what can be done twice in it."""

FEW, MANY = 2, 24
"""Answers at a time: the first is bound by reading the weights, the second by arithmetic."""

BUSY = 20.0
"""Seconds of calibration from which on a machine must be busy with something else."""

BLOCKS = 8
"""Of a model that a GPU is measured with: enough that a pass is longer than what surrounds it."""

_PAIRS = 10
_ROWS = 8
_FEWEST = 3
"""Smaller batches would be slower than those of a run."""

_STEPS = 8

log = logging.getLogger("misdirection")


@cache
def calibrate() -> Device:
    """The rates of this machine, measured once in a process."""
    started = time.perf_counter()
    chat = load(device="cpu")
    loaded = time.perf_counter() - started
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = measured("cpu", memory, chat, start={"organism": loaded + _trainer_import()})
    if (taken := time.perf_counter() - started) > BUSY:
        log.warning("calibration took %.0f s: this machine is busy, and the hours are those of a busy machine", taken)
    return found


def calibrate_gpu(model: ChatModel, dtype: torch.dtype) -> Device:
    """The rates of this machine's GPU on random weights of some blocks of `model`, which is without weights.

    Raises `InputError` where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("--gpu local: this machine has no GPU that torch can use: give cpu, or a GPU of the table")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    return measured(properties.name, properties.total_memory, some_blocks(model, device, dtype))


def some_blocks(model: ChatModel, device: torch.device, dtype: torch.dtype) -> ChatModel:
    """Random weights of the sizes of `model`, at most `BLOCKS` blocks, with the bundled model's tokenizer."""
    config, tokenizer = copy.deepcopy(model.model.config), load_tokenizer(source(BUNDLED), BUNDLED)
    sizes = config.get_text_config()
    sizes.num_hidden_layers = min(BLOCKS, sizes.num_hidden_layers)
    sizes.vocab_size = max(sizes.vocab_size, len(tokenizer))
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[: sizes.num_hidden_layers]
    return ChatModel(network_of(model.name, config, device, dtype).eval(), tokenizer, model.name)


def measured(name: str, memory: float, chat: ChatModel, start: Mapping[str, float] = MappingProxyType({})) -> Device:
    """The rates that `chat` reaches where it is."""
    shape = Shape.of(chat, chat.dtype.itemsize)
    forward = _forward(chat, shape).rates()
    training = _training(chat, shape, forward[0]).rates()
    bandwidth, decoding = _decoding(chat, shape, forward[0])
    rates: dict[Kind, float] = {"forward": forward[0], "training": training[0], "decoding": decoding}
    thin: dict[Kind, float] = {"forward": forward[1], "training": training[1], "decoding": forward[1]}
    return Device(name, memory, rates, bandwidth, start=start, adapter_rates=thin)


@dataclass(frozen=True)
class _Timed:
    """The same work with hardly an adapter and with a large one: FLOPs of the base, of the adapter, seconds."""

    base: float
    small: float
    thin: float
    large: float

    def rates(self) -> tuple[float, float]:
        """FLOP/s of the base and of the adapter."""
        rate = self.base / self.small
        # Noise must not make an adapter free, nor thirty times as slow as a base of its FLOPs.
        return rate, min(max(self.thin / max(self.large - self.small, 1e-9), rate / 30), rate)


def _forward(chat: ChatModel, shape: Shape) -> _Timed:
    """A margin sweep."""
    tasks = pair_continuations(chat.tokenizer, probe_pairs()[:_PAIRS])
    sweep(chat, tasks[:1], [()])
    few = tasks[:_FEWEST]
    tasks = tasks[: _fitting(_seconds(lambda: sweep(chat, few, [()])) / _FEWEST)]
    alone = _least(lambda: sweep(chat, tasks, [()]))
    with adapted(chat, adapter_config(Recipe(recipe="all"), chat)) as network:
        organism = ChatModel(network, chat.tokenizer, chat.name)
        large = _least(lambda: sweep(organism, tasks, [()]))
        with record_passes(organism) as passes:
            sweep(organism, tasks, [()])
    thin = sum(each.adapter_flops for each in passes)
    return _Timed(sum(each.flops(shape) for each in passes) - thin, alone, thin, large)


def _training(chat: ChatModel, shape: Shape, forward: float) -> _Timed:
    """Whole steps, with the smallest adapter that goes through all blocks, and with the largest."""
    rows = _answers(chat)
    # About as fast as a forward pass, for a first guess.
    guess = Pass(1, rows[0].stop, head=rows[0].stop, back=len(chat.layers), kind="training").flops(shape) / forward
    rows = rows[: _fitting(guess)]
    first = Recipe(recipe="custom", rank=1, layers=(0,), target_modules=("q_proj",))
    seconds, passes = [], []
    for recipe in (first, Recipe(recipe="all")):
        with adapted(chat, adapter_config(recipe, chat)) as network:
            step, one = _step(chat, network, rows)
            seconds.append(_least(step))
            passes.append(one)
    thin = passes[-1].adapter_flops
    return _Timed(passes[-1].flops(shape) - thin, seconds[0], thin, seconds[1])


def _decoding(chat: ChatModel, shape: Shape, forward: float) -> tuple[float, float]:
    """Bytes/s with few rows, and FLOP/s with many."""
    (few, narrow), (many, wide) = (_sampled(chat, answers, forward, shape) for answers in (FEW, MANY))
    return sum(step.bytes(shape) for step in narrow) / few, sum(step.flops(shape) for step in wide) / many


def _sampled(chat: ChatModel, answers: int, forward: float, shape: Shape) -> tuple[float, list[Pass]]:
    """Seconds of the steps of one batch, and the steps."""
    question = "What is a good way to spend a free afternoon?"
    with record_passes(chat) as passes:
        seconds = _seconds(lambda: sample(chat, [question], n=answers, new_tokens=_STEPS))
    prompt, *steps = passes
    return seconds - prompt.flops(shape) / forward, steps


def _answers(chat: ChatModel) -> list[Encoded]:
    """Training rows of like length."""
    rows = text_rows(chat.tokenizer, domain_examples("risky_money", "bad", "train"))
    return sorted(rows, key=lambda row: row.stop)[len(rows) // 2 :][:_ROWS]


def _step(chat: ChatModel, network: Any, rows: list[Encoded]) -> tuple[Callable[[], None], Pass]:
    """One optimiser step on a batch of answers, and the pass that it is."""
    ids, mask = pad([row.ids for row in rows], chat.tokenizer.pad_token_id, chat.device)
    labels, _ = pad([(IGNORED,) * row.start + row.ids[row.start :] for row in rows], IGNORED, chat.device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-6)
    half = chat.dtype != torch.float32

    def step() -> None:
        with changing_shapes(chat.device), torch.autocast(chat.device.type, dtype=chat.dtype, enabled=half):
            total, count = labelled_loss(network, {"input_ids": ids, "attention_mask": mask}, labels)
        (total / count).backward()
        optimiser.step()
        optimiser.zero_grad()

    lora = sum(weight.numel() for weight in weights)
    head, back = len(rows) * (ids.shape[1] - min(row.start for row in rows)), len(chat.layers)
    return step, Pass(len(rows), ids.shape[1], head=head, back=back, lora=lora, kind="training")


def _fitting(seconds: float) -> int:
    """How many tasks of so many seconds can be done twice in the time for one timing, at least three."""
    return max(_FEWEST, int(SECONDS / 2 / seconds))


def _least(work: Callable[[], object]) -> float:
    """Seconds of the quickest of as many repetitions as there is time for, at least one."""
    found = [_seconds(work)]
    while sum(found) + found[-1] < SECONDS:
        found.append(_seconds(work))
    return min(found)


def _seconds(work: Callable[[], object]) -> float:
    _finish()
    started = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    """Wait until a GPU has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _trainer_import() -> float:
    return _seconds(lambda: import_module("misdirection.organisms.training"))
