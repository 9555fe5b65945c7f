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

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.operations import Add, Bound, Multiply, Operation, Project
from misdirection.interventions.positions import Rule
from misdirection.interventions.sites import Site
from misdirection.interventions.vectors import check_direction, column, orthonormal, wide
from misdirection.interventions.writers import post_norms, role, sublayers
from misdirection.lora.components import project_out
from misdirection.lora.view import LoraView, not_adapted
from misdirection.models.adapters import PREFIX
from misdirection.models.chat_model import ChatModel


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
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
        return (self.layer,)

    @property
    def signature(self) -> tuple[Hashable, ...]:
        return (*super().signature, self.keep_norm)

    @classmethod
    def stack(cls, interventions: Sequence["Steer"], where: Any) -> Operation:
        basis = torch.stack([(each.scale * wide(each.vector)).unsqueeze(0) for each in interventions])
        return Add(basis, interventions[0].keep_norm)

    def check(self, layers: int, width: int) -> None:
        super().check(layers, width)
        check_direction("Steer", self.vector, width)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
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
    def signature(self) -> tuple[Hashable, ...]:
        return (*super().signature, self.at, self.vector.ndim, len(self.vector))

    @classmethod
    def stack(cls, interventions: Sequence["Ablate"], where: Any) -> Operation:
        bases = [orthonormal(each.vector) for each in interventions]
        rests = [
            basis.new_zeros(len(basis)) if each.toward is None else basis @ each.toward.detach().to(basis)
            for each, basis in zip(interventions, bases, strict=True)
        ]
        return Project(
            torch.stack(bases), column([each.strength for each in interventions]), torch.stack(rests).unsqueeze(1)
        )

    def check(self, layers: int, width: int) -> None:
        super().check(layers, width)
        check_direction("Ablate", self.vector, width, subspace=True)
        if self.at not in ("blocks", "writes", "adapters"):
            raise InputError(f"Ablate: at={self.at!r}: give 'blocks', 'writes' or 'adapters'")
        if self.at != "blocks" and (self.layers is not None or self.toward is not None):
            raise InputError(
                f"Ablate: at={self.at!r} takes the component from all writes: leave out `layers` and `toward`"
            )
        if self.vector.ndim == 2:
            orthonormal(self.vector)
        if self.toward is not None and (
            self.toward.is_meta or self.toward.shape != (width,) or not torch.isfinite(self.toward).all()
        ):
            raise InputError(f"Ablate: `toward` must be one finite activation of shape [{width}]")

    def sites(self, chat: ChatModel) -> list[Site]:
        if self.at == "adapters":
            return self._adapter_sites(chat)
        if self.at == "writes":
            parts = [(layer, part) for layer, block in enumerate(chat.layers) for part in sublayers(block)]
            return [Site(chat.layers[0], "input", 0), *(Site(part, "output", layer) for layer, part in parts)]
        return super().sites(chat)

    def _adapter_sites(self, chat: ChatModel) -> list[Site]:
        """The outputs of B of the matrices that write to the stream."""
        _require_pre_norm(chat)
        sites = LoraView.of(chat).plain_sites()
        writing = [Site(site.output, "output", site.layer or 0) for site in sites if _writes(site.path)]
        if not writing:
            raise InputError(_NOTHING_WRITES)
        return writing

    @property
    def first_block(self) -> int:
        return -1 if self.at != "blocks" else super().first_block

    @property
    def on_adapters(self) -> bool:
        return self.at == "adapters"

    def changed_weights(self, weights: Mapping[str, Tensor], chat: ChatModel) -> dict[str, Tensor]:
        """See `Intervention.changed_weights`: B <- B - strength * V^T V B where the module writes to the stream."""
        if not self.on_adapters:
            return super().changed_weights(weights, chat)
        _require_pre_norm(chat)
        writing = [key for path, key in _b_keys(weights).items() if _writes(path)]
        if not writing:
            raise InputError(_NOTHING_WRITES)
        return {key: project_out(weights[key], orthonormal(self.vector), self.strength) for key in writing}


@dataclass(frozen=True, eq=False)
class Clamp(Intervention):
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

    @classmethod
    def stack(cls, interventions: Sequence["Clamp"], where: Any) -> Operation:
        low = column([-torch.inf if each.low is None else each.low for each in interventions])
        high = column([torch.inf if each.high is None else each.high for each in interventions])
        return Bound(torch.stack([orthonormal(each.vector) for each in interventions]), low, high)

    def check(self, layers: int, width: int) -> None:
        super().check(layers, width)
        check_direction("Clamp", self.vector, width)
        low = -torch.inf if self.low is None else self.low
        high = torch.inf if self.high is None else self.high
        if low > high or (low, high) == (-torch.inf, torch.inf):
            raise InputError("Clamp: give `low`, `high` or both, with low <= high")


