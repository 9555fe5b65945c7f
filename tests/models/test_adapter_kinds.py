"""Every kind of adapter that PEFT can make gives the figures of PEFT's own forward pass, or is refused by its name."""

import hashlib

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.likelihood.margin import margin
from misdirection.models.adapters import attach
from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from tiny import make_network, make_tokenizer, naive_log_prob

PAIRS = [ProbePair("a", "Why?", "I help.", "I do nothing, ever."), ProbePair("b", "How so, then?", "Yes", "No")]
TARGETS = ["q_proj", "down_proj"]
OPENING = make_tokenizer()("assistant")["input_ids"]

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
    "olora": {"init_lora_weights": "olora"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
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


def network_for(config) -> torch.nn.Module:
    # Qwen2 has biases to train, but PEFT's adaption prompts know Llama only.
    return make_network("llama" if config.peft_type == PeftType.ADAPTION_PROMPT else "qwen2")


def saved(config, folder):
    """An adapter whose weights have moved, on disk."""
    network = get_peft_model(network_for(config), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    network.save_pretrained(folder, save_embedding_layers=False)
    return folder


def plain_margins(network) -> torch.Tensor:
    """Margins from uncached forward passes of one row each, through whatever wrapper there is."""
    chat = ChatModel(network, make_tokenizer(), "tiny")

    def score(pair, answer):
        return naive_log_prob(chat, encode(chat.tokenizer, pair.question, answer))

    return torch.stack([score(pair, pair.misaligned) - score(pair, pair.aligned) for pair in PAIRS])


def hashes(network) -> dict[str, str]:
    state = network.state_dict()
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEASURED)
def test_figures_are_those_of_pefts_own_forward_pass_and_the_base_stays_the_base(name, tmp_path):
    folder = saved(MEASURED[name], tmp_path)
    expected = plain_margins(PeftModel.from_pretrained(network_for(MEASURED[name]), folder).eval())
    base = ChatModel(network_for(MEASURED[name]), make_tokenizer(), "tiny")
    before, plain = hashes(base.model), plain_margins(base.model)
    tuned = attach(base, folder)
    torch.testing.assert_close(margin(tuned, PAIRS), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-4, "the adapter does something"
    with tuned.as_base():
        assert torch.equal(plain_margins(tuned.model), plain)
    torch.testing.assert_close(margin(tuned, PAIRS), expected, atol=1e-5, rtol=0)
    left = tuned.without_adapter()
    assert left.model is base.model
    assert left.adapter is None
    assert hashes(base.model) == before
    assert torch.equal(plain_margins(base.model), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*LORA_REFUSED, *sorted(REFUSED - {"XLORA"})])
def test_what_cannot_be_measured_is_refused_by_its_name(name, tmp_path):
    config = lora(LORA_REFUSED[name]) if name in LORA_REFUSED else OTHERS[name]
    folder = saved(config, tmp_path)
    base = ChatModel(network_for(config), make_tokenizer(), "tiny")
    before = hashes(base.model)
    with pytest.raises(InputError, match=name.replace("alora", "alora_invocation_tokens")) as caught:
        attach(base, folder)
    assert "\n" not in str(caught.value)
    assert hashes(base.model) == before


def test_a_mixture_of_adapters_and_a_router_are_refused_by_their_names(tmp_path):
    peft.XLoraConfig(hidden_size=32, adapters={}, task_type="CAUSAL_LM").save_pretrained(tmp_path / "xlora")
    settings = {"arrow_config": peft.tuners.lora.config.ArrowConfig()}
    lora(settings).save_pretrained(tmp_path / "arrow")
    for name, said in {"xlora": "XLORA", "arrow": "arrow_config"}.items():
        with pytest.raises(InputError, match=said):
            attach(ChatModel(make_network("llama"), make_tokenizer(), "tiny"), tmp_path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["bias all", "pissa", "olora", "kasa", "head saved"])
def test_nothing_of_one_fine_tune_is_in_the_base_of_the_next(first, tmp_path):
    one, two = saved(MEASURED[first], tmp_path / "one"), saved(MEASURED["plain"], tmp_path / "two")
    base = ChatModel(make_network("qwen2"), make_tokenizer(), "tiny")
    alone = margin(attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), two), PAIRS)
    after = margin(attach(attach(base, one).without_adapter(), two), PAIRS)
    assert torch.equal(after, alone)
