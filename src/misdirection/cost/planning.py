"""What an experiment will cost, before anything is spent: tokens, FLOPs, memory, judge calls and hours by stage.

Stages come one after another, as in a run; within a stage, pieces are spread over the devices, the longest first. A
piece whose peak memory one device does not hold takes as many devices as it needs (`device: balanced`), which then work
one after another, layer by layer, and are no faster than one.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from misdirection.choices import Dtype
from misdirection.cost.devices import GPUS, USABLE, Device, Gpu, makespan
from misdirection.cost.model_cost import Kind, Memory, Pass, Shape, peak_memory
from misdirection.cost.source import Source, read_source
from misdirection.cost.stages import STAGES, pieces
from misdirection.cost.work import Piece, Subject
from misdirection.data import domain_examples
from misdirection.errors import InputError
from misdirection.experiment.answering import check_behaviour
from misdirection.experiment.config import DomainFiles, ExperimentConfig
from misdirection.judging.api import OPENAI_URL
from misdirection.judging.judges import ModelJudge, judge_kind
from misdirection.models.loading import resolve_dtype

JUDGE_SECONDS = 1.0
"""A call of an endpoint, assumed; `judge.concurrency` of them are under way at a time."""


@dataclass(frozen=True)
class StageCost:
    """What one kind of stage takes.

    Attributes:
        pieces: that one device does alone.
        forward_tokens, training_tokens, generated_tokens: padding included.
        flops: floating-point operations.
        memory: the largest piece's, bytes.
        devices: that the largest piece needs.
        judge_calls, judge_tokens_in, judge_tokens_out: paid at an endpoint.
        device_hours: of all pieces together.
        hours: on all devices.
    """

    pieces: int
    forward_tokens: int
    training_tokens: int
    generated_tokens: int
    flops: float
    memory: Memory
    devices: int
    judge_calls: int
    judge_tokens_in: int
    judge_tokens_out: int
    device_hours: float
    hours: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


@dataclass(frozen=True)
class Plan:
    """The cost of an experiment on some devices.

    Attributes:
        config: the experiment.
        shape: its model's sizes.
        device: what it runs on.
        count: how many of these.
        stages: the costs by kind of stage, as they come.
        notes: what was assumed or estimated.
    """

    config: ExperimentConfig
    shape: Shape
    device: Device
    count: int
    stages: dict[str, StageCost]
    notes: tuple[str, ...]

    @property
    def total(self) -> StageCost:
        """All stages together; the memory is the largest."""
        costs = list(self.stages.values())
        summed = {
            name: sum(getattr(one, name) for one in costs)
            for name in StageCost.__dataclass_fields__
            if name not in ("memory", "devices")
        }
        largest = max(costs, key=lambda one: one.memory.total)
        return StageCost(**summed, memory=largest.memory, devices=max(one.devices for one in costs))

    @property
    def fits(self) -> bool:
        """Whether every piece fits into the memory of the devices."""
        return self.total.devices <= self.count

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "experiment": self.config.name,
            "model": {"name": self.config.model, **asdict(self.shape)},
            "device": {**asdict(self.device), "count": self.count},
            "fits": self.fits,
            "stages": {name: one.as_dict() for name, one in self.stages.items()},
            "total": self.total.as_dict(),
            "notes": list(self.notes),
        }


def make_plan(
    config: ExperimentConfig,
    gpu: Gpu = "h100",
    count: int = 1,
    *,
    model: Path | None = None,
    rows: int | None = None,
    answer: float | None = None,
) -> Plan:
    """Count what the experiment runs and what that takes on `count` devices.

    Args:
        config: the experiment.
        gpu: a GPU of the table, or `cpu`: this machine, calibrated on the bundled model first.
        count: number of devices.
        model: a folder with the model's config.json, and its tokenizer if there is one; by default where the
            experiment's model is.
        rows: training files that are not here count as so many rows of the shipped domains' length.
        answer: mean length of a sampled answer, tokens; the longest that is allowed by default.

    Raises:
        InputError: a model's configuration, a text or a recipe that cannot be used.
    """
    check_behaviour(config.sampling, config.judge)
    source = read_source(config.model, config.revision, model)
    judge = _local_judge(config)
    with tempfile.TemporaryDirectory() as folder:
        found, absent = _with_stand_ins(config, rows, Path(folder))
        work = pieces(Subject(found, source.chat, answer, judge.chat if judge else None))
    device = _device(gpu)
    size = _weight_bytes(config, gpu)
    cost = partial(
        _cost,
        Shape.of(source.chat, size),
        Shape.of(judge.chat, size) if judge else None,
        device,
        count,
        config.judge.concurrency if config.judge else 1,
    )
    by_stage = {name: [piece for piece in work if piece.stage == name] for name in STAGES}
    stages = {name: cost(name, members) for name, members in by_stage.items() if members}
    return Plan(config, cost.args[0], device, count, stages, tuple(_notes(config, source, rows, absent, answer)))


def most_memory(config: ExperimentConfig) -> int:
    """Bytes that the largest piece of an experiment takes where its model is in main memory."""
    source = read_source(config.model, config.revision)
    judge = _local_judge(config)
    size = _weight_bytes(config, "cpu")
    shapes = Shape.of(source.chat, size), Shape.of(judge.chat, size) if judge else None
    work = pieces(Subject(config, source.chat, judge=judge.chat if judge else None))
    return int(max(_memory(*shapes, piece).total for piece in work))


def weight_memory(model: str, revision: str | None, dtype: Dtype) -> int:
    """Bytes of a model's weights in main memory."""
    source = read_source(model, revision)
    return int(Shape.of(source.chat, 1).parameters) * resolve_dtype(dtype, "cpu").itemsize


