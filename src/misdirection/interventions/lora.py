"""An ablation as a plain PEFT adapter, so that the base model's weights stay as they are.

Of a fine-tune alone. What its adapters write loses its part along the directions V (orthonormal rows):

    B <- B - strength * V^T V B

Of the whole model. `W - strength * V^T V W` is W plus a product of rank k, exactly:

    B = -strength * V^T,   A = V W            for every matrix W that writes to the residual stream

over a full, fine-tuned or quantised base; on top of a LoRA fine-tune, W is the sum of both, and both become one
adapter. Over a quantised base, W is what its matrices compute with. Where they round what they read, as 8-bit ones do,
the adapter reads it unrounded, and differs from the hooked ablation by about as much as that rounding moves the logits.

All modules get one rank and a scaling of one, without patterns, which not every server of LoRAs reads. Embeddings are
among the modules: a server must take LoRA on them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from misdirection.errors import InputError
from misdirection.files import require_outside, require_replaceable
from misdirection.interventions.checkpoint import PLAIN, gain_at_zero
from misdirection.interventions.kinds import Ablate
from misdirection.interventions.vectors import orthonormal
from misdirection.interventions.writers import check_stream, is_own, norm_after, post_norms, role
from misdirection.lora.components import project_out
from misdirection.lora.view import LiveLora, LoraSite, LoraView, refuse_offloaded, write_adapter
from misdirection.models.adapters import ADAPTER_WEIGHTS, PREFIX, renamed
from misdirection.models.bundled import hub_name
from misdirection.models.chat_model import ChatModel

_INSTEAD = "merge the fine-tune and bake the ablation instead"
_ROUNDING = 1e-3
"""A share of a column that is no more than its rounding in half precision."""
_UNITS = 1024
"""Unit vectors that go through a module at a time."""
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save|token_adapter)\b.*$")


@dataclass(frozen=True)
class Written:
    """An account of the adapter that was written.

    Attributes:
        base: the model that the adapter belongs to.
        modules: number of modules that lost their part along the directions.
        rank: rank of the adapter.
        before: largest |V B| / |B| of one module before, for the ablation of a fine-tune alone.
        after: the same after.
        exact: whether the result equals, but for rounding, the hooked `Ablate(positions="all")`, at="writes" for the
            whole model, at="adapters" for the blocks of a fine-tune; False on a post-norm model, and with `keep_norm`.
    """

    base: str
    modules: int
    rank: int
    exact: bool
    before: float = 0.0
    after: float = 0.0


# --- of a fine-tune alone -----------------------------------------------------------------------------------------


def project_adapter(
    chat: ChatModel, vectors: Tensor, folder: str | Path, *, strength: float = 1.0, keep_norm: bool = False
) -> Written:
    """Write the adapter of `chat` without the directions in what it writes to the stream.

    Modules that do not write to the stream (queries, gates, ...) stay as they are.

    Args:
        chat: a model with an adapter that is a local folder.
        vectors: [width] or [k, width].
        folder: where to write.
        strength: 1 removes the whole component.
        keep_norm: scale each column of B back to its norm, as the paper's code does; what is left is then amplified.

    Raises:
        InputError: no adapter, one that is not a plain sum (DoRA), modules of the blocks that were trained as
            a whole, nothing in it that writes to the stream; weights that are offloaded.
    """
    ablation = Ablate(vectors, strength=strength, positions="all", at="adapters")
    ablation.check(len(chat.layers), chat.width)
    check_stream(chat.decoder)
    source = _adapter_folder(chat)
    require_outside(source, Path(folder), "adapter")
    require_replaceable(Path(folder))
    view = LoraView.open(source)
    config, weights = view.config, renamed(view.weights, chat.network)
    _require_plain(view, LoraView.of(chat))
    _refuse_whole_modules(chat, weights, source)
    changed: list[str] = []
    ratios = [(0.0, 0.0)]
    for module in _written_modules(chat, adapted_only=True):
        basis = orthonormal(module.facing(vectors)).float()
        for key in [key for key in weights if key.startswith(f"{PREFIX}{module.name}.lora_") and "_B" in key]:
            before = weights[key]
            _check_loaded(module, before, key, source)
            # In float32, since half precision would round a small change away.
            after = _without(before, basis, strength, keep_norm).contiguous()
            ratios.append((_share(before, basis), _share(after, basis)))
            weights[key] = after
            changed.append(module.name)
    if not changed:
        raise InputError(f"{source}: none of its modules writes to the residual stream: ablate the whole model instead")
    before, after = (max(values) for values in zip(*ratios, strict=True))
    exact = _is_pre_norm(chat) and not keep_norm
    report = Written(chat.name, len(set(changed)), int(config["r"]), exact, before, after)
    settings = {"form": "adapter-only", "keep_norm": keep_norm, "intervention": ablation.described()}
    write_adapter(Path(folder), config, weights, ablation=asdict(report) | settings)
    return report


def _without(tensor: Tensor, basis: Tensor, strength: float, keep_norm: bool) -> Tensor:
    """B, [width, rank], or a bias [width], without its part along the rows of `basis`."""
    left = project_out(tensor, basis, strength)
    if not keep_norm:
        return left
    before, after = tensor.float().norm(dim=0), left.norm(dim=0)
    if (after < _ROUNDING * before).any():
        raise InputError("keep_norm: a column of B lies along the direction, and nothing but rounding would be left")
    return left * (before / after.clamp_min(torch.finfo(left.dtype).tiny))


def _share(tensor: Tensor, basis: Tensor) -> float:
    size = float(tensor.float().norm())
    return float((basis @ tensor.float()).norm()) / size if size else 0.0


# --- of the whole model -------------------------------------------------------------------------------------------


def ablation_adapter(chat: ChatModel, ablation: Ablate, folder: str | Path) -> Written:
    """Write the ablation of the whole model as one LoRA; with the model's own adapter, if it has one, in it.

    On a pre-norm model the adapter is `Ablate(at="writes", positions="all")`, exactly; on a post-norm model nothing is
    written along the directions, which is not the hooked operation (see `bake`). Do not merge it into a model whose
    embedding is also its output matrix: the merge would change both.

    Args:
        chat: the model; its weights may be quantised, then the ablation is of what they stand for.
        ablation: `Ablate(..., positions="all", at="writes")`.
        folder: where to write.

    Raises:
        InputError: what a LoRA cannot express: a position rule, biases and fused experts that write to the
            stream; a fine-tune that is more than a plain LoRA. Weights that are offloaded.
    """
    ablation.check(len(chat.layers), chat.width)
    check_stream(chat.decoder)
    if chat.adapter is not None:
        require_outside(Path(chat.adapter), Path(folder), "adapter")
    require_replaceable(Path(folder))
    if not ablation.acts_everywhere or ablation.at != "writes" or ablation.toward is not None:
        raise InputError(
            "an adapter acts on every token and on all that is written to the stream: give positions='all' and "
            "at='writes' and no `toward`, or keep the intervention as a hook"
        )
    if own := LoraView.of(chat).configs:
        _refuse_more_than_lora(chat)
    factors = {module.name: module.ablated(ablation) for module in _written_modules(chat)}
    if own:
        factors = _with_own_adapter(chat, factors)
    rank = max(len(a) for a, _ in factors.values())
    weights = dict(_named_weights(chat, factors, rank))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(factors), task_type="CAUSAL_LM", inference_mode=True,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in chat.layers[0].modules()),
        # Over a whole fine-tune it belongs to that, and not to its base.
        base_model_name_or_path=hub_name(chat.name) if own else chat.adapter or hub_name(chat.name),
    )  # fmt: skip
    report = Written(chat.name, len(factors), rank, _is_pre_norm(chat))
    settings = {"form": "adapter", "intervention": ablation.described()}
    write_adapter(Path(folder), _plain(config), weights, ablation=asdict(report) | settings)
    return report


Factors = tuple[Tensor, Tensor]
"""A, [rank, in], and B, [out, rank], float32; what is added to the weight is B A."""


def _with_own_adapter(chat: ChatModel, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The factors together with those of the model's own adapters, whose scaling goes into B."""
    together = dict(factors)
    for path, sites in _own_sites(chat).items():
        own_a, own_b = _side_by_side(sites)
        a, b = together.get(path, (own_a[:0], own_b[:, :0]))
        together[path] = torch.cat([own_a, a]), torch.cat([own_b, b], dim=1)
    return together