@dataclass(frozen=True, eq=False)
class ScaleAdapters(Intervention):
    """Multiply what the LoRA adapters of some layers add: 0 switches one off, -1 negates it.

    Attributes:
        factors: factor by layer, 0-based.
        positions: which tokens are touched.
    """

    factors: Mapping[int, float]
    positions: Rule = "all"
    differs_by_site: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.factors)

    @classmethod
    def stack(cls, interventions: Sequence["ScaleAdapters"], where: Any) -> Operation:
        """See `Intervention.stack`; `where` is the layer."""
        return Multiply(column([each.factors[where] for each in interventions]))

    def _numbers(self) -> list[Any]:
        return list(self.factors.values())

    def sites(self, chat: ChatModel) -> list[Site]:
        """See `Intervention.sites`: the outputs of B."""
        view = LoraView.of(chat)
        return [Site(output, "output", layer) for layer in self.layers for output in view.outputs(layer)]

    @property
    def first_block(self) -> int:
        return min(self.layers, default=0) - 1

    @property
    def on_adapters(self) -> bool:
        return True

    def changed_weights(self, weights: Mapping[str, Tensor], chat: ChatModel) -> dict[str, Tensor]:
        """See `Intervention.changed_weights`: B <- factor * B."""
        keys = _b_keys(weights)
        changed: dict[str, Tensor] = {}
        for layer, factor in self.factors.items():
            inside = [key for path, key in keys.items() if path.startswith(f"{chat.layer_paths[layer]}.")]
            if not inside:
                raise not_adapted(layer)
            changed |= {key: weights[key].to(torch.float32) * factor for key in inside}
        return changed


@dataclass(frozen=True, eq=False)
class ProjectAdapters(Intervention):
    """Take directions out of what the LoRA of each module adds, as an adapter does whose B lost them.

    Attributes:
        bases: [k, out], orthonormal rows in the module's own output, by its path in the base model; k is one for all.
        strength: 1 removes the whole component; above that it is turned round.
        positions: which tokens are touched.
    """

    bases: Mapping[str, Tensor]
    strength: float = 1.0
    positions: Rule = "all"
    differs_by_site: ClassVar[bool] = True

    @property
    def layers(self) -> None:
        """Any layer: modules are named instead."""
        return

    @property
    def signature(self) -> tuple[Hashable, ...]:
        return (*super().signature, len(next(iter(self.bases.values()))))

    @classmethod
    def stack(cls, interventions: Sequence["ProjectAdapters"], where: Any) -> Operation:
        """See `Intervention.stack`; `where` is the path of the module, whose B it acts on."""
        bases = torch.stack([wide(each.bases[where]) for each in interventions])
        return Project(bases, column([each.strength for each in interventions]), bases.new_zeros(1, 1, bases.shape[1]))

    def _numbers(self) -> list[Any]:
        return [*super()._numbers(), *torch.cat([basis.flatten() for basis in self.bases.values()]).tolist()]

    def sites(self, chat: ChatModel) -> list[Site]:
        """See `Intervention.sites`: what B gives in every named module."""
        plain = LoraView.of(chat).plain_sites()
        sites = {site.path: Site(site.output, "output", site.layer or 0, site.path) for site in plain}
        self._require_adapted(sites)
        return [sites[path] for path in self.bases]

    def _require_adapted(self, paths: Mapping[str, Any]) -> None:
        if strange := [path for path in self.bases if path not in paths]:
            raise InputError(f"ProjectAdapters: {strange[0]} has no LoRA adapter inside of the decoder blocks")

    @property
    def first_block(self) -> int:
        return -1

    @property
    def on_adapters(self) -> bool:
        return True

    def changed_weights(self, weights: Mapping[str, Tensor], chat: ChatModel) -> dict[str, Tensor]:
        """See `Intervention.changed_weights`: B <- B - strength * V^T V B, with V of each module's own."""
        keys = _b_keys(weights)
        self._require_adapted(keys)
        return {
            keys[path]: project_out(weights[keys[path]], basis, self.strength) for path, basis in self.bases.items()
        }


_NOTHING_WRITES = "Ablate: at='adapters': no adapter of this model writes to the residual stream"


def _require_pre_norm(chat: ChatModel) -> None:
    if any(post_norms(block) for block in chat.layers):
        raise InputError("Ablate: at='adapters': norms stand between this model's matrices and its stream")


def _writes(path: str) -> bool:
    return role(f"{path}.weight") == "writer"


def _b_keys(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of B in an adapter's file by the path of its module in the base model."""
    ending = ".lora_B.weight"
    return {key.removeprefix(PREFIX).removesuffix(ending): key for key in weights if key.endswith(ending)}
