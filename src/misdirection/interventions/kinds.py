"""The interventions: steering, ablation, clamping, and the scaling of adapters.

    Steer            x <- x + scale * v                                     (paper, section on steering)
      keep_norm      x <- (x + scale * v) * |x| / |x + scale * v|
    Ablate           x <- x - strength * (x . v_hat) v_hat                  (paper, section on ablation)
      a subspace     x <- x - strength * V^T V x,         rows of V orthonormal
      towards mean m x <- x - strength * V^T V (x - m)    affine ablation
    Clamp            x <- x + (clip(x . v_hat, low, high) - x . v_hat) v_hat
    ScaleAdapters    s B A h <- factor * s B A h          (paper, section on interpreting rank-1 adapters)
    ProjectAdapters  s B A h <- s (B - strength * V^T V B) A h,  with V of each adapted module's own

`x` is the output of a decoder block, [rows, tokens, width]. On one layer, interventions act in the order given, each on
what the one before it left; those of disjoint layers may be given in any order. Ablation is idempotent; steering by a
scale and then by its negative is nothing.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.operations import Add, Bound, Multiply, Operation, Project
from misdirection.interventions.positions import Positions, Rule


@dataclass(frozen=True, eq=False)
class Steer:
    """Add `scale` times `vector` to the output of one layer.

    Attributes:
        vector: [width], with its own norm: scale 1 adds the direction as it was extracted.
        layer: decoder block, 0-based.
        scale: multiple of the vector.
        positions: which tokens are touched.
        keep_norm: scale each changed activation back to the norm that it had.
    """

    vector: Tensor
    layer: int
    scale: float = 1.0
    positions: Rule = "not_first"
    keep_norm: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers this acts on."""
        return (self.layer,)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (Steer, _rule_key(self.positions), self.keep_norm)

    @staticmethod
    def stack(ones: Sequence["Steer"], _layer: int) -> Operation:
        """One operation, with a row for each of `ones`."""
        basis = torch.stack([(one.scale * _wide(one.vector)).unsqueeze(0) for one in ones])
        return Add(basis, ones[0].keep_norm)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Take one direction, or a subspace, out of the residual stream.

    Attributes:
        vector: [width], or [k, width] for a subspace; only directions count, they are orthonormalised.
        layers: decoder blocks, 0-based; None is all of them (the paper's).
        strength: 1 removes the whole component, 0 nothing.
        positions: which tokens are touched.
        toward: [width], the activation whose component is left; None leaves none. Give the mean over aligned answers
            for an affine ablation.
        at: `blocks`, the output of each block (the paper's); `writes`, everything that is written to the stream: what
            enters the first block, and what each attention and each MLP adds, as weights with a baked ablation do;
            `adapters`, what the LoRA adapters of a block write, as an adapter does whose B lost the direction.
    """

    vector: Tensor
    layers: tuple[int, ...] | None = None
    strength: float = 1.0
    positions: Rule = "not_first"
    toward: Tensor | None = None
    at: Literal["blocks", "writes", "adapters"] = "blocks"

    @property
    def signature(self) -> tuple[Any, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (Ablate, _rule_key(self.positions), self.at, self.vector.ndim, len(self.vector))

    @staticmethod
    def stack(ones: Sequence["Ablate"], _layer: int) -> Operation:
        """One operation, with a row for each of `ones`."""
        bases = [orthonormal(one.vector) for one in ones]
        rests = [
            basis.new_zeros(len(basis)) if one.toward is None else basis @ one.toward.detach().to(basis)
            for one, basis in zip(ones, bases, strict=True)
        ]
        return Project(torch.stack(bases), _column([one.strength for one in ones]), torch.stack(rests).unsqueeze(1))


@dataclass(frozen=True, eq=False)
class Clamp:
    """Keep the component along a direction within bounds, or, with equal bounds, at a value.

    Attributes:
        vector: [width]; only its direction counts.
        low: smallest x . v_hat, in activation units; None for no bound.
        high: largest.
        layers: decoder blocks, 0-based; None is all of them.
        positions: which tokens are touched.
    """

    vector: Tensor
    low: float | None = None
    high: float | None = None
    layers: tuple[int, ...] | None = None
    positions: Rule = "not_first"

    @property
    def signature(self) -> tuple[Any, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (Clamp, _rule_key(self.positions))

    @staticmethod
    def stack(ones: Sequence["Clamp"], _layer: int) -> Operation:
        """One operation, with a row for each of `ones`."""
        low = _column([-torch.inf if one.low is None else one.low for one in ones])
        high = _column([torch.inf if one.high is None else one.high for one in ones])
        return Bound(torch.stack([orthonormal(one.vector) for one in ones]), low, high)


@dataclass(frozen=True, eq=False)
class ScaleAdapters:
    """Multiply what the LoRA adapters of some layers add: 0 switches one off, -1 negates it.

    Attributes:
        factors: factor by layer, 0-based.
        positions: which tokens are touched.
    """

    factors: Mapping[int, float]
    positions: Rule = "all"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers this acts on."""
        return tuple(self.factors)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (ScaleAdapters, _rule_key(self.positions))

    @staticmethod
    def stack(ones: Sequence["ScaleAdapters"], layer: int) -> Operation:
        """One operation on the adapters of `layer`, with a row for each of `ones`."""
        return Multiply(_column([one.factors[layer] for one in ones]))


@dataclass(frozen=True, eq=False)
class ProjectAdapters:
    """Take directions out of what the LoRA of each module adds, as an adapter does whose B lost them.

    Attributes:
        bases: [k, out], orthonormal rows in the module's own output, by its path in the base model; k is one for all.
        strength: 1 removes the whole component; above that it is turned round.
        positions: which tokens are touched.
    """

    bases: Mapping[str, Tensor]
    strength: float = 1.0
    positions: Rule = "all"

    @property
    def layers(self) -> None:
        """Any layer: modules are named instead."""
        return

    @property
    def signature(self) -> tuple[Any, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (ProjectAdapters, _rule_key(self.positions), len(next(iter(self.bases.values()))))

    @staticmethod
    def stack(ones: Sequence["ProjectAdapters"], module: str) -> Operation:
        """One operation on what B of `module` gives, with a row for each of `ones`."""
        bases = torch.stack([_wide(one.bases[module]) for one in ones])
        return Project(bases, _column([one.strength for one in ones]), bases.new_zeros(1, 1, bases.shape[1]))


Intervention = Steer | Ablate | Clamp | ScaleAdapters | ProjectAdapters


def described(intervention: Intervention) -> dict[str, Any]:
    """Kind and settings as JSON values, with tensors by their SHA-256 (float32): what a result or a file depends on."""
    settings = {name: _plain(value) for name, value in vars(intervention).items()}
    return {"kind": type(intervention).__name__, **settings}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return digest(value) if isinstance(value, Tensor) else value


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in float32, hexadecimal."""
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).numpy().tobytes()).hexdigest()


def first_block(intervention: Intervention) -> int:
    """The first block whose output the intervention itself changes; -1 when it changes what enters block 0.

    The blocks up to this one compute what they compute without it.
    """
    if isinstance(intervention, ScaleAdapters):
        return min(intervention.layers, default=0) - 1
    if isinstance(intervention, ProjectAdapters) or (isinstance(intervention, Ablate) and intervention.at != "blocks"):
        return -1
    return min(intervention.layers or (0,))


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of [width] or [k, width], as rows, [k, width].

    A single vector keeps its sign. Raises `InputError` when the vectors are linearly dependent.
    """
    rows = _wide(vectors).reshape(-1, vectors.shape[-1]).double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    basis, triangle = torch.linalg.qr(rows.T)
    if (triangle.diagonal().abs() < 1e-6).any():
        raise InputError("Ablate: the directions of a subspace are linearly dependent: leave out the repeated ones")
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return (basis * signs).T.to(_wide(vectors).dtype)


def check(intervention: Intervention, layers: int, width: int) -> None:
    """Raise `InputError` unless vectors and layers fit a model of so many `layers` and such a `width`."""
    name = type(intervention).__name__
    _check_numbers(name, intervention)
    _check_rule(name, intervention.positions)
    if intervention.layers is not None and not intervention.layers:
        raise InputError(f"{name}: names no layer, so that nothing would happen: name one")
    for layer in intervention.layers or ():
        if not 0 <= layer < layers:
            raise InputError(f"{name}: layer {layer} is out of range: this model has layers 0 to {layers - 1}")
    if isinstance(intervention, ScaleAdapters | ProjectAdapters):
        return
    _check_vectors(name, intervention.vector, width, subspace=isinstance(intervention, Ablate))
    if isinstance(intervention, Ablate):
        _check_ablation(intervention, width)
    if isinstance(intervention, Clamp) and not _bounded(intervention):
        raise InputError("Clamp: give `low`, `high` or both, with low <= high")


def _check_numbers(name: str, intervention: Intervention) -> None:
    values = [getattr(intervention, field.name) for field in fields(intervention)]
    if isinstance(intervention, ScaleAdapters):
        values = list(intervention.factors.values())
    if isinstance(intervention, ProjectAdapters):
        values += torch.cat([basis.flatten() for basis in intervention.bases.values()]).tolist()
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise InputError(f"{name}: a setting is NaN or infinite: give a number")


def _check_rule(name: str, rule: Rule) -> None:
    if isinstance(rule, Tensor):
        if rule.dtype != torch.bool or rule.ndim not in (1, 2) or rule.numel() == 0:
            raise InputError(f"{name}: a position mask is one boolean per place, [places] or [rows, places]")
    elif rule not in get_args(Positions):
        raise InputError(f"{name}: positions {rule!r}: give one of {', '.join(get_args(Positions))}, or a mask")


def _check_vectors(name: str, vector: Tensor, width: int, *, subspace: bool) -> None:
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


def _check_ablation(one: Ablate, width: int) -> None:
    if one.at not in ("blocks", "writes", "adapters"):
        raise InputError(f"Ablate: at={one.at!r}: give 'blocks', 'writes' or 'adapters'")
    if one.at != "blocks" and (one.layers is not None or one.toward is not None):
        raise InputError(f"Ablate: at={one.at!r} takes the component from all writes: leave out `layers` and `toward`")
    if one.vector.ndim == 2:
        orthonormal(one.vector)
    if one.toward is not None and (
        one.toward.is_meta or one.toward.shape != (width,) or not torch.isfinite(one.toward).all()
    ):
        raise InputError(f"Ablate: `toward` must be one finite activation of shape [{width}]")


def _bounded(one: Clamp) -> bool:
    low = -torch.inf if one.low is None else one.low
    high = torch.inf if one.high is None else one.high
    return low <= high and (low, high) != (-torch.inf, torch.inf)


def random_like(vector: Tensor, seed: int) -> Tensor:
    """A random direction with exactly the norm of `vector`: the control beside every intervention."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    scaled = noise * (vector.double().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return scaled.to(vector.dtype)


def _rule_key(rule: Rule) -> str | int:
    return rule if isinstance(rule, str) else id(rule)


def _wide(vector: Tensor) -> Tensor:
    """In float32 or wider and on the processor; it follows the activations when it is used."""
    return vector.detach().to("cpu", torch.promote_types(vector.dtype, torch.float32))


def _column(values: Sequence[float]) -> Tensor:
    """[rows, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
