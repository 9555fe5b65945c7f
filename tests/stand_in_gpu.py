"""A stand-in for GPUs on a processor: tensors that say they are on `cuda:0`, compute here, and count what waits.

Every operation runs on the tensor that such a one holds, so that results are the processor's own. What a program does
by device it does as on CUDA: an operation on tensors of several devices is refused, with the exceptions that CUDA
makes. Counted are the ways back to the host, for which a GPU must have done all that it was told (`Tensor.cpu`, `item`,
`tolist`, the truth of a tensor, `nonzero`, a mask as an index), and copies from ordinary host memory. What it cannot
tell: how long anything takes, and how the kernels of a GPU round.
"""

from collections import Counter
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)

_HOST = torch.device("cpu")
_TO_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
_MOVES = {"aten::_to_copy", "aten::copy_"}
_WHOLE = {"aten::scaled_dot_product_attention"}
"""Not taken apart: its parts ask what a device can."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; `held` is here."""

    @staticmethod
    def __new__(cls, held, _gpu=GPU):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        # To torch itself a device without data: on CUDA it would look for a driver.
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, **layout, device="meta", requires_grad=held.requires_grad
        )

    def __init__(self, held, gpu=GPU):
        self.held, self.gpu = held, gpu

    device = property(lambda self: self.gpu)
    is_cuda = property(lambda _self: True)
    is_meta = property(lambda _self: False)

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), OnGpu(self.held.clone(), self.gpu))

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        # Torch itself would make the tensor of them without data.
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

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


class _Moved(torch.autograd.Function):
    """A tensor elsewhere; its gradient goes back to where it came from, which torch itself could not tell."""

    @staticmethod
    def forward(ctx, tensor, move):
        ctx.device, ctx.dtype = tensor.device, tensor.dtype
        return move(tensor.detach())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.device, ctx.dtype), None


class _Functions(TorchFunctionMode):
    """Memory is pinned as if there were a driver to do it, and gradients go through copies."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if func is torch.Tensor.to and _is_there(*args, **(kwargs or {})):
            return args[0]
        if func in (torch.Tensor.to, torch.Tensor.cpu) and args[0].requires_grad and torch.is_grad_enabled():
            return _Moved.apply(args[0], lambda tensor: func(tensor, *args[1:], **(kwargs or {})))
        if func is torch.Tensor.pin_memory:
            pinned = args[0].view(args[0].shape)
            pinned.is_as_if_pinned = True
            return pinned
        return func(*args, **(kwargs or {}))


def _is_there(tensor, *wanted, device=None, dtype=None, copy=False, **_options):
    """Whether a tensor of a GPU is asked for where it is, and as it is."""
    given = [*wanted, device, dtype]
    devices = [torch.device(each) for each in given if isinstance(each, str | torch.device)]
    dtypes = [each for each in given if isinstance(each, torch.dtype)]
    if copy or not isinstance(tensor, OnGpu) or any(isinstance(each, torch.Tensor) for each in given):
        return False
    return {*devices, *dtypes} <= {tensor.device, tensor.dtype}


def _run(func, args, kwargs):
    name = func._schema.name
    if name not in _WHOLE and _is_composite(func):
        with _Operations():
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    leaves = tree_leaves((args, kwargs))
    on_gpu = any(isinstance(leaf, OnGpu) for leaf in leaves)
    _require_together(name, args, leaves)
    target = _target(leaves)
    _count(name, args, kwargs, on_gpu, target)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if target.type != "cuda":
        return result
    if func._schema.is_mutable:
        return next(leaf for leaf in leaves if isinstance(leaf, OnGpu)) if isinstance(result, torch.Tensor) else result
    # A view of an ordinary tensor must be one in inference mode, too.
    with torch.inference_mode(False):
        return tree_map(lambda leaf: OnGpu(leaf, target) if isinstance(leaf, torch.Tensor) else leaf, result)


def _target(leaves):
    """Where the result is: where an argument says, or with the first tensor of a GPU."""
    # Torch itself takes what is on a GPU for a tensor without data, and so places what belongs to it.
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type != "meta"]
    devices += [leaf.device for leaf in leaves if isinstance(leaf, OnGpu)]
    target = next(iter(devices), _HOST)
    return torch.device("cuda", target.index or 0) if target.type == "cuda" else target


def _require_together(name, args, leaves):
    """Refuse what CUDA does: tensors of several devices, but for numbers and indices of the processor's."""
    if name in _MOVES:
        return
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if name in _INDEXED:
        left = [index for index in args[1] if index is not None and index.device.type == "cpu"]
        tensors = [tensor for tensor in tensors if all(tensor is not index for index in left)]
    devices = {str(tensor.device) for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors on several devices, {' and '.join(sorted(devices))}")


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


def _by_device_and_dtype(columns, with_indices=False):
    """Rows of lists of tensors in groups, as optimisers take them: torch's own is told that all are on one device."""
    groups = {}
    for number, first in enumerate(columns[0]):
        group, numbers = groups.setdefault((first.device, first.dtype), ([[] for _ in columns], []))
        for own, column in zip(group, columns, strict=True):
            own += column[number : number + 1]
        numbers += [number] * with_indices
    return groups


@contextmanager
def stand_in_gpu(memory=80e9):
    """What is put on `GPU` in the context is as if on one of so many bytes; gives the counter, at zero."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    waits.clear()
    properties = SimpleNamespace(name="stand-in", total_memory=memory)
    try:
        with (
            patch.object(torch.cuda, "get_device_properties", lambda _device: properties),
            patch.object(torch._C, "_group_tensors_by_device_and_dtype", _by_device_and_dtype),
            _Operations(),
            _Functions(),
        ):
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def spread_over_gpus(chat):
    """The same chat on `GPU` and `OTHER`, as accelerate parts it where neither holds it all."""
    half = sum(weight.numel() * weight.element_size() for weight in chat.model.parameters()) // 2
    blocks = chat.model._no_split_modules
    numbers = infer_auto_device_map(chat.model, max_memory={0: half, 1: 2 * half}, no_split_module_classes=blocks)
    # By numbers torch would look for a driver.
    placed = {name: torch.device("cuda", number) for name, number in numbers.items()}
    dispatch_model(chat.model, placed, main_device=GPU, skip_keys=chat.model._skip_keys_device_placement)
    return chat


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
