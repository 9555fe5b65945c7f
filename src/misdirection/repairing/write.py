"""Write a repaired adapter: the candidate's products taken into its weights, a plain PEFT adapter as before."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from misdirection.errors import InputError
from misdirection.files import read_json, write_json
from misdirection.interventions.adapter_weights import changed_weights
from misdirection.interventions.lora import ablation_adapter
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, attach
from misdirection.models.chat_model import ChatModel
from misdirection.repairing.candidates import Candidate, Material


def write_adapter(tuned: ChatModel, source: Path, candidate: Candidate, material: Material, folder: Path) -> None:
    """Write the adapter of `source`, which `tuned` runs with, changed by a candidate, into an empty `folder`.

    A candidate's ablation of the whole model is left to `ablate_all`, which needs the base without an adapter.
    """
    if not (source / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{source}: no {ADAPTER_WEIGHTS} here: save the adapter as safetensors first")
    weights = load_file(source / ADAPTER_WEIGHTS)
    changes = [change for change in candidate.interventions(material) if change.on_adapters]
    for key, value in changed_weights(weights, tuned, changes).items():
        weights[key] = value.to(weights[key].dtype)
    write_json(folder / ADAPTER_CONFIG, read_json(source / ADAPTER_CONFIG))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )


def ablate_all(base: ChatModel, folder: Path, candidate: Candidate, material: Material) -> None:
    """Put the candidate's ablation of the whole model, if it has one, into the adapter in `folder`."""
    ablation = candidate.ablation(material)
    if ablation is None or ablation.at != "writes":
        return
    chat = attach(base, folder)
    ablated = folder / "ablated"
    try:
        with torch.no_grad():
            ablation_adapter(chat, ablation, ablated)
    finally:
        chat.without_adapter()
    for file in ablated.iterdir():
        file.replace(folder / file.name)
    ablated.rmdir()


def bake_weights(base: ChatModel, folder: Path) -> None:
    """Turn the adapter in `folder` into a whole model there."""
    chat = attach(base, folder)
    merged = chat.model.merge_and_unload()
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (folder / file).unlink()
    merged.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
