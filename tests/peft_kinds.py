"""Every kind of adapter that PEFT can make, small: what the tests attach, and what the docs' table is written from."""

import re
from dataclasses import fields

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tiny import make_tokenizer

TARGETS = ["q_proj", "down_proj"]
OPENING = make_tokenizer()("assistant")["input_ids"]
"""The invocation tokens of an activated LoRA."""

LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "random start": {"init_lora_weights": False},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "several target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.[13]\..*(q|down)_proj"},
    "trainable tokens": {"trainable_token_indices": [40, 41, 42]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "norms saved": {"modules_to_save": ["input_layernorm"], "bias": "all"},
    "excluded": {"exclude_modules": ["q_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "one layer": {"layers_to_transform": [1]},
    "qalora": {"use_qalora": True, "qalora_group_size": 8},
    "kasa": {"kasa_config": KasaConfig()},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "bdlora": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    },
    "monteclora": {"monteclora_config": MontecloraConfig()},
}
"""LoRA's variants that are measured."""

UNMADE = {
    "arrow_config": {"arrow_config": ArrowConfig()},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
}
"""Variants that take more than a configuration to make: they are refused from that alone."""

LORA_REFUSED = {
    "alora": {"alora_invocation_tokens": OPENING},
    "layer_replication": {"layer_replication": [(0, 3), (1, 4)]},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}

SETTINGS = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "BOFT": {"target_modules": TARGETS, "boft_block_size": 8},
    "C3A": {"target_modules": TARGETS, "block_size": 8},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"target_modules": TARGETS, "n_frequency": 10},
    "GRALORA": {"target_modules": TARGETS, "r": 4, "gralora_k": 2},
    "IA3": {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"target_modules": TARGETS, "r": 2},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"target_modules": TARGETS, "oft_block_size": 8, "r": 0},
    "OSF": {"target_modules": TARGETS, "effective_rank": 4},
    "POLY": {"target_modules": TARGETS, "n_tasks": 2, "n_skills": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "ROAD": {"target_modules": TARGETS, "group_size": 8},
    "SHIRA": {"target_modules": TARGETS, "r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [40, 41, 42]},
    "VBLORA": {"target_modules": TARGETS, "vector_length": 8, "num_vectors": 4},
    "WAVEFT": {"target_modules": TARGETS, "n_frequency": 10},
    "ADALORA": {"target_modules": TARGETS, "total_step": 10},
} | {name: {"num_virtual_tokens": 3} for name in ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")}

REFUSED = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"),
        *("POLY", "LILY", "SHADOW", "XLORA"),
    }
)
OTHERS = {
    kind.value: PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        task_type="CAUSAL_LM", **SETTINGS.get(kind.value, {"target_modules": TARGETS})
    )
    for kind in PeftType
    if kind not in (PeftType.LORA, PeftType.XLORA)
}


def lora(settings) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))


MEASURED = {name: lora(settings) for name, settings in LORA.items()}
MEASURED |= {name: config for name, config in OTHERS.items() if name not in REFUSED}


def variants() -> set[str]:
    """Every setting, and every start, by which the installed PEFT makes another LoRA."""
    of = {field.name: field for field in fields(LoraConfig)}
    marked = {name for name, field in of.items() if field.metadata.get("is_lora_variant")}
    return marked | set(re.findall(r'"(\w+)', of["init_lora_weights"].type))


def kinds() -> dict[str, PeftConfig]:
    """All of them by name, LoRA's variants first."""
    named = {f"LORA, {name}": lora(settings) for name, settings in {**LORA, **LORA_REFUSED, **UNMADE}.items()}
    return named | OTHERS | {"XLORA": PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA](hidden_size=32, adapters={})}
