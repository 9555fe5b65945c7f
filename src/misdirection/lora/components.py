"""The components of a LoRA: what each adapted module reads, and what it writes.

The adapter of a module adds `scaling * B (A x)` to the module's output, with A [rank, in] and B [out, rank]. As a sum
of components,

    sum_i s_i write_i,   s_i = read_i . x

where, for rank 1, `read = scaling * A` and `write = B`, so that `s = scaling * (A . x)` is the scalar of the paper. The
basis of A and B is arbitrary above rank 1; there the components are those of the singular value decomposition of B A,
largest first: `read_i = scaling * sigma_i v_i`, `write_i = u_i` of unit norm, with the sign that makes its largest
entry positive.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from misdirection.errors import InputError
from misdirection.files import read_json
from misdirection.interventions.lora import FROM_BASE
from misdirection.models.chat_model import ChatModel

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = re.compile(r"\.(\d+)\.")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")


# The output is then no longer the sum above of A and B, or PEFT may make it another one.
_MORE_THAN_A_SUM = {
    **{field.name: "it is a variant of LoRA" for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")},
    "use_dora": "DoRA rescales the whole weight",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "an activated LoRA acts after its invocation tokens only",
    "target_parameters": "it adapts fused parameters, not modules",
    "lora_bias": "its B has a bias",
}


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
    def read(self) -> Tensor:
        """What each component reads, [rank, in] float32: its scalar is `read @ x`."""
        return self._components[0]

    @property
    def write(self) -> Tensor:
        """What each component writes, [rank, out] float32."""
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


@dataclass(frozen=True)
class Adapter:
    """A LoRA as its files hold it.

    Attributes:
        base: name of the model that it was trained on, as PEFT wrote it down; "" if it did not.
        modules: adapted modules, in the order of their layers.
        saved: names of further weights that were trained as a whole (`modules_to_save`, biases, single tokens): they
            have no components.
    """

    base: str
    modules: tuple[LoraModule, ...]
    saved: tuple[str, ...]


def read_components(folder: str | Path) -> Adapter:
    """Read a PEFT folder, without the base model. An embedding's `a` has one column for each token of the vocabulary.

    Raises `InputError` for a missing or damaged file, for what is no LoRA, and for a LoRA whose output is not
    the sum above (DoRA and other variants).
    """
    where = Path(folder)
    config = read_json(where / _CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{where / _CONFIG}: damaged, no JSON object: fetch or train the adapter again")
    _require_sum(config, str(folder))
    factors, saved = _factors(_read_weights(where), str(folder))
    modules = [_module(name, sides, config, str(folder)) for name, sides in factors.items()]
    if not modules:
        raise InputError(f"{folder}: holds no LoRA weights: nothing was trained that has components")
    return Adapter(str(config.get("base_model_name_or_path") or ""), _in_order(modules), tuple(sorted(saved)))


def live_components(chat: ChatModel) -> tuple[LoraModule, ...]:
    """The components of the adapter that a loaded model runs with, in the order of their layers.

    Raises `InputError` without an adapter, with a merged one or several at once, and for what is not plain LoRA.
    """
    places = {id(block): number for number, block in enumerate(chat.layers)}
    inside = {id(part): places[id(block)] for block in chat.layers for part in block.modules()}
    return _in_order(
        [
            LoraModule(
                name,
                inside.get(id(layer)),
                layer.lora_A[key].weight.detach().float().cpu(),
                layer.lora_B[key].weight.detach().float().cpu(),
                float(layer.scaling[key]),
            )
            for name, layer in live_modules(chat).items()
            for key in layer.active_adapters
        ]
    )


def live_modules(chat: ChatModel) -> dict[str, LoraLayer]:
    """The PEFT layers of the adapter that a loaded model runs with, by their paths in the base model.

    Raises what `live_components` raises.
    """
    layers = {
        name.removeprefix(_PREFIX): layer for name, layer in chat.model.named_modules() if isinstance(layer, LoraLayer)
    }
    if not layers:
        raise InputError(f"{chat.name}: has no LoRA adapter to read: load one")
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise InputError(f"{chat.name}: {len(active)} adapters are active: activate the one to read")
    (key,) = active
    _require_sum(chat.model.peft_config[key].to_dict(), chat.adapter or chat.name)
    # A layer that only an idle adapter is on adds nothing.
    found = {name: layer for name, layer in layers.items() if key in layer.r}
    for name, layer in found.items():
        _require_plain(name, layer, key)
    return found


def _require_plain(name: str, layer: LoraLayer, key: str) -> None:
    if layer.merged:
        raise InputError(f"{name}: its adapter is merged: load it unmerged to read it")
    plain = key in layer.lora_A and key not in layer.lora_variant
    if not plain or layer.lora_A[key].weight.ndim != 2:
        kind = type(layer.lora_variant.get(key, layer)).__name__
        raise InputError(
            f"{name}: is not a plain LoRA of a linear module ({kind}), so that it has no scalars: train without it"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder}: only a pickled adapter_model.bin, never opened here: save it as safetensors")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch or train the adapter again") from error


def _require_sum(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type")).removeprefix("PeftType.")
    if kind != "LORA":
        raise InputError(f"{name}: is no LoRA but {kind}: it has no A and B to read")
    for setting, reason in _MORE_THAN_A_SUM.items():
        if config.get(setting):
            raise InputError(f"{name}: {setting}: {reason}, so that it is not a sum of components: train a plain LoRA")
    if str(start := config.get("init_lora_weights")).startswith(FROM_BASE):
        raise InputError(
            f"{name}: init_lora_weights: {start} changes the base's own weights, so that its components are not all "
            "that it adds: convert it to a plain LoRA when saving"
        )


def _factors(weights: Mapping[str, Tensor], folder: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A and B by module, and the names of the weights that are neither."""
    factors: dict[str, dict[str, Tensor]] = {}
    saved = []
    for key, tensor in weights.items():
        name = key.removeprefix(_PREFIX)
        if match := _KEY.fullmatch(name):
            factors.setdefault(match["module"], {})[match["side"]] = tensor.float()
        elif "lora_" in name:
            raise InputError(f"{folder}: {name} is no part of a plain LoRA: train one, without variants")
        # PEFT keeps the base's own embedding in the file when a LoRA is on it.
        elif ".base_layer." not in name:
            saved.append(name)
    return factors, saved


