"""A checkpoint on disk, tensor by tensor, with the part that each tensor plays: weights are never loaded as a whole."""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from misdirection.errors import InputError
from misdirection.files import read_json
from misdirection.interventions.writers import norm_after, post_norms, role
from misdirection.models.bundled import BUNDLED_MODELS, bundled_folder
from misdirection.models.layers import decoder_layers, text_config, text_decoder
from misdirection.models.libraries import errors_in_one_line
from misdirection.models.names import is_local
from misdirection.models.weightless import network_of, read_config

Part = Literal["writer", "reader", "norm", "embedding", "head", "other"]
"""`other`: of another modality, or of what transformers does not load, such as layers that draft further tokens."""

_OTHER = re.compile(r"(^|[._])(vision|visual|audio)(_|\.|$)")
_QUANTISED = "quantization_config"
INDEX = "model.safetensors.index.json"
PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""The dtypes of weights when they are numbers and not packed."""
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model's files and its structure, without its weights.

    Attributes:
        name: as the user named it.
        folder: where the files are.
        network: the same model on the meta device.
    """

    name: str
    folder: Path
    network: Any

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> "Checkpoint":
        """The checkpoint of a bundled model, of a folder or of a Hugging Face id.

        Raises `InputError` when it is not there, has no safetensors files, or is quantised.
        """
        folder = bundled_folder(name) if name in BUNDLED_MODELS else _folder(name, revision)
        if not any((folder / file).is_file() for file in (INDEX, _SINGLE)):
            raise InputError(f"{name}: no {_SINGLE} in {folder}: load it and save it again with safetensors")
        config = read_config(name, folder)
        if any(getattr(part, _QUANTISED, None) for part in (config, config.get_text_config())):
            raise InputError(
                f"{name}: its weights are quantised, so that no matrix can be changed in place: bake the unquantised "
                "model and quantise the result, or write an adapter (--form adapter) over the quantised one"
            )
        return cls(name, folder, network_of(name, config))

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return int(text_config(self.network).hidden_size)

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """Names of tensors by file."""
        if (self.folder / INDEX).is_file():
            shards: dict[str, list[str]] = {}
            for tensor, file in read_json(self.folder / INDEX)["weight_map"].items():
                shards.setdefault(file, []).append(tensor)
            return shards
        with self._reading(_SINGLE) as file:
            return {_SINGLE: list(file.keys())}

    def tensors(self, shard: str) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor of one file, one at a time."""
        with self._reading(shard) as file:
            for name in self.shards[shard]:
                yield name, file.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        shard = next((file for file, names in self.shards.items() if name in names), None)
        if shard is None:
            raise InputError(f"{self.name}: there is no {name} in its files: use the hooked ablation instead")
        with self._reading(shard) as file:
            return file.get_tensor(name)

    def metadata(self, shard: str) -> dict[str, str]:
        """The metadata of a file."""
        with self._reading(shard) as file:
            return file.metadata() or {"format": "pt"}

    def _reading(self, shard: str) -> Any:
        try:
            return safe_open(self.folder / shard, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder / shard}: cannot be read ({error}); fetch it again") from error

    # --- structure ------------------------------------------------------------------------------------------------

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding is also the output matrix; configurations of several parts say it in several places."""
        return bool(self.head.weight is self.network.get_input_embeddings().weight)

    @cached_property
    def head(self) -> Any:
        """The output matrix, of the model itself or of the language model in it."""
        parts = [part for part in self.network.modules() if hasattr(part, "get_output_embeddings")]
        heads = [head for part in parts if (head := part.get_output_embeddings()) is not None]
        if not heads:
            raise InputError(f"{self.name}: a {type(self.network).__name__} has no output matrix of its own")
        return heads[0]

    @cached_property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return {name for members in self.shards.values() for name in members}

    @cached_property
    def input_name(self) -> str:
        """The name of the token embedding, the one that may be tied."""
        own = self.network.get_input_embeddings()
        last = next(path for path, module in self.network.named_modules() if module is own).split(".")[-1]
        for name in sorted(self.names):
            if name.split(".")[-2:-1] == [last] and self.part(name) == "embedding":
                return name
        raise InputError(f"{self.name}: there is no token embedding ({last}) in its files: load it and save it again")

    @cached_property
    def stores_head(self) -> bool:
        """Whether the output matrix is a tensor of its own; many tied models store one tensor for both."""
        return any(map(self.is_head, self.names))

    @cached_property
    def head_name(self) -> str:
        """The name of the output matrix."""
        return next(f"{name}.weight" for name, module in self.network.named_modules() if module is self.head)

    def is_head(self, name: str) -> bool:
        """Whether a tensor is of the output matrix, which some files call by an older name."""
        return name.split(".")[-2:-1] in ([self.head_name.split(".")[-2]], ["embed_out"])

    @cached_property
    def embeddings(self) -> set[str]:
        """Names of the modules, outside of the blocks, that make up what enters the first block."""
        decoder = text_decoder(self.network)
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return {
            name.rsplit(".", 1)[-1]
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Embedding) and id(module) not in inside
        }

    @cached_property
    def _block(self) -> re.Pattern[str]:
        path = next(name for name, module in self.network.named_modules() if module is self.blocks[0])
        return re.compile(rf"(?:^|\.){re.escape(path.split('.')[-2])}\.(\d+)\.(.+)$")

    @property
    def _unloaded(self) -> Iterable[str]:
        return self.network._keys_to_ignore_on_load_unexpected or ()

    @cached_property
    def _outside(self) -> set[str]:
        """Names of the parameters that belong neither to the text decoder nor to the output matrix."""
        parts = text_decoder(self.network), self.head
        inside = {id(parameter) for part in parts for parameter in part.parameters()}
        return {_plain(name) for name, parameter in self.network.named_parameters() if id(parameter) not in inside}

    @cached_property
    def _names(self) -> set[str]:
        """The own names of the text decoder's modules and parameters."""
        decoder = text_decoder(self.network)
        return {
            name.rpartition(".")[2]
            for members in (decoder.named_modules(), decoder.named_parameters())
            for name, _ in members
        }

    def _is_outside(self, name: str) -> bool:
        return bool(_OTHER.search(name)) or _plain(name) in self._outside

    def block_of(self, name: str) -> tuple[int, str] | None:
        """Block number and name inside the block, or None outside of the text blocks."""
        match = None if self._is_outside(name) else self._block.search(name)
        return (int(match[1]), match[2]) if match else None

    def part(self, name: str) -> Part:
        """The part that a tensor plays; `InputError` when that is not known."""
        if name.endswith("mm_input_projection_weight"):
            return "embedding"
        if self._is_outside(name) or any(re.search(pattern, name) for pattern in self._unloaded):
            return "other"
        if block := self.block_of(name):
            return role(block[1]) if block[0] < len(self.blocks) else "other"
        if self.is_head(name):
            return "head"
        own = name.split(".")[-2] if "." in name and name.endswith(("weight", "bias")) else name.split(".")[-1]
        if own in self.embeddings:
            return "embedding"
        if self._outside and own not in self._names:
            return "other"
        return role(name)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, on the meta device."""
        return decoder_layers(self.network)

    @cached_property
    def post_norm(self) -> bool:
        """Whether a norm with a gain stands between the matrices of some block and the stream."""
        return any(post_norms(block) for block in self.blocks)

    def output_axis(self, name: str, tensor: Tensor) -> int:
        """The axis of a writing tensor that runs over the residual stream."""
        block = self.block_of(name)
        if block is None or tensor.ndim == 1:
            return tensor.ndim - 1
        modules = dict(self.blocks[block[0]].named_modules())
        if tensor.ndim == 3:
            said = {bool(part.is_transposed) for part in modules.values() if hasattr(part, "is_transposed")}
            return self._experts_axis(name, tensor, said)
        of_experts = block[1].endswith("_bias")
        return 1 if of_experts or isinstance(modules.get(block[1].rsplit(".", 1)[0]), Conv1D) else 0

    def _experts_axis(self, name: str, tensor: Tensor, transposed: set[bool]) -> int:
        """Of fused experts, [expert, out, in] or transposed: told by the sizes, or else by the module's own word."""
        axes = [axis for axis in (1, 2) if tensor.shape[axis] == self.width]
        if len(axes) == 2 and len(transposed) == 1:
            return 2 if transposed.pop() else 1
        if len(axes) == 1:
            return axes[0]
        raise InputError(
            f"{self.name}: {name} has shape {list(tensor.shape)}, which does not tell which axis writes to the "
            f"residual stream of width {self.width}: use the hooked ablation instead"
        )

    def gain(self, name: str) -> Tensor | None:
        """The gain, [width] float64, of the norm between a writing tensor and the stream; None where there is none."""
        block = self.block_of(name)
        norm = block and norm_after(self.blocks[block[0]], block[1])
        if not block or not norm:
            return None
        weight = self.tensor(f"{name[: -len(block[1])]}{norm}.weight").double()
        return weight + gain_at_zero(getattr(self.blocks[block[0]], norm))


def _plain(name: str) -> str:
    """A parameter's name without the names of what surrounds it, of which files leave out some."""
    return re.sub(r"^(model\.)+", "", name)


def gain_at_zero(norm: nn.Module) -> float:
    """The factor of a norm when its weight is zero: Gemma's norms multiply by one plus the weight."""
    real = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for weight in real.parameters():
            weight.zero_()
        return float(real(torch.ones(1, next(real.parameters()).shape[0])).mean().round())


def _folder(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_local(name):
        raise InputError(f"{name}: no such folder; give a model's folder or a Hugging Face id")
    with errors_in_one_line(name, "the model"):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.gguf", "*.pth", "*.h5"]))
