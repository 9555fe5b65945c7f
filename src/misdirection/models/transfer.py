"""Copies from the host to a device that nobody waits for.

A copy from ordinary memory waits until the device has done all that it was told before. One from pinned memory is
queued like any other work, so that the host runs ahead. The way back is `Tensor.cpu`, which has to wait: it is taken
once for many batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_spread(network: Any) -> bool:
    """Whether a model's layers are on several devices, as accelerate has put them there."""
    return len(set((getattr(network, "hf_device_map", None) or {}).values())) > 1


def put(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`, itself if it is there already."""
    # Only from the host: a copy to it that nobody waits for would be read before it is there.
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return tensor.pin_memory().to(device, dtype, non_blocking=True)


def put_numbers(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers, int64, on `device`."""
    return put(torch.tensor(numbers, dtype=torch.long), device)
