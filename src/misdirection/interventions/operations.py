"""Operations of interventions on a tensor: plain functions of activations, for one row or for many at once.

All but the scaling of adapters are moves along a few fixed vectors b_k, with coefficients that may depend on x:

    x <- x + sum_k c_k(x) b_k          x [rows, tokens, width], b [rows or 1, k, width], c [rows, tokens, k]

so that one batched rank-k update serves every kind. Products are taken in float32 or wider: a bf16 sum would lose them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from misdirection.models.transfer import put


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """Tensors of one intervention, or of one for each row; the first dimension is 1 or the number of rows."""

    @abstractmethod
    def apply(self, x: Tensor, touched: Tensor) -> Tensor:
        """The changed `x`, [rows, tokens, width], in its own dtype; `touched` is [rows, tokens, 1], boolean."""

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same with its tensors on a device and in a dtype."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: put(value, device, dtype) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Move(Operation):
    """x <- x + sum_k c_k(x) b_k.

    Attributes:
        basis: [rows or 1, k, width].
    """

    basis: Tensor

    @abstractmethod
    def coefficients(self, x: Tensor) -> Tensor:
        """c, [rows, tokens, k], or what broadcasts to it."""

    def component(self, x: Tensor) -> Tensor:
        """x . b_k, [rows, tokens, k]."""
        return x @ self.basis.mT

    def apply(self, x: Tensor, touched: Tensor) -> Tensor:
        """See `Operation.apply`. Where a token is not touched its value stays to the last bit."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        coefficients = self.coefficients(wide) * touched
        basis = self.basis.expand(len(x), -1, -1)
        return self.finish(wide, torch.baddbmm(wide, coefficients, basis)).to(x.dtype)

    def finish(self, before: Tensor, after: Tensor) -> Tensor:
        """The result for `before` that was moved to `after`."""
        del before
        return after


@dataclass(frozen=True, eq=False)
class Add(Move):
    """x <- x + b; with `keep_norm`, the result is scaled back to the norm of x."""

    keep_norm: bool = False

    def coefficients(self, x: Tensor) -> Tensor:
        """One, everywhere."""
        return x.new_ones(1, 1, 1)

    def finish(self, before: Tensor, after: Tensor) -> Tensor:
        """With `keep_norm`, `after` at the length of `before`; a token that did not move is left to the last bit."""
        if not self.keep_norm:
            return after
        lengths = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
        # Divided by one where there is no length: a quotient that is not chosen still has a gradient, NaN.
        return after * torch.where(lengths[1] > 0, lengths[0] / lengths[1].where(lengths[1] > 0, 1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Project(Move):
    """x <- x - strength * V^T V (x - mean), for orthonormal rows V.

    Attributes:
        strength: [rows or 1, 1, 1].
        rest: V mean, [rows or 1, 1, k]: the component that is left; zero for a plain ablation.
    """

    strength: Tensor
    rest: Tensor

    def coefficients(self, x: Tensor) -> Tensor:
        """-strength * V (x - mean)."""
        return self.strength * (self.rest - self.component(x))


@dataclass(frozen=True, eq=False)
class Bound(Move):
    """x <- x + (clip(x . v_hat, low, high) - x . v_hat) v_hat.

    Attributes:
        low: [rows or 1, 1, 1]; minus infinity for no bound.
        high: likewise.
    """

    low: Tensor
    high: Tensor

    def coefficients(self, x: Tensor) -> Tensor:
        """How far the component lies outside of its bounds."""
        component = self.component(x)
        return component.clamp(self.low, self.high) - component


@dataclass(frozen=True, eq=False)
class Multiply(Operation):
    """x <- factor * x.

    Attributes:
        factor: [rows or 1, 1, 1].
    """

    factor: Tensor

    def apply(self, x: Tensor, touched: Tensor) -> Tensor:
        return torch.where(touched, (self.factor * x).to(x.dtype), x)