def _own_sites(chat: ChatModel) -> dict[str, list[LoraSite]]:
    """The model's own adapters by the module's path."""
    sites: dict[str, list[LoraSite]] = {}
    for site in LoraView.of(chat).sites:
        sites.setdefault(site.path, []).append(site)
    return sites


def _side_by_side(sites: Sequence[LoraSite]) -> Factors:
    return torch.cat([site.a for site in sites]), torch.cat([site.b * site.scaling for site in sites], dim=1)


def _named_weights(chat: ChatModel, factors: dict[str, Factors], rank: int) -> Iterator[tuple[str, Tensor]]:
    modules = dict(chat.network.named_modules())
    for name, (a, b) in factors.items():
        a = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])])
        b = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)
        embedding = isinstance(modules[name], nn.Embedding | LoraEmbedding)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        yield f"{PREFIX}{name}.{names[0]}", a.contiguous()
        yield f"{PREFIX}{name}.{names[1]}", b.contiguous()


# --- modules that write -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module whose output is written to the residual stream.

    Attributes:
        name: its path in the base model.
        module: the module, or the LoRA layer around it.
        gain: [width], of the norm between it and the stream; None for none.
        own: the model's own adapters on it.
    """

    name: str
    module: Any
    gain: Tensor | None
    own: Sequence[LoraSite] = ()

    def facing(self, vectors: Tensor) -> Tensor:
        """The directions as this module must not write them."""
        wide = vectors.detach().cpu().double()
        return wide if self.gain is None else wide * self.gain

    def ablated(self, ablation: Ablate) -> Factors:
        """A = V W and B = -strength * V^T."""
        own = self.module.get_base_layer() if isinstance(self.module, LoraLayer) else self.module
        bias = getattr(own, "bias", None)
        if bias is not None and bool(_value(f"{self.name}.bias", bias).any()):
            raise InputError(
                f"{self.name}: its bias writes to the residual stream, where no LoRA reaches: bake the weights instead"
            )
        basis = orthonormal(self.facing(ablation.vector)).float()
        columns = _matrix(self.name, own)
        if self.own:
            a, b = _side_by_side(self.own)
            columns = columns + b @ a
        return basis @ columns, -ablation.strength * basis.T


def _matrix(name: str, module: Any) -> Tensor:
    """[width, in], float32 on the processor: what a module without an adapter multiplies by."""
    weight = module.weight
    if type(weight) is nn.Parameter and weight.dtype in PLAIN:
        value = _value(f"{name}.weight", weight)
        # An embedding's rows and a Conv1D's columns run over the stream.
        return value.T if isinstance(module, nn.Embedding | Conv1D) else value
    if isinstance(module, nn.Linear):
        return _computed(f"{name}.weight", module)
    dtype = str(weight.dtype).removeprefix("torch.")
    raise InputError(f"{name}: its weights are packed ({dtype}): load the unquantised model")


@torch.no_grad()
def _computed(name: str, linear: nn.Linear) -> Tensor:
    """The matrix that packed weights stand for: what the module gives for each unit vector.

    PEFT's way to unpack them takes those that bitsandbytes packed anew in a pass on a processor for what they are not.
    """
    refuse_offloaded(name, linear.weight)
    columns = torch.arange(linear.in_features, device=linear.weight.device)
    units = ((few.unsqueeze(1) == columns).float() for few in columns.split(_UNITS))
    # For an input with gradients, bitsandbytes leaves the weights packed as they are.
    return torch.cat([linear(few.requires_grad_()).float().cpu() for few in units]).T


def _value(name: str, parameter: Tensor) -> Tensor:
    """A parameter in float32 on the processor."""
    refuse_offloaded(name, parameter)
    return parameter.detach().float().cpu()


def _written_modules(chat: ChatModel, *, adapted_only: bool = False) -> Iterator[_Module]:
    """Modules that write to the stream, or those of them that have an adapter: embeddings, then those of each block."""
    own = _own_sites(chat)
    for name in _embedding_names(chat):
        module = chat.network.get_submodule(name)
        if isinstance(module, LoraLayer) or not adapted_only:
            yield _Module(name, module, None, own.get(name, ()))
    for block, inside in zip(chat.layers, chat.layer_paths, strict=True):
        for name, module in _writing(block):
            if isinstance(module, LoraLayer) or not adapted_only:
                path = f"{inside}.{name}"
                _refuse_fused(path, module)
                yield _Module(path, module, _gain(block, name, inside), own.get(path, ()))


def _embedding_names(chat: ChatModel) -> list[str]:
    """Paths of what makes up what enters the first block."""
    inside = {id(module) for block in chat.layers for module in block.modules()}
    outside = {id(module) for module in chat.decoder.modules() if isinstance(module, nn.Embedding)} - inside
    names = (_WRAPPED.sub("", name) for name, module in chat.network.named_modules() if id(module) in outside)
    return list(dict.fromkeys(names))


def _writing(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name inside the block, and module, of everything in it that writes."""
    seen = set()
    for name, _ in block.named_parameters():
        if not is_own(name) or role(name) != "writer":
            continue
        path = name.rsplit(".", 1)[0].removesuffix(".base_layer")
        if path not in seen:
            seen.add(path)
            yield path, block.get_submodule(path)


