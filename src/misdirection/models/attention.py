"""What scaled dot-product attention may compute with while this package runs a model.

On CUDA torch prefers cuDNN's kernel, which builds a plan for every new shape. Nearly every batch here has one: rows of
other lengths, a cache that is a column longer at each step. So it is out, and torch chooses among the other kernels
that are allowed: flash attention where nothing is masked, the memory-efficient kernel with the boolean mask that
transformers 5.24 gives (without a copy of grouped keys where one token of each row runs), else the plain one.

Measured with cuDNN's kernel (one H100, torch 2.11 and transformers 5.24, November 2026, random weights of Qwen2.5-14B's
sizes in bfloat16): a training step of 2 rows x 8 took 5 to 7 s where 16 rows of a shape that was seen before took
0.5 s, a sampling step of 200 rows 132 ms where reading the weights takes 9 ms. What the other kernels take there has
not been measured. Kernels round otherwise: in bfloat16 logits differ in their last bits, as from batch to batch.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PLANNING = frozenset({"cuda"})
"""Kinds of devices on which attention may take a kernel that builds a plan for every shape."""


def changing_shapes(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a model on `device` runs batches of ever new shapes; what was allowed before is so after.

    Training needs it around the backward pass, too: a checkpointed block runs again there. It changes a setting of the
    whole process, so that nobody else may be given the turn inside of it. Nothing changes on a processor.
    """
    left = _without_plans()
    # Where the caller has allowed nothing else, that stays.
    return sdpa_kernel(left) if device.type in PLANNING and left else contextlib.nullcontext()


def _without_plans() -> list[SDPBackend]:
    """The kernels that are allowed now but for cuDNN's."""
    allowed = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, is_allowed in allowed.items() if is_allowed]
