"""The cost of work before anything is spent: tokens, FLOPs, memory, judge calls and hours by stage.

Stages come one after another, as in a run; within a stage, tasks are spread over the devices, the longest first. A
task whose peak memory one device does not hold takes as many devices as it needs (`device: balanced`), which then work
one after another, layer by layer, and are no faster than one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from misdirection.choices import Dtype
from misdirection.cost.counting import Work
from misdirection.cost.devices import GPUS, Device, Gpu, makespan
from misdirection.cost.model_cost import Kind, Memory, Pass, peak_memory
from misdirection.models.budgets import USABLE
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import resolve_dtype
from misdirection.models.sizes import Shape
from misdirection.models.weightless import read_structure

JUDGE_SECONDS = 1.0
"""A call of an endpoint, assumed; as many as the configuration says are under way at a time."""


@dataclass(frozen=True)
class StageCost:
    """The cost of one kind of stage.

    Attributes:
        tasks: tasks, each of which one device does alone.
        forward_tokens, training_tokens, generated_tokens: padding included.
        flops: floating-point operations.
        memory: the largest task's, bytes.
        devices: that the largest task needs.
        judge_calls, judge_tokens_in, judge_tokens_out: paid at an endpoint.
        device_hours: of all tasks together.
        hours: on all devices.
    """

    tasks: int
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
class CostEstimate:
    """The cost of an experiment on some devices.

    Attributes:
        experiment: its name.
        model: its model's name.
        shape: the model's sizes.
        device: what it runs on.
        count: how many of these.
        stages: the costs by kind of stage, as they come.
        notes: what was assumed or estimated.
    """

    experiment: str
    model: str
    shape: Shape
    device: Device
    count: int
    stages: Mapping[str, StageCost]
    notes: tuple[str, ...]

    @property
    def total(self) -> StageCost:
        """All stages together; the memory is the largest."""
        return summed(list(self.stages.values()))

    @property
    def fits(self) -> bool:
        """Whether every task fits into the memory of the devices."""
        return self.total.devices <= self.count

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "experiment": self.experiment,
            "model": {"name": self.model, **asdict(self.shape)},
            "device": {**asdict(self.device), "count": self.count},
            "fits": self.fits,
            "stages": {name: stage.as_dict() for name, stage in self.stages.items()},
            "total": self.total.as_dict(),
            "notes": list(self.notes),
        }


def summed(costs: Sequence[StageCost]) -> StageCost:
    """Costs that come one after another; the memory is the largest."""
    sums = {
        name: sum(getattr(cost, name) for cost in costs)
        for name in StageCost.__dataclass_fields__
        if name not in ("memory", "devices")
    }
    largest = max(costs, key=lambda cost: cost.memory.total)
    return StageCost(**sums, memory=largest.memory, devices=max(cost.devices for cost in costs))


def dollars(
    total: StageCost, count: int, *, hour: float | None = None, tokens: tuple[float, float] | None = None
) -> dict[str, float]:
    """What an experiment costs at prices of one's own, by what is paid; nothing for what has no price.

    Args:
        total: of all stages.
        count: devices, each of which is paid for as long as the experiment takes.
        hour: price of one device for an hour.
        tokens: prices of a million tokens that a judge's endpoint reads, and that it writes.
    """
    paid = {} if hour is None else {"devices": total.hours * count * hour}
    if tokens is not None:
        paid["judge"] = (total.judge_tokens_in * tokens[0] + total.judge_tokens_out * tokens[1]) / 1e6
    return paid


@dataclass(frozen=True)
class SeveralEstimates:
    """The costs of one experiment on several models, one after another.

    Attributes:
        experiment: its name.
        models: the cost on each, by the name of its run.
    """

    experiment: str
    models: Mapping[str, CostEstimate]

    @property
    def total(self) -> StageCost:
        """All together; the memory is the largest."""
        return summed([estimate.total for estimate in self.models.values()])

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "experiment": self.experiment,
            "fits": all(estimate.fits for estimate in self.models.values()),
            "models": {name: estimate.as_dict() for name, estimate in self.models.items()},
            "total": self.total.as_dict(),
        }


@dataclass(frozen=True)
class Pricing:
    """Prices of work: whose passes they are, and what they run on.

    Attributes:
        shape: the model's sizes.
        judge: a local judge's sizes.
        device: what runs the passes.
        count: how many of these.
        concurrency: calls of an endpoint under way at a time.
    """

    shape: Shape
    judge: Shape | None
    device: Device
    count: int = 1
    concurrency: int = 1

    def stages(self, work: Sequence[Work]) -> dict[str, StageCost]:
        """The costs by kind of stage, in the order in which stages first come."""
        kinds = dict.fromkeys(task.stage for task in work)
        return {kind: self._stage(kind, [task for task in work if task.stage == kind]) for kind in kinds}

    def memory(self, task: Work) -> Memory:
        """Of one task's process; the experiment's model stays where it is while a local judge works."""
        own = peak_memory(self.shape, task.passes)
        if self.judge is None or not task.judge_passes:
            # An endpoint has a memory of its own.
            return own if task.passes else Memory()
        judging = peak_memory(self.judge, task.judge_passes)
        return replace(judging, weights=judging.weights + own.weights)

    def _stage(self, name: str, work: Sequence[Work]) -> StageCost:
        memory = max(map(self.memory, work), key=lambda memory: memory.total)
        needed = max(1, int(-(-memory.total // (USABLE * self.device.memory))))
        seconds = [self._seconds(task) for task in work]
        seconds[0] += self.device.start.get(name, 0.0)
        # An endpoint is asked by the one process that has the run.
        side_by_side = 1 if any(task.judge_calls for task in work) else max(1, self.count // needed)
        return StageCost(
            tasks=len(work),
            forward_tokens=_tokens(work, "forward"),
            training_tokens=_tokens(work, "training"),
            generated_tokens=_tokens(work, "decoding"),
            flops=sum(_flops(self.shape, task.passes) + _flops(self.judge, task.judge_passes) for task in work),
            memory=memory,
            devices=needed,
            judge_calls=sum(task.judge_calls for task in work),
            judge_tokens_in=sum(task.judge_tokens_in for task in work),
            judge_tokens_out=sum(task.judge_tokens_out for task in work),
            device_hours=sum(seconds) / 3600,
            hours=makespan(seconds, side_by_side) / 3600,
        )

    def _seconds(self, task: Work) -> float:
        own = sum(self.device.seconds(self.shape, each) for each in task.passes)
        local = sum(self.device.seconds(self.judge, each) for each in task.judge_passes) if self.judge else 0.0
        return own + local + JUDGE_SECONDS * task.judge_calls / self.concurrency


def find_device(gpu: Gpu, model: ChatModel, dtype: Dtype) -> Device:
    """A GPU of the table; `cpu`, this machine measured on the bundled model; or `local`, its GPU measured on `model`.

    Raises `InputError` for `local` on a machine without a GPU.
    """
    if gpu in GPUS:
        return GPUS[gpu]
    from misdirection.cost.calibration import calibrate, calibrate_gpu

    return calibrate() if gpu == "cpu" else calibrate_gpu(model, resolve_dtype(dtype, "cuda"))


def weight_memory(model: str, revision: str | None, dtype: Dtype) -> int:
    """Bytes of a model's weights in main memory."""
    return int(Shape.of(read_structure(model, revision).chat, 1).parameters) * resolve_dtype(dtype, "cpu").itemsize


def _tokens(work: Iterable[Work], kind: Kind) -> int:
    return round(sum(each.tokens for task in work for each in (*task.passes, *task.judge_passes) if each.kind == kind))


def _flops(shape: Shape | None, passes: Sequence[Pass]) -> float:
    return sum(each.flops(shape) for each in passes) if shape else 0.0
