"""The kinds of PEFT adapters by what they ask of whoever runs the base model: said from their configuration alone.

This package runs a model in parts: the decoder without its head, a prompt before its answers, rows beside others. That
gives PEFT's own figures for an adapter that acts inside of the base's modules on each token alone, and for no other.
"""

from collections.abc import Mapping
from typing import Any

STARTS_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's `init_lora_weights` that change the base's own weights."""

_LOST = "changed the base's own weights as it began, by what no file of it holds"
_UNMEASURED_STARTS = {
    "corda": _LOST,
    "lora_ga": _LOST,
    "loftq": "quantises the base's own weights anew each time that PEFT loads it, on a GPU only",
}

_VIRTUAL = "PEFT's own forward pass adds its virtual tokens"
_UNMEASURED = {
    "PROMPT_TUNING": _VIRTUAL,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "PREFIX_TUNING": _VIRTUAL,
    "CARTRIDGE": _VIRTUAL,
    "CPT": _VIRTUAL,
    "POLY": "each row needs the number of its task",
    "LILY": "it mixes its experts by the mean over all tokens that pass at once",
    "SHADOW": "it runs a second model beside the base",
    "XLORA": "a pass of its own chooses how it mixes its adapters",
}
_UNMEASURED_SETTINGS = {
    "alora_invocation_tokens": "an activated LoRA acts after its invocation tokens only, which PEFT's own forward pass "
    "looks for",
    "arrow_config": "Arrow routes each token among several adapters",
    "layer_replication": "it repeats the base's layers, which stay when it is switched off",
}


def peft_type(config: Mapping[str, Any]) -> str:
    """The kind of an adapter, such as `LORA`, from its configuration as a mapping."""
    return str(config.get("peft_type")).removeprefix("PeftType.")


def unmeasured(config: Mapping[str, Any]) -> str | None:
    """The kind of an adapter and why its figures cannot be had here; None for one whose figures can."""
    kind = peft_type(config)
    if kind in _UNMEASURED:
        return f"an adapter of type {kind}: {_UNMEASURED[kind]}"
    for setting, reason in _UNMEASURED_SETTINGS.items():
        if config.get(setting):
            return f"{setting}: {reason}"
    start = str(config.get("init_lora_weights"))
    for name, reason in _UNMEASURED_STARTS.items():
        if start.startswith(name):
            return f"init_lora_weights: {start} {reason}"
    return None


def base_changes(config: Mapping[str, Any]) -> str | None:
    """The setting by which an adapter changes the base's own weights, with its value; None where it leaves them."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(STARTS_FROM_BASE):
        return f"init_lora_weights: {start}"
    if (bias := config.get("bias")) not in (None, "none"):
        return f"bias: {bias}"
    return next((name for name in ("kasa_config", "layer_replication") if config.get(name)), None)