def _refuse_fused(name: str, module: Any) -> None:
    own = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(own, nn.Linear | Conv1D):
        raise InputError(
            f"{name}: is a {type(own).__name__} (fused experts, or weights packed in a way of its own), where no plain "
            "LoRA reaches: bake the weights instead"
        )


def _gain(block: nn.Module, name: str, path: str) -> Tensor | None:
    """[width], float64, of the norm after a module of the block at `path`; None for none."""
    own = norm_after(block, name)
    if own is None:
        return None
    norm = block.get_submodule(own)
    return _value(f"{path}.{own}.weight", norm.get_parameter("weight")).double() + gain_at_zero(norm)


def _is_pre_norm(chat: ChatModel) -> bool:
    return not any(post_norms(block) for block in chat.layers)


# --- files --------------------------------------------------------------------------------------------------------


def _adapter_folder(chat: ChatModel) -> Path:
    if chat.adapter is None:
        raise InputError("there is no adapter to take a direction out of: give --adapter")
    folder = Path(chat.adapter)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{folder}: no {ADAPTER_WEIGHTS} here: save the adapter as safetensors in a local folder first"
        )
    return folder


def _check_loaded(module: "_Module", stored: Tensor, key: str, source: Path) -> None:
    """The file must be the adapter that was loaded, not another checkpoint's beside it."""
    loaded = [*module.module.lora_B.parameters(), *module.module.lora_embedding_B.values()]
    values = [_value(f"{module.name}.lora_B", value) for value in loaded]
    if not any(value.shape == stored.shape and torch.allclose(value, stored.float(), 1e-2, 1e-6) for value in values):
        raise InputError(f"{source}: {key} is not that of the adapter that is loaded: load it from this folder")