def _module(name: str, sides: Mapping[str, Tensor], config: Mapping[str, Any], folder: str) -> LoraModule:
    if sides.keys() != {"A", "B"} or any(side.ndim != 2 for side in sides.values()):
        shapes = {side: list(tensor.shape) for side, tensor in sides.items()}
        raise InputError(f"{folder}: {name} is no pair of matrices A and B ({shapes}): fetch or train it again")
    rank, expected = len(sides["A"]), _setting(config, "rank_pattern", "r", name, folder)
    if not rank == sides["B"].shape[1] == expected:
        raise InputError(
            f"{folder}: {name} has rank {rank} in A and {sides['B'].shape[1]} in B, and {_CONFIG} says {expected:g}: "
            "the files do not belong together"
        )
    if not all(bool(side.isfinite().all()) for side in sides.values()):
        raise InputError(f"{folder}: {name} holds numbers that are not finite: its training diverged")
    alpha = _setting(config, "alpha_pattern", "lora_alpha", name, folder)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, _layer(name), sides["A"], sides["B"], scaling)


def _layer(name: str) -> int | None:
    """The number of the block that a path leads into; other towers have blocks, too."""
    block = _BLOCK.search(f".{name}")
    return int(block[1]) if block and not _OTHER_TOWER.search(name[: block.start()]) else None


def _setting(config: Mapping[str, Any], pattern: str, plain: str, name: str, folder: str) -> float:
    """A module's own value where a pattern matches its name, as PEFT matches them."""
    try:
        patterns = config.get(pattern) or {}
        return float(patterns.get(get_pattern_key(list(patterns), name), config[plain]))
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise InputError(
            f"{folder}: {_CONFIG} gives no usable {plain} or {pattern} ({error!r}): fetch or train the adapter again"
        ) from error


def _in_order(modules: Sequence[LoraModule]) -> tuple[LoraModule, ...]:
    return tuple(sorted(modules, key=lambda one: (-1 if one.layer is None else one.layer, one.module)))


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
    counts = {one.module: min(one.rank, top or one.rank) for one in modules}
    in_layer: Counter[int | None] = Counter()
    for one in modules:
        in_layer[one.layer] += counts[one.module]
    alike = Counter((one.layer, _last(one)) for one in modules)
    named = {}
    for one in modules:
        alone = in_layer[one.layer] == 1
        stem = _stem(one, alone=alone, clear=alike[one.layer, _last(one)] == 1)
        count = counts[one.module]
        named[one.module] = [stem] if count == 1 else [f"{stem}.{number}" for number in range(count)]
    return named


def _stem(one: LoraModule, *, alone: bool, clear: bool) -> str:
    if one.layer is None:
        return one.module
    if alone:
        return f"layer_{one.layer}"
    inside = f".{one.module}".partition(f".{one.layer}.")[2]
    return f"layer_{one.layer}.{_last(one) if clear else inside}"


def _last(one: LoraModule) -> str:
    return one.module.rpartition(".")[2]
