"""Write a repaired adapter: the candidate's products taken into its weights, a plain PEFT adapter as before."""

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from misdirection.interventions.adapter_weights import changed_weights
from misdirection.interventions.lora import ablation_adapter
from misdirection.interventions.rounding import Divergences, Rounding, is_probed, probe, probe_ids
from misdirection.lora.view import LoraView, save_adapter
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, attach
from misdirection.models.chat_model import ChatModel
from misdirection.repairing.candidates import Candidate, Material


def write_adapter(tuned: ChatModel, source: Path, candidate: Candidate, material: Material, folder: Path) -> None:
    """Write the adapter of `source`, which `tuned` runs with, changed by a candidate, into an empty `folder`.

    A candidate's ablation of the whole model is left to `ablate_all`, which needs the base without an adapter.
    """
    adapter = LoraView.open(source)
    changes = [change for change in candidate.interventions(material) if change.on_adapters]
    # What changes stays in float32: half precision would round a small change away.
    save_adapter(folder, adapter.config, changed_weights(adapter.weights, tuned, changes))


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


def bake_weights(base: ChatModel, folder: Path) -> Rounding:
    """Turn the adapter in `folder` into a whole model there, in the base's dtype; gives what rounding lost of it.

    Raises `InputError` where that is too much.
    """
    dtype, divergences = base.dtype, None
    probed = is_probed(base.network)
    if probed:
        base.network.float()
    chat = attach(base, folder)
    if probed:
        ids = probe_ids(chat.tokenizer)
        with chat.as_base():
            unchanged = probe(chat.model, ids)
        exact = probe(chat.model, ids)
    rounding = _merge(chat, dtype)
    if probed:
        divergences = Divergences.between(exact, probe(chat.model, ids), unchanged)
    rounding.require_small("--bake", "repair without --bake, or with --dtype float32", divergences)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (folder / file).unlink()
    chat.model.merge_and_unload().to(dtype).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return rounding


def _merge(chat: ChatModel, dtype: torch.dtype) -> Rounding:
    """Put the adapter into each module's weight, rounded to `dtype` once; tells what that loses."""
    rounding = Rounding()
    for path, module in chat.network.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight: Any = module.get_base_layer().weight
            before = weight.data
            # A copy of its own, since PEFT adds in place, and rounds before it adds.
            weight.data = before.float().clone()
            module.merge()
            merged = weight.data
            weight.data = merged.to(dtype).to(before.dtype)
            rounding.add(path, before, merged, weight.data)
    return rounding
