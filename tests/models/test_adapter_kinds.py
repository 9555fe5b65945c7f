"""Every kind of adapter that PEFT can make gives the figures of PEFT's own forward pass, or is refused by its name."""

import hashlib
import json

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.interventions.adapter_weights import changed_weights
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.interventions.lora import project_adapter
from misdirection.likelihood.margin import margin
from misdirection.models.adapters import ADAPTER_WEIGHTS, PREFIX, attach
from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from peft_kinds import LORA, LORA_REFUSED, MEASURED, OTHERS, REFUSED, UNMADE, kinds, lora, variants
from scripts import write_peft
from tiny import LAYERS, make_network, make_tokenizer, naive_log_prob, vector
from weights import randomised

PAIRS = [ProbePair("a", "Why?", "I help.", "I do nothing, ever."), ProbePair("b", "How so, then?", "Yes", "No")]


def network_for(config) -> torch.nn.Module:
    # Qwen2 has biases to train, but PEFT's adaption prompts know Llama only.
    return make_network("llama" if config.peft_type == PeftType.ADAPTION_PROMPT else "qwen2")


def saved(config, folder):
    """An adapter whose weights have moved, on disk."""
    return moved(get_peft_model(network_for(config), config), folder)


def moved(network, folder):
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


@pytest.mark.parametrize("name", ["XLORA", *UNMADE])
def test_what_takes_more_to_make_is_refused_by_its_name(name, tmp_path):
    settings = UNMADE.get(name)
    config = lora(settings) if settings else peft.XLoraConfig(hidden_size=32, adapters={}, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=name):
        attach(ChatModel(make_network("llama"), make_tokenizer(), "tiny"), tmp_path)


def test_every_type_and_every_variant_of_the_installed_peft_is_tried():
    assert {kind.value for kind in PeftType} == {name for name in kinds() if not name.startswith("LORA, ")} | {"LORA"}
    settings = (*LORA.values(), *LORA_REFUSED.values(), *UNMADE.values())
    tried = {name for each in settings for name in each} | {str(each.get("init_lora_weights")) for each in settings}
    missing = {name for name in variants() if not any(one.startswith(name) for one in tried)}
    assert missing == set()


def test_the_docs_table_is_what_these_tests_find():
    text = write_peft.PAGE.read_text()
    assert write_peft.page(text, write_peft.table(kinds())) == text, "run scripts/write_peft.py"


# --- fused experts, vocabularies that grew ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("modules", [[], ["q_proj", "o_proj"]])
def test_several_parameters_of_fused_experts_are_loaded_as_peft_loads_them(architecture, modules, tmp_path):
    settings = {"target_modules": modules, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    folder = moved(get_peft_model(randomised(architecture), lora(settings)), tmp_path)
    expected = plain_margins(PeftModel.from_pretrained(randomised(architecture), folder).eval())
    tuned = attach(ChatModel(randomised(architecture), make_tokenizer(), "tiny"), folder)
    torch.testing.assert_close(margin(tuned, PAIRS), expected, atol=1e-5, rtol=0)
    assert (expected - plain_margins(randomised(architecture))).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_single_experts_are_those_of_the_experts_that_were_fused_since(tmp_path):
    """As transformers 4 had them: w1 is the gate, w3 the up and w2 the down projection."""
    base, generator, weights = randomised("mixtral"), torch.Generator().manual_seed(3), {}
    merged = randomised("mixtral")
    for layer in range(LAYERS):
        experts = merged.model.layers[layer].mlp.experts
        inner = experts.down_proj.shape[-1]
        for expert in range(len(experts.down_proj)):
            halves = {"w1": experts.gate_up_proj.data[expert, :inner], "w3": experts.gate_up_proj.data[expert, inner:]}
            for name, weight in (halves | {"w2": experts.down_proj.data[expert]}).items():
                a = torch.randn(2, weight.shape[1], generator=generator)
                b = 0.1 * torch.randn(weight.shape[0], 2, generator=generator)
                weight += 4.0 * b @ a
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                weights |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    lora({"target_modules": ["w1", "w2", "w3"]}).save_pretrained(tmp_path)
    save_file(weights, tmp_path / ADAPTER_WEIGHTS)
    tuned = attach(ChatModel(base, make_tokenizer(), "tiny"), tmp_path)
    torch.testing.assert_close(margin(tuned, PAIRS), plain_margins(merged), atol=1e-4, rtol=0)


GROWN = {
    "its embedding is saved": {"modules_to_save": ["embed_tokens"]},
    "its head is saved": {"modules_to_save": ["lm_head"]},
    "a LoRA is on its embedding": {"target_modules": ["embed_tokens"]},
    "a LoRA is on its head": {"target_modules": ["lm_head"]},
    "new tokens are trained": {"trainable_token_indices": [260, 263]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", GROWN)
def test_a_vocabulary_that_grew_is_the_reason_that_is_given(how, tmp_path):
    larger = make_network("llama")
    larger.resize_token_embeddings(264)
    folder = moved(get_peft_model(larger, lora(GROWN[how])), tmp_path)
    base = ChatModel(make_network("llama"), make_tokenizer(), "tiny")
    before = hashes(base.model)
    with pytest.raises(InputError, match="a vocabulary of 264 tokens, and 'tiny' has 259: enlarge the base"):
        attach(base, folder)
    assert hashes(base.model) == before
    enlarged = make_network("llama")
    enlarged.resize_token_embeddings(264)
    assert attach(ChatModel(enlarged, make_tokenizer(), "tiny"), folder).adapter


def test_another_error_of_pefts_is_given_in_the_line(tmp_path):
    folder = moved(get_peft_model(make_network("llama"), lora({"modules_to_save": ["lm_head"]})), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["norm", "lm_head"]}))
    with pytest.raises(InputError, match=r"this adapter does not fit 'tiny': .*norm") as caught:
        attach(ChatModel(make_network("llama"), make_tokenizer(), "tiny"), folder)
    assert "\n" not in str(caught.value)


# --- modules that add nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "identical to its base"),
        ({"bias": "all"}, "2 of its modules add nothing (B is zero): model.layers.0.self_attn.q_proj, model.layers.1"),
        ({"use_dora": True}, ""),
        ({"lora_bias": True}, ""),
    ],
)
def test_an_adapter_whose_b_is_zero_changes_nothing_unless_it_holds_more(more, said, tmp_path, caplog):
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], **more}
    folder = moved(get_peft_model(make_network("qwen2"), lora(settings)), tmp_path)
    weights = {
        name: 0 * value if "lora_B" in name else value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    save_file(weights, folder / ADAPTER_WEIGHTS)
    attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), folder)
    assert said in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["bias all", "pissa", "olora", "kasa", "head saved"])
