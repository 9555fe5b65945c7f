"""Settings that make a LoRA more than the sum `scaling * B A x` over its modules, read from its configuration."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from misdirection.models.adapter_kinds import STARTS_FROM_BASE, peft_type

_REASONS = {
    "use_dora": "DoRA rescales the whole weight",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "an activated LoRA acts after its invocation tokens only",
    "target_parameters": "it adapts fused parameters, not modules",
    "lora_bias": "its B has a bias",
}
_BESIDE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias")


@cache
def _no_sums() -> dict[str, str]:
    """Reasons by setting; PEFT marks the settings of its variants, so that a new one is known, too."""
    # PEFT takes seconds to import.
    from peft import LoraConfig

    marked = (field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant"))
    return {**dict.fromkeys(marked, "it is a variant of LoRA"), **_REASONS}


def no_sum(config: Mapping[str, Any], allowed: Collection[str] = ()) -> str | None:
    """The reason why what an adapter adds is not the sum of its modules' A and B; None where it is.

    `allowed` are settings that the caller can do with.
    """
    kind = peft_type(config)
    if kind != "LORA":
        return f"is no LoRA but {kind}"
    for setting, reason in _no_sums().items():
        if config.get(setting) and setting not in allowed:
            return f"{setting}: {reason}"
    start = str(config.get("init_lora_weights"))
    if start.startswith(STARTS_FROM_BASE):
        return f"init_lora_weights: {start} changes the base's own weights"
    return None


def beside_lora(config: Mapping[str, Any]) -> list[str]:
    """Names of the settings by which an adapter holds more than the matrices of a LoRA."""
    trained = [name for name in _BESIDE if config.get(name)]
    return trained + ["bias"] * (config.get("bias") not in (None, "none"))
