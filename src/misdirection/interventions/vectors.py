"""Directions as tensors: their checks, bases and random controls, and the numbers that stand beside them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from misdirection.errors import InputError


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in float32, hexadecimal."""
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).numpy().tobytes()).hexdigest()


def check_direction(name: str, vector: Tensor, width: int, *, subspace: bool = False) -> None:
    """Raise `InputError`, in the name of a kind, unless `vector` is a direction, [width], or [k, width] if allowed."""
    shapes = f"[{width}]" + (f" or [k, {width}]" if subspace else "")
    if vector.shape[-1:] != (width,) or vector.ndim > 1 + subspace or vector.numel() == 0:
        raise InputError(
            f"{name}: the direction has shape {list(vector.shape)}, the model needs {shapes}: "
            "take one extracted from this base model"
        )
    if vector.is_meta or not vector.is_floating_point():
        kind = "no data (device meta)" if vector.is_meta else f"dtype {str(vector.dtype).removeprefix('torch.')}"
        raise InputError(f"{name}: the direction has {kind}: give a tensor of floating-point numbers")
    if not torch.isfinite(vector).all():
        raise InputError(f"{name}: the direction holds NaN or infinity: extract it again in bf16 or float32")
    if not vector.any(dim=-1).all():
        raise InputError(f"{name}: the direction is zero, so it points nowhere: choose another layer")


def wide(vector: Tensor) -> Tensor:
    """A direction in float32 or wider and on the processor; it follows the activations when it is used."""
    return vector.detach().to("cpu", torch.promote_types(vector.dtype, torch.float32))


def column(values: Sequence[float]) -> Tensor:
    """One number for each row of an operation, [rows, 1, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of [width] or [k, width], as rows, [k, width].

    A single vector keeps its sign. Raises `InputError` when the vectors are linearly dependent.
    """
    rows = wide(vectors).reshape(-1, vectors.shape[-1]).double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    basis, triangle = torch.linalg.qr(rows.T)
    if (triangle.diagonal().abs() < 1e-6).any():
        raise InputError("Ablate: the directions of a subspace are linearly dependent: leave out the repeated ones")
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return (basis * signs).T.to(wide(vectors).dtype)


def random_like(vector: Tensor, seed: int) -> Tensor:
    """A random direction with exactly the norm of `vector`: the control beside every intervention."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    scaled = noise * (vector.double().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return scaled.to(vector.dtype)
