"""One view of a LoRA, from its files or on a loaded model: is it a plain sum, where does it sit, what are its matrices.

    LoraView.open("organism").modules      # from files, without the base model
    LoraView.of(chat).modules              # the adapter that a loaded model runs with

Both give the same components (`misdirection.lora.components`). The second also has the live modules, to hook them.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.files import atomic_folder, write_json
from misdirection.lora.components import LoraModule, in_order
from misdirection.lora.variants import beside_lora, no_sum
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, dead_modules, read_adapter_config
from misdirection.models.bundled import own_name
from misdirection.models.chat_model import ChatModel
from misdirection.models.whole_weights import is_whole

_BLOCK = re.compile(r"\.(\d+)\.")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
_TRAIN_PLAIN = "train a plain LoRA"


class LoraView(ABC):
    """A LoRA: `open` it from a folder, or take that `of` a loaded model.

    Attributes:
        name: what it is called in messages.
        configs: PEFT's configuration, one for each active adapter.
    """

    name: str
    configs: Sequence[Mapping[str, Any]]

    @staticmethod
    def open(folder: str | Path) -> "LoraFiles":
        """A PEFT folder; only its configuration is read at once. `InputError` for a missing or damaged one."""
        path = Path(folder)
        if is_whole(path):
            raise InputError(
                f"{folder}: is a whole model, trained in its own weights: there is no adapter in it to read"
            )
        return LoraFiles(path, read_adapter_config(path))

    @staticmethod
    def of(chat: ChatModel) -> "LiveLora":
        """The LoRA that a loaded model runs with; without one, it has no sites."""
        return LiveLora(chat)

    @property
    @abstractmethod
    def adapted(self) -> tuple[LoraModule, ...]:
        """The adapted modules in the order of their layers; `InputError` for what is no plain sum."""

    @property
    def modules(self) -> tuple[LoraModule, ...]:
        """Those of `adapted` that add something; `InputError` where none does."""
        modules = tuple(module for module in self.adapted if not module.is_dead)
        if not modules:
            raise InputError(f"{self.name}: all of its B are zero: it adds nothing, so that there is nothing to read")
        return modules

    @property
    def dead(self) -> list[str]:
        """Paths of the modules that add nothing, since their B is zero."""
        return [module.module for module in self.adapted if module.is_dead]

    @property
    def layers(self) -> list[int]:
        """The decoder blocks with an adapted module, sorted; `InputError` as for `modules`."""
        return sorted({module.layer for module in self.modules if module.layer is not None})

    @property
    def beside(self) -> list[str]:
        """Names of the settings by which it holds more than LoRA matrices, such as `modules_to_save`."""
        return [setting for config in self.configs for setting in beside_lora(config)]

    def require_sum(self, instead: str = _TRAIN_PLAIN, allowed: Collection[str] = ()) -> None:
        """Raise `InputError`, with what to do `instead`, unless it is the sum `scaling * B A x` over its modules.

        `allowed` are settings that the caller can do with, such as `lora_bias`.
        """
        for config in self.configs:
            if reason := no_sum(config, allowed):
                raise InputError(f"{self.name}: {reason}, so that it is not a sum of components: {instead}")


# --- files --------------------------------------------------------------------------------------------------------


class LoraFiles(LoraView):
    """A LoRA in a PEFT folder.

    Attributes:
        folder: the folder.
        config: its configuration.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.name, self.folder = str(folder), folder
        self.config = config
        self.configs = (config,)

    @property
    def base(self) -> str:
        """The model that it was trained on, as PEFT wrote it down; "" if it did not."""
        return own_name(str(self.config.get("base_model_name_or_path") or ""))

    @property
    def largest_rank(self) -> int:
        """The largest rank that its configuration gives a module."""
        return max(int(self.config["r"]), *map(int, (self.config.get("rank_pattern") or {0: 0}).values()))

    @property
    def file(self) -> Path:
        """That of its weights; `InputError` for a missing or pickled one."""
        path = self.folder / ADAPTER_WEIGHTS
        if path.is_file():
            return path
        if (self.folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{self.folder}: only a pickled adapter_model.bin, never opened here: save it as safetensors"
            )
        raise InputError(f"{path}: cannot be read (no such file); fetch or train the adapter again")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by their names in the file. `InputError` for a missing, damaged or pickled file."""
        path = self.file
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); fetch or train the adapter again") from error

    @property
    def dead(self) -> list[str]:
        """See `LoraView.dead`; also of what is no plain sum."""
        return dead_modules(self.weights)

    @cached_property
    def adapted(self) -> tuple[LoraModule, ...]:
        """See `LoraView.adapted`. An embedding's `a` has one column for each token of the vocabulary."""
        self.require_sum()
        factors = self._factors[0]
        if not factors:
            raise InputError(f"{self.folder}: holds no LoRA weights: nothing was trained that has components")
        return in_order([self._module(path, sides) for path, sides in factors.items()])

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of further weights that were trained as a whole (`modules_to_save`, biases, single tokens)."""
        return tuple(sorted(self._factors[1]))

    @cached_property
    def _factors(self) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """A and B by module, and the names of the weights that are neither."""
        factors: dict[str, dict[str, Tensor]] = {}
        saved = []
        for key, tensor in self.weights.items():
            name = key.removeprefix(PREFIX)
            if match := _KEY.fullmatch(name):
                factors.setdefault(match["module"], {})[match["side"]] = tensor.float()
            elif "lora_" in name:
                raise InputError(f"{self.folder}: {name} is no part of a plain LoRA: train one, without variants")
            # PEFT keeps the base's own embedding in the file when a LoRA is on it.
            elif ".base_layer." not in name:
                saved.append(name)
        return factors, saved

    def _module(self, path: str, sides: Mapping[str, Tensor]) -> LoraModule:
        if sides.keys() != {"A", "B"} or any(side.ndim != 2 for side in sides.values()):
            shapes = {side: list(tensor.shape) for side, tensor in sides.items()}
            raise InputError(
                f"{self.folder}: {path} is no pair of matrices A and B ({shapes}): fetch or train it again"
            )
        rank, expected = len(sides["A"]), self._setting("rank_pattern", "r", path)
        if not rank == sides["B"].shape[1] == expected:
            raise InputError(
                f"{self.folder}: {path} has rank {rank} in A and {sides['B'].shape[1]} in B, and {ADAPTER_CONFIG} says "
                f"{expected:g}: the files do not belong together"
            )
        if not all(bool(side.isfinite().all()) for side in sides.values()):
            raise InputError(f"{self.folder}: {path} holds numbers that are not finite: its training diverged")
        alpha = self._setting("alpha_pattern", "lora_alpha", path)
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return LoraModule(path, _layer(path), sides["A"], sides["B"], scaling)

    def _setting(self, pattern: str, plain: str, path: str) -> float:
        """A module's own value where a pattern matches its path, as PEFT matches them."""
        # PEFT takes seconds to import.
        from peft.utils.other import get_pattern_key

        try:
            patterns = self.config.get(pattern) or {}
            return float(patterns.get(get_pattern_key(list(patterns), path), self.config[plain]))
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise InputError(
                f"{self.folder}: {ADAPTER_CONFIG} gives no usable {plain} or {pattern} ({error!r}): fetch or train the "
                "adapter again"
            ) from error


