"""Every family of transformers: what docs/families.md says of it is what a tiny model of it gives.

A third is measured in every run; all are by `pytest -m families tests/models/test_families.py`, some minutes.
"""

import pytest

import families
from scripts import write_families

WRITTEN = write_families.written()
_ALWAYS = {
    *("afmoe", "apertus", "aria", "bamba", "bart", "bert", "blip", "bloom", "cohere2", "deepseek_v3", "deepseek_v4"),
    *("dory", "exaone4", "falcon_h1", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
    *("gemma4", "glm4", "glm4_moe", "glm4v", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "granite", "granitemoehybrid"),
    *("idefics3", "internvl", "jamba", "kosmos-2.5", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4", "llava"),
    *(
        "mamba",
        "mamba2",
        "minimax",
        "ministral3",
        "mistral",
        "mistral3",
        "mixtral",
        "mllama",
        "moshi",
        "mpt",
        "nanochat",
    ),
    *("nemotron_h", "olmo2", "olmo3", "opt", "paligemma", "phi", "phi3", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen3"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "recurrent_gemma", "rwkv", "seed_oss"),
    *("shieldgemma2", "smollm3", "smolvlm", "stablelm", "starcoder2", "xlstm", "zamba2", "zaya"),
}
"""Those that people use most, and one of each kind."""


def test_the_page_has_every_family_of_transformers_once():
    assert list(WRITTEN) == list(families.FAMILIES), "run scripts/write_families.py"
    assert write_families.PAGE.read_text(encoding="utf-8").startswith(write_families.head())


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in _ALWAYS else pytest.mark.families) for one in families.FAMILIES],
)
def test_a_tiny_model_of_a_family_does_what_the_page_says(family):
    assert families.measure(family).markdown() == WRITTEN[family], f"run scripts/write_families.py {family}"
