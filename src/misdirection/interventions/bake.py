"""Bake an intervention into a copy of a model's weights, shard by shard.

Ablation. Every matrix W that writes to the residual stream (embeddings, attention and MLP outputs, all experts), and
every bias b of one, loses its part along the directions V (orthonormal rows):

    W <- W - strength * V^T V W          b <- b - strength * V^T V b

On a pre-norm model this is `Ablate(at="writes", positions="all")`, exactly. On a post-norm model (Gemma 2/3, OLMo 2)
the norm between W and the stream multiplies by a gain g, so that W loses its part along g * v instead: then nothing is
written along v, but the norm scales what is left anew, and the result is not the hooked operation.

Steering. Where the MLP output of the layer has a bias, b <- b + scale * v.

What rounding to the weights' own dtype takes of the change is said, and refused above a limit (`rounding`).
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from misdirection.errors import InputError
from misdirection.files import atomic_folder, read_json, require_outside, require_replaceable, write_json
from misdirection.interventions.checkpoint import INDEX, PLAIN, Checkpoint
from misdirection.interventions.intervention import Intervention, rule_text
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.rounding import Divergences, Rounding, is_probed, probe, probe_ids
from misdirection.interventions.vectors import orthonormal
from misdirection.interventions.writers import WRITERS, check_stream
from misdirection.models.layers import text_config, text_decoder
from misdirection.models.libraries import no_progress_bars

_SLICE = 2**24
"""Numbers of one tensor that are widened at a time."""
_LOSSLESS = 1e-3
"""A share of the change that is no more than the rounding of float32."""
_INSTEAD = (
    "bake a copy of the model that is saved in float32, write an adapter over the unchanged model (--form adapter), or "
    "keep the intervention as a hook"
)

_REPORT = "baked.json"
_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pth", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class Baked:
    """An account of what baking changed.

    Attributes:
        base: the model whose weights were changed.
        changed: number of tensors that lost their part along the directions (or gained a bias).
        experts: number of expert matrices among them.
        before: largest |V W| / |W| of one changed tensor before; 0 for steering.
        after: the same after, against the same |W|: what the weights' own dtype leaves.
        untied: whether the output matrix was split off from the embedding.
        exact: whether the result equals, but for rounding, the hooked operation; False on a post-norm model.
        lost: share of the whole change that rounding to the weights' dtype loses.
        kl: divergence of the written model from the unrounded one on a probe text, nats/token; None where nothing is
            lost, and for a model without tokenizer or of more than two billion parameters.
        kl_unchanged: the same of the unchanged model: what the change does.
    """

    base: str
    changed: int
    experts: int
    before: float
    after: float
    untied: bool
    exact: bool
    lost: float
    kl: float | None = None
    kl_unchanged: float | None = None


def bake(model: str, intervention: Intervention, folder: str | Path, *, revision: str | None = None) -> Baked:
    """Write a copy of `model` with the intervention in its weights; `transformers` loads it like any other.

    Memory stays near that of the largest shard, but for a small model in half precision, which runs on a probe text.
    Beside the weights, `baked.json` says what was done.

    Args:
        model: `smollm2-135m` or `gemma3-270m` (bundled), a folder or a Hugging Face id.
        intervention: `Ablate(..., positions="all", at="writes")`, or `Steer(..., positions="all")`.
        folder: where to write; must not be the model's own.

    Raises:
        InputError: what cannot be baked, with the reason and what to use instead: a position rule, some layers
            only, a quantised base, a parameter whose part is not known, a layer without a bias to steer; a change of
            which rounding loses too much.
    """
    checkpoint, out = Checkpoint.open(model, revision), Path(folder)
    require_outside(checkpoint.folder, out, "model")
    require_replaceable(out)
    intervention.check(int(text_config(checkpoint.network).num_hidden_layers), checkpoint.width)
    baking = change(intervention, checkpoint)
    with atomic_folder(out) as temporary:
        for shard in checkpoint.shards:
            _write_shard(checkpoint, shard, baking, temporary)
        report = baking.report()
        told = None
        if report.lost > _LOSSLESS and (told := _divergences(checkpoint, intervention)):
            report = replace(report, kl=told.written, kl_unchanged=told.unchanged)
        baking.rounding.require_small(out, _INSTEAD, told)
        _write_rest(checkpoint, temporary, untied=report.untied)
        write_json(temporary / _REPORT, {**asdict(report), "intervention": intervention.described()})
    return report


class Change(Protocol):
    """An intervention as a change of one checkpoint's weights, tensor by tensor."""

    splits_head: bool
    """Whether an output matrix that shares the embedding's tensor gets one of its own, unchanged."""
    rounding: Rounding
    """What the tensors' dtype took of the change so far."""

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint as the change leaves it."""

    def report(self) -> Baked:
        """The account of what was changed, once all tensors have been."""


@singledispatch
def change(intervention: Intervention, checkpoint: Checkpoint) -> Change:
    """The change of a checkpoint that an intervention is; another package registers its kind's with `change.register`.

    Raises `InputError` for what cannot be baked.
    """
    del checkpoint
    raise InputError(f"{type(intervention).__name__} cannot be baked into weights: keep it as a hook")


def require_everywhere(intervention: Intervention) -> None:
    """Raise `InputError` unless the intervention touches every token, as weights do."""
    if not intervention.acts_everywhere:
        raise InputError(
            f"positions {rule_text(intervention.positions)} cannot be baked: weights act on every token; "
            "use positions='all', or keep the intervention as a hook"
        )


def _write_shard(checkpoint: Checkpoint, shard: str, change: Change, folder: Path) -> None:
    # A function of its own, so that one shard is let go before the next is read.
    tensors = dict(_shard(checkpoint, shard, change.apply, splits_head=change.splits_head))
    save_file(tensors, folder / shard, checkpoint.metadata(shard))


Apply = Callable[[str, Tensor], Tensor]


def _shard(checkpoint: Checkpoint, shard: str, apply: Apply, *, splits_head: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.tensors(shard):
        if splits_head and name == checkpoint.input_name:
            yield checkpoint.head_name, tensor.clone()
        yield name, apply(name, tensor)


class _Ablation:
    def __init__(self, ablation: Ablate, checkpoint: Checkpoint) -> None:
        require_everywhere(ablation)
        if ablation.at != "writes" or ablation.layers is not None or ablation.toward is not None:
            raise InputError(
                "weights can only lose a direction from all that is written to the stream: give at='writes' and "
                "neither `layers` nor `toward`, or keep the intervention as a hook"
            )
        check_stream(text_decoder(checkpoint.network))
        self._checkpoint, self._ablation = checkpoint, ablation
        self.splits_head = checkpoint.tied and not checkpoint.stores_head
        self._written = {name for name in sorted(checkpoint.names) if checkpoint.part(name) in ("writer", "embedding")}
        self._missing: set[str | int] = {checkpoint.input_name, *range(len(checkpoint.blocks))}
        self.rounding = Rounding()
        self._changed = self._experts = 0
        self._before = self._after = 0.0

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that writes without its part along the directions; any other as it is."""
        if name not in self._written:
            return tensor
        if tensor.dtype not in PLAIN:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{name}: its weights are packed ({dtype}): bake the unquantised model instead")
        axis = self._checkpoint.output_axis(name, tensor)
        vectors = self._ablation.vector.detach().cpu().double()
        gain = self._checkpoint.gain(name)
        basis = orthonormal(vectors if gain is None else vectors * gain)
        moved = tensor.movedim(axis, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        result = self._projected(name, rows, basis.to(torch.promote_types(tensor.dtype, torch.float32)))
        self._count(name, tensor)
        return result.view(moved.shape).movedim(-1, axis).contiguous()

    def _projected(self, name: str, rows: Tensor, basis: Tensor) -> Tensor:
        """The rows without their parts along `basis`; a slice at a time, since wide copies take memory."""
        result, step = torch.empty_like(rows), max(1, _SLICE // rows.shape[-1])
        size = before = after = 0.0
        for first in range(0, len(rows), step):
            wide = rows[first : first + step].to(basis.dtype)
            component = wide @ basis.T
            exact = wide - self._ablation.strength * component @ basis
            left = exact.to(rows.dtype)
            self.rounding.add(name, wide, exact, left)
            result[first : first + step] = left
            size += float(wide.square().sum())
            before += float(component.square().sum())
            after += float((left.to(basis.dtype) @ basis.T).square().sum())
        if size:
            self._before = max(self._before, (before / size) ** 0.5)
            self._after = max(self._after, (after / size) ** 0.5)
        return result

    def _count(self, name: str, tensor: Tensor) -> None:
        self._changed += 1
        block = self._checkpoint.block_of(name)
        self._missing.discard(block[0] if block else name)
        if ".experts." in name and not name.endswith("bias"):
            self._experts += len(tensor) if tensor.ndim == 3 else 1

    def report(self) -> Baked:
        """See `Change.report`."""
        of = self._checkpoint
        if self._missing:
            missing = ", ".join(sorted(f"layer {it}" if isinstance(it, int) else it for it in self._missing))
            raise InputError(f"{of.name}: nothing that writes to the stream in {missing}: fetch it again")
        sizes, lost = (self._before, self._after), self.rounding.share
        return Baked(of.name, self._changed, self._experts, *sizes, of.tied, exact=not of.post_norm, lost=lost)


class _Steering:
    splits_head = False

    def __init__(self, steering: Steer, checkpoint: Checkpoint) -> None:
        require_everywhere(steering)
        if steering.keep_norm:
            raise InputError("Steer: keep_norm depends on the activation and cannot be baked: keep it as a hook")
        if checkpoint.post_norm:
            raise InputError(f"{checkpoint.name}: a norm follows its MLP, so that a bias is not a steering: use a hook")
        self._checkpoint, self._steering, self.rounding = checkpoint, steering, Rounding()
        names = [name for members in checkpoint.shards.values() for name in members]
        self._target = next(filter(self._is_bias, names), None)
        if self._target is None:
            raise InputError(
                f"{checkpoint.name}: the MLP output of layer {steering.layer} has no bias to put the vector into: "
                "keep the steering as a hook, or export the direction as a control vector"
            )

    def _is_bias(self, name: str) -> bool:
        block = self._checkpoint.block_of(name)
        if block is None or block[0] != self._steering.layer:
            return False
        parts = block[1].split(".")
        in_mlp = not any("attn" in part or "attention" in part or "expert" in part for part in parts)
        return in_mlp and parts[-1] == "bias" and parts[-2] in WRITERS

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The bias of the layer's MLP output with the vector added; any other tensor as it is."""
        if name != self._target:
            return tensor
        vector = self._steering.scale * self._steering.vector.detach().cpu().double()
        # Granite multiplies what its MLP gives before it adds it to the stream.
        factor = getattr(text_config(self._checkpoint.network), "residual_multiplier", 1.0)
        exact = tensor.double() + vector / factor
        written = exact.to(tensor.dtype)
        self.rounding.add(name, tensor, exact, written)
        return written

    def report(self) -> Baked:
        """See `Change.report`."""
        lost = self.rounding.share
        return Baked(self._checkpoint.name, 1, 0, 0.0, 0.0, untied=False, exact=True, lost=lost)


change.register(Ablate, _Ablation)
change.register(Steer, _Steering)


# --- what rounding does -------------------------------------------------------------------------------------------


def _divergences(checkpoint: Checkpoint, intervention: Intervention) -> Divergences | None:
    """What rounding does to what the model says; None where that cannot be run."""
    if not is_probed(checkpoint.network):
        return None
    try:
        ids = probe_ids(AutoTokenizer.from_pretrained(checkpoint.folder))
    except (OSError, ValueError, KeyError):
        return None
    # Of a folder without a tokenizer's files, transformers may make an empty one.
    if not ids.numel():
        return None
    exact, written = change(intervention, checkpoint), change(intervention, checkpoint)
    applied = (lambda name, tensor: exact.apply(name, tensor.float()), written.apply, lambda _name, tensor: tensor)
    networks = (_in_single(checkpoint, apply, splits_head=exact.splits_head) for apply in applied)
    return Divergences.between(*(probe(network, ids) for network in networks))


def _in_single(checkpoint: Checkpoint, apply: Apply, *, splits_head: bool) -> Any:
    """The checkpoint's network in float32, with its tensors as `apply` leaves them."""
    config = copy.deepcopy(checkpoint.network.config)
    if splits_head:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    parts = (_shard(checkpoint, shard, apply, splits_head=splits_head) for shard in checkpoint.shards)
    tensors = {name: tensor for part in parts for name, tensor in part}
    kind = type(checkpoint.network)
    with no_progress_bars():
        return kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()


def _write_rest(checkpoint: Checkpoint, folder: Path, *, untied: bool) -> None:
    """Everything but the weights, with the index and the configuration brought up to date."""
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if untied:
        config = read_json(folder / "config.json")
        for section in (config, config.get("text_config")):
            if section is not None:
                section["tie_word_embeddings"] = False
        write_json(folder / "config.json", config)
    if (checkpoint.folder / INDEX).is_file():
        index = read_json(checkpoint.folder / INDEX)
        if untied and not checkpoint.stores_head:
            _add_head(index, checkpoint)
        write_json(folder / INDEX, index)


def _add_head(index: dict[str, Any], checkpoint: Checkpoint) -> None:
    embedding = checkpoint.tensor(checkpoint.input_name)
    index["weight_map"][checkpoint.head_name] = index["weight_map"][checkpoint.input_name]
    for name, more in (("total_size", embedding.nbytes), ("total_parameters", embedding.numel())):
        if name in index.get("metadata", {}):
            index["metadata"][name] += more