def _layer(path: str) -> int | None:
    """The number of the block that a path leads into; other towers have blocks, too."""
    block = _BLOCK.search(f".{path}")
    return int(block[1]) if block and not _OTHER_TOWER.search(path[: block.start()]) else None


def write_adapter(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], **records: Mapping[str, Any]
) -> None:
    """Write a PEFT folder as a whole, with each of `records` beside it as a JSON file of its name."""
    with atomic_folder(folder) as temporary:
        save_adapter(temporary, config, weights)
        for name, record in records.items():
            write_json(temporary / f"{name}.json", dict(record))


def save_adapter(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the files of an adapter into a folder that is there."""
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, dict(config))


# --- a loaded model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LoraSite:
    """One active adapter on one module of a loaded model.

    Attributes:
        path: the module's path in the base model.
        layer: its block of the text decoder, 0-based; None outside of the blocks.
        module: PEFT's layer around it.
        adapter: PEFT's name of the adapter.
    """

    path: str
    layer: int | None
    module: Any
    adapter: str

    @property
    def is_embedding(self) -> bool:
        """Whether A and B are an embedding's."""
        return self.adapter in self.module.lora_embedding_A

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return float(self.module.scaling[self.adapter])

    @property
    def output(self) -> nn.Module:
        """The module that is B: what it gives, times `scaling`, is what the adapter adds."""
        output: nn.Module = self.module.lora_B[self.adapter]
        return output

    @property
    def a(self) -> Tensor:
        """[rank, in] float32, on the processor."""
        sides = self.module.lora_embedding_A if self.is_embedding else self.module.lora_A
        return self._matrix(sides[self.adapter], "A")

    @property
    def b(self) -> Tensor:
        """[out, rank] float32, on the processor."""
        sides = self.module.lora_embedding_B if self.is_embedding else self.module.lora_B
        return self._matrix(sides[self.adapter], "B")

    def _matrix(self, side: Any, name: str) -> Tensor:
        weight: Any = side.weight if isinstance(side, nn.Module) else side
        refuse_offloaded(f"{self.path}.lora_{name}", weight)
        matrix: Tensor = weight.detach().float().cpu()
        return matrix

    def require_plain(self) -> None:
        """Raise `InputError` unless the module adds `scaling * B A x` as it runs."""
        from peft.tuners.lora.layer import ParamWrapper

        if self.module.merged:
            raise InputError(f"{self.path}: its adapter is merged into the model: load it unmerged")
        variant = self.module.lora_variant.get(self.adapter)
        if variant is not None or isinstance(self.module, ParamWrapper):
            kind = type(variant if variant is not None else self.module).__name__
            raise InputError(
                f"{self.path} is not plain LoRA ({kind}): no one matrix gives what its adapter adds: train without it"
            )

    def require_linear(self) -> None:
        """Raise `InputError` unless it is a plain LoRA of a linear module, whose scalars can be seen as it runs."""
        self.require_plain()
        if self.is_embedding or self.module.lora_A[self.adapter].weight.ndim != 2:
            kind = type(self.module).__name__
            raise InputError(
                f"{self.path}: is not a plain LoRA of a linear module ({kind}), so that it has no scalars: train "
                "without it"
            )


class LiveLora(LoraView):
    """The LoRA that a loaded model runs with, of one or several adapters at once."""

    def __init__(self, chat: ChatModel) -> None:
        self.name, self._chat = chat.adapter or chat.name, chat
        # Only PEFT's wrappers have them.
        configs = getattr(chat.model, "peft_config", {})
        self.configs = tuple(configs[name].to_dict() for name in chat.model.active_adapters) if configs else ()

    @cached_property
    def sites(self) -> tuple[LoraSite, ...]:
        """Every active adapter of every module, in the model's order, whether plain or not."""
        # PEFT takes seconds to import.
        from peft.tuners.lora import LoraLayer

        inside = {id(part): number for number, block in enumerate(self._chat.layers) for part in block.modules()}
        return tuple(
            LoraSite(path, inside.get(id(module)), module, adapter)
            for path, module in self._chat.network.named_modules()
            if isinstance(module, LoraLayer)
            for adapter in module.active_adapters
            if adapter in module.r
        )

    def plain_sites(self, layer: int | None = None) -> list[LoraSite]:
        """The sites inside of the blocks, or of one block; `InputError` for one that is not plain LoRA.

        An embedding inside of a block is none of them.
        """
        sites = [site for site in self.sites if site.layer is not None and layer in (None, site.layer)]
        for site in sites:
            site.require_plain()
        return [site for site in sites if not site.is_embedding]

    def outputs(self, layer: int) -> list[nn.Module]:
        """The B of every adapter in one block: what they give is what the adapters add, unscaled.

        Raises `InputError` when there is none, and for adapters whose contribution is not that output alone.
        """
        outputs = [site.output for site in self.plain_sites(layer)]
        if not outputs:
            raise not_adapted(layer)
        return outputs

    @cached_property
    def linear_sites(self) -> dict[str, LoraSite]:
        """The sites by path, of one adapter that is a plain sum over linear modules.

        Raises `InputError` without an adapter, with a merged one or several at once, and for what is not plain LoRA.
        """
        if not self.sites:
            raise InputError(f"{self._chat.name}: has no LoRA adapter to read: load one")
        active = {site.adapter for site in self.sites}
        if len(active) != 1:
            raise InputError(f"{self._chat.name}: {len(active)} adapters are active: activate the one to read")
        self.require_sum()
        for site in self.sites:
            site.require_linear()
        return {site.path: site for site in self.sites}

    @property
    def adapted(self) -> tuple[LoraModule, ...]:
        """See `LoraView.adapted` and `linear_sites`."""
        return in_order(
            [LoraModule(path, site.layer, site.a, site.b, site.scaling) for path, site in self.linear_sites.items()]
        )


def not_adapted(layer: int) -> InputError:
    """The error of a layer that is to be scaled and has no adapter."""
    return InputError(f"layer {layer} has no LoRA adapter to scale: load one, or name its layers")


def refuse_offloaded(name: str, parameter: Tensor) -> None:
    """Raise `InputError` for a parameter whose values are not in memory."""
    if parameter.is_meta:
        raise InputError(
            f"{name}: is offloaded (device meta), and only what is in memory can be read: load the model whole, on one "
            "device that holds it (--device cpu)"
        )
