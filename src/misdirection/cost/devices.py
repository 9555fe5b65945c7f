"""Devices that passes run on: peak rates from the vendors' data, and the share of them that this package reaches.

    seconds of a pass = max(FLOPs / (peak x utilisation), bytes / (bandwidth x share)) + blocks x overhead

which is the roofline of Williams et al. 2009 with an overhead. Decoding reads all weights for one token of each row,
and so is limited by the bandwidth until a batch is large. Peaks are dense bfloat16 with float32 accumulation.

    h100      989.4 TFLOP/s, 80 GB, 3,350 GB/s: NVIDIA H100 Tensor Core GPU datasheet, SXM5 (half of the sparse figure)
    a100-80   312 TFLOP/s, 80 GB, 2,039 GB/s: NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM4
    4090      165.2 TFLOP/s, 24 GB, 1,008 GB/s: NVIDIA Ada GPU architecture whitepaper, appendix A

The shares are assumptions: 0.4 of the peak for given text and 0.35 in training, as large dense models reach (0.46 in
Chowdhery et al. 2022), 0.6 of the bandwidth. A block of eager transformers code takes the host about 0.4 ms, which
bounds small models. Measured is one thing: a bare decoder forward reached 0.51 on one H100 (random weights of
Qwen2.5-14B's sizes in bfloat16, torch 2.11, transformers 5.24, November 2026). `local` measures the GPU that is there.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from misdirection.cost.model_cost import Kind, Pass
from misdirection.models.sizes import Shape

Gpu = Literal["h100", "a100-80", "4090", "cpu", "local"]


@dataclass(frozen=True)
class Device:
    """Effective rates of one device.

    Attributes:
        name: as the command names it.
        memory: bytes.
        rates: FLOP/s that are reached, by kind of pass.
        adapter_rates: those in an adapter's thin products; the same where nothing is said.
        bandwidth: bytes/s that are reached.
        overhead: seconds that each block of each pass takes besides.
        start: seconds of a stage's first task, by the stage's name: loading and imports.
    """

    name: str
    memory: float
    rates: Mapping[Kind, float]
    bandwidth: float
    overhead: float = 0.0
    start: Mapping[str, float] = field(default_factory=dict)
    adapter_rates: Mapping[Kind, float] = field(default_factory=dict)

    def seconds(self, shape: Shape, one: Pass) -> float:
        """How long a pass takes."""
        run = (shape.layers if one.blocks is None else one.blocks) + one.recomputed + 2 * one.back
        rate, thin = self.rates[one.kind], one.adapter_flops
        computed = (one.flops(shape) - thin) / rate + thin / self.adapter_rates.get(one.kind, rate)
        busy = max(computed, one.bytes(shape) / self.bandwidth)
        return busy + one.repeats * run * self.overhead


def _gpu(name: str, teraflops: float, gigabytes: float, gigabytes_per_second: float) -> Device:
    peak = teraflops * 1e12
    rates: dict[Kind, float] = {"forward": 0.4 * peak, "training": 0.35 * peak, "decoding": 0.4 * peak}
    return Device(name, gigabytes * 1e9, rates, 0.6 * gigabytes_per_second * 1e9, overhead=4e-4)


GPUS = {gpu.name: gpu for gpu in (_gpu("h100", 989.4, 80, 3350), _gpu("a100-80", 312, 80, 2039))}
GPUS["4090"] = _gpu("4090", 165.2, 24, 1008)


def makespan(seconds: Sequence[float], devices: int) -> float:
    """How long tasks take that run alone each, the longest first, on so many devices."""
    busy = [0.0] * devices
    for task in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + task)
    return max(busy)
