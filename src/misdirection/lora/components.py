"""The components of a LoRA: the vectors that each adapted module reads and writes.

The adapter of a module adds `scaling * B (A x)` to the module's output, with A [rank, in] and B [out, rank]. As a sum
of components,

    sum_i s_i write_i,   s_i = read_i . x

where, for rank 1, `read = scaling * A` and `write = B`, so that `s = scaling * (A . x)` is the scalar of the paper. The
basis of A and B is arbitrary above rank 1; there the components are those of the singular value decomposition of B A,
largest first: `read_i = scaling * sigma_i v_i`, `write_i = u_i` of unit norm, with the sign that makes its largest
entry positive.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The adapter of one module.

    Attributes:
        module: the module's path in the base model, such as `model.layers.15.mlp.down_proj`.
        layer: its block of the text decoder, 0-based; None outside of the blocks.
        a: [rank, in] float32.
        b: [out, rank] float32.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    module: str
    layer: int | None
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of components: the rank of B A can be no more than its width or height."""
        return min(*self.a.shape, len(self.b))

    @property
    def is_dead(self) -> bool:
        """Whether it adds nothing, since A or B is zero."""
        return not (self.a.any() and self.b.any())

    @property
    def norm(self) -> float:
        """Frobenius norm of what it adds to the weight, `scaling * B A`."""
        return math.sqrt(max(0.0, inner(self, self)))

    @property
    def read(self) -> Tensor:
        """The vectors that the components read, [rank, in] float32: its scalar is `read @ x`."""
        return self._components[0]

    @property
    def write(self) -> Tensor:
        """The vectors that the components write, [rank, out] float32."""
        return self._components[1]

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor]:
        if len(self.a) == 1:
            return self.scaling * self.a, self.b.T
        # The decomposition of the large product follows from that of a small one.
        out, out_rest = torch.linalg.qr(self.b.double())
        into, into_rest = torch.linalg.qr(self.a.double().T)
        left, sizes, right = torch.linalg.svd(out_rest @ into_rest.T, full_matrices=False)
        write, read = (out @ left).T, sizes.unsqueeze(-1) * (right @ into.T)
        largest = write.gather(1, write.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        return (self.scaling * sign * read).float(), (sign * write).float()


def inner(first: LoraModule, second: LoraModule) -> float:
    """Frobenius inner product of what two adapters of one module add to its weight.

    From the small products of the thin factors: B A itself is as large as the weight that it changes.
    """
    products = (second.b.double().T @ first.b.double()) * (second.a.double() @ first.a.double().T)
    return first.scaling * second.scaling * float(products.sum())


def norm_of(modules: Iterable[LoraModule]) -> float:
    """Frobenius norm of a whole update: of what its modules' adapters add, taken together."""
    return math.hypot(*(module.norm for module in modules))


def in_order(modules: Sequence[LoraModule]) -> tuple[LoraModule, ...]:
    """Modules in the order of their layers, those outside of the blocks first."""
    return tuple(sorted(modules, key=lambda module: (-1 if module.layer is None else module.layer, module.module)))


def project_out(tensor: Tensor, basis: Tensor, strength: float) -> Tensor:
    """Take the part along the orthonormal rows of `basis`, [k, out], out of a B, [out, rank], or a bias, [out]."""
    wide, rows = tensor.float(), basis.detach().cpu().float()
    return wide - strength * rows.T @ (rows @ wide)


# --- names --------------------------------------------------------------------------------------------------------


def feature_names(modules: Sequence[LoraModule], top: int | None = None) -> dict[str, list[str]]:
    """A short name of every component, by module, as long as it must be to be the only one.

    `layer_15` where a layer has one component, `layer_15.down_proj` where a module has one, else
    `layer_15.down_proj.0`. Of two modules of a layer that have one name the path comes in: `layer_15.mlp.c_proj`.
    Outside of the blocks it is the module's path.

    Args:
        modules: all that are named together.
        top: only so many leading components of each module.
    """
    counts = {module.module: min(module.rank, top or module.rank) for module in modules}
    in_layer: Counter[int | None] = Counter()
    for module in modules:
        in_layer[module.layer] += counts[module.module]
    alike = Counter((module.layer, _last(module)) for module in modules)
    named = {}
    for module in modules:
        alone = in_layer[module.layer] == 1
        stem = _stem(module, alone=alone, clear=alike[module.layer, _last(module)] == 1)
        count = counts[module.module]
        named[module.module] = [stem] if count == 1 else [f"{stem}.{number}" for number in range(count)]
    return named


def _stem(module: LoraModule, *, alone: bool, clear: bool) -> str:
    if module.layer is None:
        return module.module
    if alone:
        return f"layer_{module.layer}"
    inside = f".{module.module}".partition(f".{module.layer}.")[2]
    return f"layer_{module.layer}.{_last(module) if clear else inside}"


def _last(module: LoraModule) -> str:
    return module.module.rpartition(".")[2]