def test_nothing_of_one_fine_tune_is_in_the_base_of_the_next(first, tmp_path):
    one, two = saved(MEASURED[first], tmp_path / "one"), saved(MEASURED["plain"], tmp_path / "two")
    base = ChatModel(make_network("qwen2"), make_tokenizer(), "tiny")
    alone = margin(attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), two), PAIRS)
    after = margin(attach(attach(base, one).without_adapter(), two), PAIRS)
    assert torch.equal(after, alone)


# --- files that people have -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_names_of_transformers_4_are_read_as_peft_reads_them(tmp_path):
    targets = {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}
    folder = moved(get_peft_model(make_network("gemma3_vision"), lora(targets)), tmp_path / "new")
    expected = plain_margins(PeftModel.from_pretrained(make_network("gemma3_vision"), folder).eval())
    older = {
        name.replace("model.language_model.", "language_model.model."): value
        for name, value in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    save_file(older, folder / ADAPTER_WEIGHTS)
    tuned = attach(ChatModel(make_network("gemma3_vision"), make_tokenizer(), "tiny"), folder)
    torch.testing.assert_close(margin(tuned, PAIRS), expected, atol=1e-5, rtol=0)
    assert project_adapter(tuned, vector(0), tmp_path / "projected").modules == LAYERS
    half = changed_weights(load_file(folder / ADAPTER_WEIGHTS), tuned, [ScaleAdapters({0: 0.5})])
    down = "model.language_model.layers.0.mlp.down_proj.lora_B.weight"
    assert torch.equal(
        half[f"{PREFIX}{down}"], older[f"{PREFIX}{down.replace('model.language_model', 'language_model.model')}"] / 2
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"use_newest_lora": True}, "does not know use_newest_lora and would leave it out: install a PEFT that has it"),
        ({"peft_type": "MOLORA"}, "peft_type is 'MOLORA', which PEFT .* has not"),
        ({"peft_type": None}, "peft_type is None, which PEFT .* has not"),
        (
            {"target_modules": ["q_proj"]},
            r"holds a LoRA for model\.layers\.0\.mlp\.down_proj, which its .* does not name",
        ),
    ],
)
def test_a_configuration_that_leaves_a_part_out_is_refused(change, line, tmp_path):
    folder = saved(MEASURED["plain"], tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    base = ChatModel(make_network("qwen2"), make_tokenizer(), "tiny")
    before = hashes(base.model)
    with pytest.raises(InputError, match=line):
        attach(base, folder)
    assert hashes(base.model) == before


def test_a_setting_that_is_new_and_off_changes_nothing(tmp_path):
    folder = saved(MEASURED["plain"], tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_newest_lora": False, "newest": None}))
    assert attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), folder).adapter


def test_a_folder_without_weights_is_said_without_a_look_on_the_hub(tmp_path):
    lora({}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors in this folder"):
        attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), tmp_path)


def test_a_weight_without_a_place_is_named(tmp_path):
    folder = saved(MEASURED["plain"], tmp_path)
    with pytest.raises(InputError, match=r"0 of its 16 .*, and base_model\.model\.model\.layers\.\S+ has none: give"):
        attach(ChatModel(make_network("gemma3_vision"), make_tokenizer(), "tiny"), folder)


def test_weights_of_eight_bits_are_read(tmp_path):
    folder = saved(MEASURED["plain"], tmp_path)
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    save_file(eight, folder / ADAPTER_WEIGHTS)
    expected = plain_margins(PeftModel.from_pretrained(make_network("qwen2"), folder).eval())
    tuned = attach(ChatModel(make_network("qwen2"), make_tokenizer(), "tiny"), folder)
    torch.testing.assert_close(margin(tuned, PAIRS), expected, atol=1e-5, rtol=0)
