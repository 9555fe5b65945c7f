"""Write a repaired adapter: the candidate's products taken into its weights, a plain PEFT adapter as before."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from misdirection.errors import MisdirectionError
from misdirection.files import read_json, write_json
from misdirection.interventions.kinds import Ablate, orthonormal
from misdirection.interventions.lora import ablation_adapter
from misdirection.interventions.writers import role
from misdirection.models import ChatModel, attach
from misdirection.repair.candidates import Candidate, Material, basis, factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_adapter(base: ChatModel, source: Path, one: Candidate, material: Material, folder: Path) -> None:
    """Write the adapter of `source`, changed by a candidate, into an empty `folder`.

    Args:
        base: the base model without an adapter; used where the whole model is ablated.
        source: the adapter's folder; nothing is written there.
    """
    if not (source / WEIGHTS).is_file():
        raise MisdirectionError(f"{source}: no {WEIGHTS} here: save the adapter as safetensors first")
    weights = load_file(source / WEIGHTS)
    for module, factor in factors(one, material).items():
        key = f"{_PREFIX}{module}.lora_B.weight"
        weights[key] = (weights[key].float() * factor).to(weights[key].dtype)
    vectors = basis(one, material)
    if vectors is not None and one.projection == "adapters":
        rows = orthonormal(vectors).float()
        for key in material.margin:
            name = f"{_PREFIX}{key}.lora_B.weight"
            if role(f"{key}.weight") == "writer":
                wide = weights[name].float()
                weights[name] = (wide - one.strength * rows.T @ (rows @ wide)).to(weights[name].dtype)
    write_json(folder / CONFIG, read_json(source / CONFIG))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    if vectors is not None and one.projection == "writes":
        _ablate_all(base, folder, Ablate(vectors, strength=one.strength, positions="all", at="writes"))


def _ablate_all(base: ChatModel, folder: Path, ablation: Ablate) -> None:
    """Put the ablation of the whole model into the adapter of `folder`."""
    chat = attach(base, folder)
    ablated = folder / "ablated"
    try:
        with torch.no_grad():
            ablation_adapter(chat, ablation, ablated)
    finally:
        chat.model.unload()
    for file in ablated.iterdir():
        file.replace(folder / file.name)
    ablated.rmdir()


def bake_weights(base: ChatModel, folder: Path) -> None:
    """Turn the adapter in `folder` into a whole model there."""
    chat = attach(base, folder)
    merged = chat.model.merge_and_unload()
    for file in (CONFIG, WEIGHTS):
        (folder / file).unlink()
    merged.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