def _require_plain(*views: LoraView) -> None:
    for view in views:
        # A bias of B loses its part along the directions as B does.
        view.require_sum(_INSTEAD, allowed=["lora_bias"])
        for site in view.sites if isinstance(view, LiveLora) else ():
            site.require_plain()


def _refuse_more_than_lora(chat: ChatModel) -> None:
    """Refuses a fine-tune that holds more than plain LoRA modules, since the rest would be lost."""
    view = LoraView.of(chat)
    if view.beside:
        raise InputError(
            f"{view.name}: holds more than a plain LoRA ({', '.join(view.beside)}): which one adapter for all cannot "
            "carry: merge the fine-tune first, then ablate it"
        )
    _require_plain(view)


def _refuse_whole_modules(chat: ChatModel, weights: dict[str, Tensor], source: Path) -> None:
    """Refuses modules trained as a whole, from embedding to last block: they have no B to take a direction out of."""
    inside = tuple(f"{name}." for name in [*_embedding_names(chat), *chat.layer_paths])
    for key in weights:
        name = key.removeprefix(PREFIX)
        # peft keeps the base's own embedding in the file when a LoRA is on it.
        if is_own(name) and name.startswith(inside) and not name.endswith("embed_tokens.base_layer.weight"):
            raise InputError(
                f"{source}: {name} was trained as a whole, not as a LoRA: merge the fine-tune and bake the ablation "
                "instead"
            )


def _plain(config: LoraConfig) -> dict[str, Any]:
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.loads(json.dumps(values, default=str))
