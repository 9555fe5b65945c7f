"""A stand-in for a GPU on a processor: tensors that say they are on `cuda:0`, compute here, and count what waits.

Every operation runs on the tensor that such a one holds, so that results are the processor's own. What a program does
by device it does as on CUDA. Counted are the ways back to the host, for which a GPU must have done all that it was told
(`Tensor.cpu`, `item`, `tolist`, the truth of a tensor, `nonzero`, a mask as an index), and copies from ordinary host
memory. What it cannot tell: how long anything takes, and how the kernels of a GPU round.
"""

from collections import Counter
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

_HOST = torch.device("cpu")
_TO_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
_WHOLE = {"aten::scaled_dot_product_attention"}
"""Not taken apart: its parts ask what a device can."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU; `held` is here."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        # To torch itself a device without data: on CUDA it would look for a driver.
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, **layout, device="meta", requires_grad=held.requires_grad
        )

    def __init__(self, held):
        self.held = held

    device = property(lambda _self: GPU)
    is_cuda = property(lambda _self: True)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


waits: Counter[str] = Counter()
"""How often the host has waited for the device, by how."""


class _Operations(TorchDispatchMode):
    """Sees what makes tensors on the GPU; torch does not look for a driver while such a mode is on."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Memory is pinned as if there were a driver to do it."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            pinned = args[0].view(args[0].shape)
            pinned.is_as_if_pinned = True
            return pinned
        return func(*args, **(kwargs or {}))


def _run(func, args, kwargs):
    name = func._schema.name
    if name not in _WHOLE and _is_composite(func):
        with _Operations():
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    leaves = tree_leaves((args, kwargs))
    on_gpu = any(isinstance(leaf, OnGpu) for leaf in leaves)
    target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), GPU if on_gpu else _HOST)
    _count(name, args, kwargs, on_gpu, target)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if target.type != "cuda":
        return result
    if func._schema.is_mutable:
        return next(leaf for leaf in leaves if isinstance(leaf, OnGpu)) if isinstance(result, torch.Tensor) else result
    # A view of an ordinary tensor must be one in inference mode, too.
    with torch.inference_mode(False):
        return tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


@cache
def _is_composite(func):
    """Whether an operation is made of others, which are then seen."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _held(leaf):
    if isinstance(leaf, torch.device):
        return _HOST
    return leaf.held if isinstance(leaf, OnGpu) else leaf


def _count(name, args, kwargs, on_gpu, target):
    boolean = name in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
    back = name in _TO_HOST or boolean or (name == "aten::_to_copy" and target.type == "cpu")
    if on_gpu and back:
        waits["read"] += 1
    elif name == "aten::copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
        waits["read" if isinstance(args[1], OnGpu) else "written"] += 1
    elif name == "aten::_to_copy" and not on_gpu and target.type == "cuda" and args[0].numel():
        if not (kwargs.get("non_blocking") and getattr(args[0], "is_as_if_pinned", False)):
            waits["written"] += 1
    elif name in _INDEXED and isinstance(args[0], OnGpu):
        # An index that is here is copied there first.
        waits.update("written" for index in args[1] if index is not None and not isinstance(index, OnGpu))


@contextmanager
def stand_in_gpu(memory=80e9):
    """What is put on `GPU` in the context is as if on one of so many bytes; gives the counter, at zero."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    waits.clear()
    properties = SimpleNamespace(name="stand-in", total_memory=memory)
    try:
        with patch.object(torch.cuda, "get_device_properties", lambda _device: properties), _Operations(), _Functions():
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def put_on_gpu(chat):
    """The same chat with its weights as if on the GPU."""
    for module in chat.model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(OnGpu(weight.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return chat
