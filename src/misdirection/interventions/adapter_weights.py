"""Interventions on what adapters add, as changes of their weights.

Scaling what an adapter adds, or taking a direction out of it, is the same as changing its B matrices:

    ScaleAdapters      B <- factor * B
    ProjectAdapters    B <- B - strength * V^T V B       V of each module's own
    Ablate, adapters   B <- B - strength * V^T V B       where the module writes to the residual stream
"""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.kinds import Ablate, Intervention, ProjectAdapters, ScaleAdapters, orthonormal
from misdirection.interventions.writers import post_norms, role
from misdirection.models.chat_model import ChatModel

_PREFIX = "base_model.model."

OnAdapters = ScaleAdapters | ProjectAdapters | Ablate


def on_adapters(one: Intervention) -> TypeGuard[OnAdapters]:
    """Whether an intervention changes what adapters add, and nothing else."""
    return isinstance(one, ScaleAdapters | ProjectAdapters) or (isinstance(one, Ablate) and one.at == "adapters")


def changed_weights(weights: Mapping[str, Tensor], chat: ChatModel, changes: Sequence[OnAdapters]) -> dict[str, Tensor]:
    """All weights of an adapter's file as the interventions leave them; those that they change are in float32.

    Args:
        weights: by their names in the file.
        chat: the base model, whose weights are not needed, or the model with the adapter.
        changes: in the order in which they act, all of them on every token.

    Raises:
        InputError: a layer or module without an adapter, nothing that writes to the stream.
    """
    changed = dict(weights)
    for one in changes:
        changed |= _changed(one, changed, chat)
    return changed


def _changed(one: OnAdapters, weights: Mapping[str, Tensor], chat: ChatModel) -> dict[str, Tensor]:
    modules = _modules(weights)
    if isinstance(one, ScaleAdapters):
        return _scaled(one, weights, modules, chat)
    if isinstance(one, ProjectAdapters):
        if strange := [name for name in one.bases if name not in modules]:
            raise InputError(f"ProjectAdapters: {strange[0]} has no LoRA adapter inside of the decoder blocks")
        return {modules[name]: _without(weights[modules[name]], one, basis) for name, basis in one.bases.items()}
    return _ablated(one, weights, modules, chat)


def _modules(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The key of B by the path of its module in the base model."""
    ending = ".lora_B.weight"
    return {key.removeprefix(_PREFIX).removesuffix(ending): key for key in weights if key.endswith(ending)}


def _scaled(
    one: ScaleAdapters, weights: Mapping[str, Tensor], modules: Mapping[str, str], chat: ChatModel
) -> dict[str, Tensor]:
    paths = {id(module): name.removeprefix(_PREFIX) for name, module in chat.model.named_modules()}
    found: dict[str, Tensor] = {}
    for layer, factor in one.factors.items():
        inside = f"{paths[id(chat.layers[layer])]}."
        keys = [key for path, key in modules.items() if path.startswith(inside)]
        if not keys:
            raise InputError(f"ScaleAdapters: layer {layer} has no LoRA adapter to scale: load one, or name its layers")
        found |= {key: _wide(weights[key]) * factor for key in keys}
    return found


def _ablated(
    one: Ablate, weights: Mapping[str, Tensor], modules: Mapping[str, str], chat: ChatModel
) -> dict[str, Tensor]:
    if any(post_norms(block) for block in chat.layers):
        raise InputError("Ablate: at='adapters': norms stand between this model's matrices and its stream")
    writing = [key for path, key in modules.items() if role(f"{path}.weight") == "writer"]
    if not writing:
        raise InputError("Ablate: at='adapters': no adapter of this model writes to the residual stream")
    return {key: _without(weights[key], one, orthonormal(one.vector)) for key in writing}


def _without(b: Tensor, one: ProjectAdapters | Ablate, basis: Tensor) -> Tensor:
    rows = basis.detach().cpu().float()
    return _wide(b) - one.strength * rows.T @ (rows @ _wide(b))


def _wide(tensor: Tensor) -> Tensor:
    """In float32, so that a factor is not rounded twice."""
    return tensor.to(torch.float32)