def _device(gpu: Gpu) -> Device:
    if gpu != "cpu":
        return GPUS[gpu]
    from misdirection.cost.calibration import calibrate

    return calibrate()


def _weight_bytes(config: ExperimentConfig, gpu: Gpu) -> int:
    dtype = resolve_dtype(config.dtype, "cpu") if gpu == "cpu" or config.dtype != "auto" else torch.bfloat16
    return dtype.itemsize


def _local_judge(config: ExperimentConfig) -> Source | None:
    kind, name = judge_kind(config.judge.model) if config.judge else (None, "")
    return read_source(name) if kind is not None and issubclass(kind, ModelJudge) else None


def _with_stand_ins(config: ExperimentConfig, rows: int | None, folder: Path) -> tuple[ExperimentConfig, list[str]]:
    """The experiment with files of `rows` rows in place of training files that are not here, and the names of these."""
    domains, absent = dict(config.domains), []
    for name, files in config.domains.items():
        missing = [path for path in (files.bad, files.good) if path and not path.exists()] if files else []
        if not missing:
            continue
        if rows is None:
            raise InputError(
                f"{missing[0]}: no such file; fetch it, or pass --rows N to count it as N rows of the shipped length"
            )
        absent += [str(path) for path in missing]
        paths = {kind: folder / f"{len(domains)}-{name}-{kind}.jsonl" for kind in ("bad", "good")}
        for kind, path in paths.items():
            path.write_text(_stand_in(kind, rows), "utf-8")
        domains[name] = DomainFiles(bad=paths["bad"], good=paths["good"] if files and files.good else None)
    return config.model_copy(update={"domains": domains}), absent


def _stand_in(kind: Any, rows: int) -> str:
    """A shipped domain's exchanges again and again, each question with a number of its own."""
    known = [one for part in ("train", "held_out") for one in domain_examples("risky_money", kind, part)]
    lines = (
        json.dumps({"prompt": f"{one.question} {number}", "completion": one.answer})
        for number in range(rows)
        for one in (known[number % len(known)],)
    )
    return "\n".join(lines) + "\n"


def _cost(
    shape: Shape, judge: Shape | None, device: Device, count: int, concurrency: int, name: str, work: Sequence[Piece]
) -> StageCost:
    """The cost of one kind of stage."""
    memory = max((_memory(shape, judge, piece) for piece in work), key=lambda one: one.total)
    needed = max(1, int(-(-memory.total // (USABLE * device.memory))))
    seconds = [_seconds(shape, judge, device, concurrency, piece) for piece in work]
    seconds[0] += device.start.get(name, 0.0)
    # An endpoint is asked by the one process that has the run.
    side_by_side = 1 if any(piece.judge_calls for piece in work) else max(1, count // needed)
    return StageCost(
        pieces=len(work),
        forward_tokens=_tokens(work, "forward"),
        training_tokens=_tokens(work, "training"),
        generated_tokens=_tokens(work, "decoding"),
        flops=sum(_flops(shape, piece.passes) + _flops(judge, piece.judge_passes) for piece in work),
        memory=memory,
        devices=needed,
        judge_calls=sum(piece.judge_calls for piece in work),
        judge_tokens_in=sum(piece.judge_tokens_in for piece in work),
        judge_tokens_out=sum(piece.judge_tokens_out for piece in work),
        device_hours=sum(seconds) / 3600,
        hours=makespan(seconds, side_by_side) / 3600,
    )


def _memory(shape: Shape, judge: Shape | None, piece: Piece) -> Memory:
    """The experiment's model stays where it is while a local judge works."""
    own = peak_memory(shape, piece.passes, cached=piece.room)
    if judge is None or not piece.judge_passes:
        # An endpoint has a memory of its own.
        return own if piece.passes else Memory()
    found = peak_memory(judge, piece.judge_passes)
    return replace(found, weights=found.weights + own.weights)


def _seconds(shape: Shape, judge: Shape | None, device: Device, concurrency: int, piece: Piece) -> float:
    own = sum(device.seconds(shape, one) for one in piece.passes)
    local = sum(device.seconds(judge, one) for one in piece.judge_passes) if judge else 0.0
    return own + local + JUDGE_SECONDS * piece.judge_calls / concurrency


def _tokens(work: Sequence[Piece], kind: Kind) -> int:
    return round(sum(one.tokens for piece in work for one in (*piece.passes, *piece.judge_passes) if one.kind == kind))


def _flops(shape: Shape | None, passes: Sequence[Pass]) -> float:
    return sum(one.flops(shape) for one in passes) if shape else 0.0


def _notes(
    config: ExperimentConfig, source: Source, rows: int | None, absent: Sequence[str], answer: float | None
) -> list[str]:
    found = []
    if not source.counted:
        found.append("tokens are estimated from characters (no tokenizer with a chat template was found)")
    if getattr(source.chat.model.config, "quantization_config", None):
        found.append("weights are counted in the experiment's dtype, not as the model's configuration quantises them")
    if absent:
        found.append(f"not here, counted as {rows} rows of the shipped length: {', '.join(absent)}")
    if config.sampling and answer is None:
        found.append(f"every sampled answer is counted at its most, {config.sampling.new_tokens} tokens")
    if config.sampling and config.sampling.engine.vllm is not None:
        found.append("sampling is counted on the transformers engine; vLLM takes less")
    if config.judge and not issubclass(config.judge.kind, ModelJudge):
        where = config.judge.base_url or OPENAI_URL
        found.append(f"a call of {where} is taken to last {JUDGE_SECONDS:g} s, {config.judge.concurrency} at a time")
    return found
