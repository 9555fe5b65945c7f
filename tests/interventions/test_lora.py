"""Ablations as plain PEFT adapters, against the same ones as hooks."""

import copy
import json
import re
from importlib.util import find_spec

import pytest
import torch
from accelerate import dispatch_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate
from misdirection.interventions.lora import ablation_adapter, project_adapter
from misdirection.interventions.writers import sublayers
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from tiny import LAYERS, WIDTH, make_tokenizer, residual, run, vector
from weights import IDS, POST_NORM, as_chat, logits, randomised, saved

V, PLANE = vector(3), vector(4, 1.0, 2)
EVERYWHERE = {"positions": "all", "at": "writes"}
PRE_NORM = ("llama", "llama_tuples", "mistral", "qwen2", "qwen3", "phi3", "granite", "gpt2", "gpt_neox")
FUSED = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")
KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"


def without_biases(architecture):
    network = randomised(architecture)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return network


def tuned(folder, *, architecture="llama", config=LoraConfig, **options):
    """A model with a fine-tune's adapter from a folder, whose weights are random."""
    network = without_biases(architecture)
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    if config is LoraConfig:
        settings = {"init_lora_weights": False, "r": 4, "lora_alpha": 8} | settings
    trained = get_peft_model(copy.deepcopy(network), config(**settings))
    if options.get("modules_to_save"):
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "modules_to_save" in name:
                    parameter += 0.1
    trained.save_pretrained(folder)
    return attach(as_chat(network), folder)


PATTERNS = {"rank_pattern": {"down_proj": 1, "o_proj": 6}, "alpha_pattern": {"down_proj": 16, "o_proj": 3}}


def files(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def hooked(chat, *interventions):
    with intervene(chat, interventions):
        return logits(chat.model)


def one_line(words, function, *args, **options):
    with pytest.raises(MisdirectionError, match=words) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)


def assert_equal_logits(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# --- of the whole model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vectors", "strength"), [(V, 1.0), (PLANE, 0.5)])
@pytest.mark.parametrize("architecture", PRE_NORM)
def test_the_adapter_is_the_hooked_ablation(tmp_path, architecture, vectors, strength):
    network = without_biases(architecture)
    one = Ablate(3 * vectors, strength=strength, **EVERYWHERE)
    report = ablation_adapter(as_chat(network), one, tmp_path / "a")
    plain, expected = logits(network), hooked(as_chat(network), one)
    loaded = PeftModel.from_pretrained(network, tmp_path / "a")
    assert_equal_logits(logits(loaded), expected)
    assert (expected - plain).abs().max() > 0.05
    assert (report.rank, report.exact) == (vectors.view(-1, WIDTH).shape[0], True)
    assert torch.equal(logits(loaded.unload()), plain), "the base is as it was"


FINE_TUNES = {
    "plain": {},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "patterns": PATTERNS,
    "rslora with patterns": PATTERNS | {"use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "down_proj", "gate_proj"], "use_rslora": True},
    "no writer": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(("vectors", "strength"), [(V, 1.0), (PLANE, 0.5)])
@pytest.mark.parametrize("name", FINE_TUNES)
def test_on_top_of_a_fine_tune_both_become_one_adapter(tmp_path, name, vectors, strength):
    chat = tuned(tmp_path / "tuned", **FINE_TUNES[name])
    one = Ablate(vectors, strength=strength, **EVERYWHERE)
    before = logits(chat.model)
    expected = hooked(chat, one)
    ablation_adapter(chat, one, tmp_path / "a")
    assert torch.equal(logits(chat.model), before), "the model in memory is as it was"
    base = without_biases("llama")
    assert_equal_logits(logits(PeftModel.from_pretrained(base, tmp_path / "a")), expected)
    assert (expected - before).abs().max() > 0.05
    assert (before - logits(without_biases("llama"))).abs().max() > 0.05


def test_every_module_has_one_rank_and_a_scaling_of_one(tmp_path):
    chat = tuned(tmp_path / "tuned", use_rslora=True, **PATTERNS)
    report = ablation_adapter(chat, Ablate(PLANE, **EVERYWHERE), tmp_path / "a")
    config, weights = files(tmp_path / "a")
    assert report.rank == config["r"] == config["lora_alpha"] == 6 + 2
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"] or config["use_dora"])
    ranks = {one.shape[0] if "_A" in name else one.shape[1] for name, one in weights.items()}
    assert ranks == {8}
    loaded = PeftModel.from_pretrained(without_biases("llama"), tmp_path / "a")
    layers = [one for one in loaded.modules() if isinstance(one, LoraLayer)]
    assert {one.scaling["default"] for one in layers} == {1.0}
    # The embedding, and of each layer the query, which only the fine-tune had, and both writers.
    assert len(layers) == report.modules == 1 + 3 * LAYERS


def test_the_factors_are_minus_the_direction_and_what_it_reads(tmp_path):
    network = without_biases("llama")
    report = ablation_adapter(as_chat(network, "org/base"), Ablate(7 * V, strength=0.25, **EVERYWHERE), tmp_path / "a")
    config, weights = files(tmp_path / "a")
    assert (report.modules, config["base_model_name_or_path"]) == (1 + 2 * LAYERS, "org/base")
    b, a = (weights[KEY.format(2, "mlp.down_proj", side)] for side in "BA")
    torch.testing.assert_close(b, -0.25 * V.unsqueeze(1))
    torch.testing.assert_close(a, (V @ network.model.layers[2].mlp.down_proj.weight.detach()).unsqueeze(0))
    said = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert (said["form"], said["intervention"]["strength"], said["rank"]) == ("adapter", 0.25, 1)


@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_post_norm_model_with_the_adapter_writes_nothing_along_the_direction(tmp_path, architecture):
    chat = as_chat(without_biases(architecture))
    report = ablation_adapter(chat, Ablate(PLANE, **EVERYWHERE), tmp_path / "a")
    with torch.no_grad():
        before, _ = run(chat, IDS, torch.ones_like(IDS))
        stream, _ = run(attach(chat, tmp_path / "a"), IDS, torch.ones_like(IDS))
    assert (stream @ PLANE.T).abs().amax() / stream.norm(dim=-1).mean() < 1e-5
    assert (before @ PLANE.T).abs().amax() / before.norm(dim=-1).mean() > 0.05
    assert not report.exact


class Packed(nn.Linear):
    """A matrix that is stored in a way of its own, as quantised ones are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.true = linear.weight.detach()
        self.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ self.true.T


def packed():
    network = without_biases("llama")
    for block in network.model.layers:
        block.mlp.down_proj = Packed(block.mlp.down_proj)
    return as_chat(network)


def test_over_a_quantised_base_the_ablation_is_of_what_the_weights_stand_for(tmp_path):
    chat, one = packed(), Ablate(V, **EVERYWHERE)
    ablation_adapter(chat, one, tmp_path / "a")
    expected, plain = hooked(chat, one), logits(chat.model)
    assert_equal_logits(logits(PeftModel.from_pretrained(chat.model, tmp_path / "a")), expected)
    assert (expected - plain).abs().max() > 0.05


def test_a_packed_embedding_is_refused(tmp_path):
    chat = as_chat(without_biases("llama"))
    chat.decoder.embed_tokens.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
    words = r"^model\.embed_tokens: its weights are packed \(uint8\)"
    one_line(words, ablation_adapter, chat, Ablate(V, **EVERYWHERE), tmp_path / "a")


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISED = {
    "4 bits": NF4,
    "4 bits, scales too": NF4 | {"bnb_4bit_use_double_quant": True},
    "4 bits, kept as bfloat16": NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    "8 bits": {"load_in_8bit": True},
}
WIDE = torch.cat([V, vector(5)])


def quantised(folder, settings):
    # Four-bit weights come in blocks of 64.
    saved(randomised("llama", hidden_size=2 * WIDTH), folder)
    config = BitsAndBytesConfig(**settings)
    network = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    return network.eval()


def with_adapter(network, folder):
    return ChatModel(PeftModel.from_pretrained(network, folder).eval(), make_tokenizer(), "tiny", adapter=str(folder))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("fine_tuned", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_over_bitsandbytes_the_adapter_is_the_hooked_ablation(tmp_path, name, fine_tuned, passes):
    """Over the same weights in float32, closely; else within what the model's own rounding moves its logits."""
    one, networks = Ablate(WIDE, **EVERYWHERE), [quantised(tmp_path / "m", QUANTISED[name]) for _ in range(5)]
    chat, plain = as_chat(networks[0]), as_chat(networks[1].dequantize())
    if fine_tuned:
        torch.manual_seed(1)
        config = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "o_proj", "down_proj"])
        get_peft_model(networks[2], config).save_pretrained(tmp_path / "tuned")
        chat, plain = (with_adapter(each.model, tmp_path / "tuned") for each in (chat, plain))
    # A pass may pack the weights anew, with scales in bfloat16.
    before = [logits(chat.model) for _ in range(passes)]
    report = ablation_adapter(chat, one, tmp_path / "a")
    assert all(torch.equal(logits(chat.model), each) for each in before), "the model in memory is as it was"
    expected, unrounded = hooked(chat, one), hooked(plain, one)
    effect = (unrounded - logits(plain.model)).norm()
    exact = with_adapter(networks[3].dequantize(), tmp_path / "a")
    assert (logits(exact.model) - unrounded).norm() < (1e-2 if passes else 1e-4) * effect
    found = with_adapter(networks[4], tmp_path / "a")
    rounding = (logits(chat.model) - logits(plain.model)).norm()
    assert (logits(found.model) - expected).norm() < 1.5 * rounding + 1e-4 * effect
    assert report.exact


@pytest.mark.parametrize(
    "ablation",
    [
        Ablate(V, at="writes"),
        Ablate(V, positions=torch.ones(9).bool(), at="writes"),
        Ablate(V, positions="all"),
        Ablate(V, (1,), positions="all"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(tmp_path, ablation):
    words = "acts on every token and on all that is written.*keep the intervention as a hook"
    one_line(words, ablation_adapter, as_chat(without_biases("llama")), ablation, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("gpt2", r"^transformer\.h\.0\.attn\.c_proj: its bias writes to the residual stream.*bake"),
        ("gpt_neox", r"^gpt_neox\.layers\.0\.attention\.dense: its bias writes .*bake"),
        *((name, r"experts: is a \w+ \(fused experts.*bake|o_proj: its bias writes.*bake") for name in FUSED),
    ],
)
def test_biases_and_fused_experts_are_refused(tmp_path, architecture, words):
    one_line(words, ablation_adapter, as_chat(randomised(architecture)), Ablate(V, **EVERYWHERE), tmp_path / "a")


MORE_THAN_LORA = {
    "dora": ({"use_dora": True}, "use_dora: DoRA rescales.*bake"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, r"more than a plain LoRA \(modules_to_save\).*merge"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"more than a plain LoRA \(trainable_token_indices\)"),
    "biases": ({"bias": "all"}, r"more than a plain LoRA \(bias\)"),
    "lora bias": ({"lora_bias": True}, r"more than a plain LoRA \(lora_bias\)"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa changes the base's own weights"),
    "ia3": ({"config": IA3Config, "feedforward_modules": ["down_proj"]}, "is no LoRA but IA3"),
}


@pytest.mark.parametrize("name", MORE_THAN_LORA)
def test_a_fine_tune_that_is_more_than_a_plain_lora_is_refused(tmp_path, name):
    options, words = MORE_THAN_LORA[name]
    chat = tuned(tmp_path / "tuned", **options)
    one_line(words, ablation_adapter, chat, Ablate(V, **EVERYWHERE), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_merged_fine_tune_is_refused(tmp_path):
    chat = tuned(tmp_path / "tuned")
    chat.model.merge_adapter()
    one_line("is merged into the model", ablation_adapter, chat, Ablate(V, **EVERYWHERE), tmp_path / "a")


# --- of a fine-tune alone -------------------------------------------------------------------------------------------


def is_written(name):
    return "lora_B" in name and ("o_proj" in name or "down_proj" in name)


@pytest.mark.parametrize("vectors", [V, PLANE])
@pytest.mark.parametrize("options", [{}, PATTERNS | {"use_rslora": True}], ids=["plain", "patterns"])
def test_what_the_fine_tune_writes_loses_the_directions_and_all_else_stays(tmp_path, vectors, options):
    chat = tuned(tmp_path / "tuned", **options)
    report = project_adapter(chat, 3 * vectors, tmp_path / "a")
    said = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert said["intervention"] == Ablate(3 * vectors, positions="all", at="adapters").described()
    (config, before), (config_after, after) = files(tmp_path / "tuned"), files(tmp_path / "a")
    assert config_after == config
    assert set(after) == set(before)
    rows = vectors.view(-1, WIDTH)
    for name, one in after.items():
        if is_written(name):
            assert (rows @ one).abs().max() < 1e-6 < 0.01 < (rows @ before[name]).abs().max()
            basis = torch.linalg.qr(rows.T)[0]
            torch.testing.assert_close(one, before[name] - basis @ basis.T @ before[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(one, before[name])
    assert report.modules == 2 * LAYERS == sum(map(is_written, after))
    assert report.after < 1e-6 < 0.1 < report.before


def test_the_repaired_fine_tune_adds_nothing_along_the_direction_to_the_base(tmp_path):
    chat = tuned(tmp_path / "tuned", use_rslora=True)
    before = logits(chat.model)
    project_adapter(chat, V, tmp_path / "a")
    assert torch.equal(logits(chat.model), before), "the model in memory is as it was"
    base = without_biases("llama")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").get_base_model()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = loaded.model.layers[1].mlp.down_proj(x) - base.model.layers[1].mlp.down_proj(x)
    assert added.norm() > 0.1
    assert (added @ V).abs().max() < 1e-5
    assert (logits(loaded) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("vectors", "strength"), [(V, 1.0), (PLANE, 0.5)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "granite"])
def test_the_repaired_fine_tune_is_the_hooked_ablation_of_its_adapters(tmp_path, architecture, vectors, strength):
    chat = tuned(tmp_path / "tuned", architecture=architecture)
    report = project_adapter(chat, vectors, tmp_path / "a", strength=strength)
    expected = hooked(chat, Ablate(vectors, strength=strength, positions="all", at="adapters"))
    found = logits(PeftModel.from_pretrained(without_biases(architecture), tmp_path / "a"))
    assert_equal_logits(found, expected)
    assert (expected - logits(chat.model)).abs().max() > 0.01
    assert report.exact


def test_a_strength_leaves_its_part(tmp_path):
    project_adapter(tuned(tmp_path / "tuned"), V, tmp_path / "a", strength=0.75)
    (_, before), (_, after) = files(tmp_path / "tuned"), files(tmp_path / "a")
    name = KEY.format(1, "mlp.down_proj", "B")
    torch.testing.assert_close(V @ after[name], 0.25 * (V @ before[name]))


@pytest.mark.parametrize("strength", [1.0, 0.001])
def test_of_an_adapter_in_half_precision_nothing_is_lost(tmp_path, strength):
    tuned(tmp_path / "tuned")
    _, weights = files(tmp_path / "tuned")
    half = {name: value.bfloat16() for name, value in weights.items()}
    save_file(half, tmp_path / "tuned" / "adapter_model.safetensors")
    project_adapter(attach(as_chat(without_biases("llama")), tmp_path / "tuned"), V, tmp_path / "a", strength=strength)
    _, after = files(tmp_path / "a")
    for name, before in half.items():
        exact = before.float() - strength * torch.outer(V, V @ before.float()) if is_written(name) else before
        torch.testing.assert_close(after[name], exact, atol=1e-7, rtol=1e-6)


def test_with_its_norm_kept_each_column_is_as_long_as_before(tmp_path):
    report = project_adapter(tuned(tmp_path / "tuned", **PATTERNS), PLANE, tmp_path / "a", keep_norm=True)
    (_, before), (_, after) = files(tmp_path / "tuned"), files(tmp_path / "a")
    for name in filter(is_written, after):
        torch.testing.assert_close(after[name].norm(dim=0), before[name].norm(dim=0))
        assert (PLANE @ after[name]).abs().max() < 1e-6
    assert report.after < 1e-6
    said = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert (said["keep_norm"], said["exact"], report.exact) == (True, False, False)


def test_an_adapter_on_the_embedding_loses_the_direction_too(tmp_path):
    chat = tuned(tmp_path / "tuned", target_modules=["embed_tokens", "q_proj"])
    report = project_adapter(chat, V, tmp_path / "a")
    _, after = files(tmp_path / "a")
    assert report.modules == 1
    assert (V @ after["base_model.model.model.embed_tokens.lora_embedding_B"]).abs().max() < 1e-6


def test_biases_of_the_adapter_itself_lose_the_direction_too(tmp_path):
    chat = tuned(tmp_path / "tuned", lora_bias=True)
    project_adapter(chat, V, tmp_path / "a")
    (_, before), (_, after) = files(tmp_path / "tuned"), files(tmp_path / "a")
    name = KEY.format(1, "mlp.down_proj", "B").replace("weight", "bias")
    assert abs(V @ before[name]) > 1e-3
    assert abs(V @ after[name]) < 1e-6


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "glm4"])
def test_before_a_norm_what_faces_the_direction_is_taken_out(tmp_path, architecture):
    chat = tuned(tmp_path / "tuned", architecture=architecture)
    project_adapter(chat, V, tmp_path / "a")
    _, after = files(tmp_path / "a")
    norms = ("post_self_attn_layernorm", "post_mlp_layernorm") if architecture == "glm4" else POST
    one_more = architecture == "gemma2"
    for part, norm in zip(("self_attn.o_proj", "mlp.down_proj"), norms, strict=True):
        gain = getattr(chat.layers[1], norm).weight.detach() + one_more
        assert ((gain * V) @ after[KEY.format(1, part, "B")]).abs().max() < 1e-5
        assert (V @ after[KEY.format(1, part, "B")]).abs().max() > 1e-2


POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def first_write(chat):
    """[rows, tokens]: along the direction, what the first attention writes."""
    seen = []
    handle = sublayers(chat.layers[0])[0].register_forward_hook(lambda _m, _a, out: seen.append(residual(out) @ V))
    logits(chat.model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("architecture", ["llama", *POST_NORM])
def test_it_is_exact_where_no_norm_scales_anew_what_the_base_writes(tmp_path, architecture):
    chat = tuned(tmp_path / "tuned", architecture=architecture, target_modules=["o_proj"])
    report = project_adapter(chat, V, tmp_path / "a")
    base = as_chat(without_biases(architecture))
    expected = first_write(base)
    moved = (first_write(attach(base, tmp_path / "a")) - expected).abs().max() / expected.abs().max()
    assert report.exact == (architecture not in POST_NORM)
    assert moved < 1e-5 if report.exact else moved > 1e-2


def test_an_output_matrix_that_was_trained_as_a_whole_comes_along(tmp_path):
    chat = tuned(tmp_path / "tuned", modules_to_save=["lm_head"])
    project_adapter(chat, V, tmp_path / "a")
    (_, before), (_, after) = files(tmp_path / "tuned"), files(tmp_path / "a")
    assert torch.equal(after["base_model.model.lm_head.weight"], before["base_model.model.lm_head.weight"])
    assert not torch.equal(after["base_model.model.lm_head.weight"], without_biases("llama").lm_head.weight)


UNPROJECTABLE = {
    "dora": ({"use_dora": True}, "use_dora: DoRA rescales.*bake"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa changes the base's own weights"),
    "ia3": ({"config": IA3Config, "feedforward_modules": ["down_proj"]}, "is no LoRA but IA3"),
    "no writer": ({"target_modules": ["q_proj", "up_proj"]}, "none of its modules writes.*ablate the whole model"),
    "whole embedding": ({"modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens\.weight was trained as a whole"),
    "whole matrix": (
        {"target_modules": ["o_proj"], "modules_to_save": ["down_proj"]},
        r"layers\.0\.mlp\.down_proj\.weight was trained as a whole.*bake",
    ),
    "whole norm": ({"modules_to_save": ["input_layernorm"]}, r"input_layernorm\.weight was trained as a whole"),
    "biases": (
        {"architecture": "gpt2", "target_modules": ["c_proj"], "bias": "all", "fan_in_fan_out": True},
        r"bias was trained as a whole",
    ),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"embed_tokens\.\S+ was trained as a whole"),
    "experts": (
        {"architecture": "qwen3_moe", "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        "target_parameters: it adapts fused parameters.*bake",
    ),
}


@pytest.mark.parametrize("name", UNPROJECTABLE)
def test_a_fine_tune_whose_writing_is_not_all_in_its_b_is_refused(tmp_path, name):
    options, words = UNPROJECTABLE[name]
    one_line(words, project_adapter, tuned(tmp_path / "tuned", **options), V, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_on_attention_alone_is_projected_though_the_experts_are_fused(tmp_path):
    chat = tuned(tmp_path / "tuned", architecture="qwen3_moe", target_modules=["q_proj", "o_proj"])
    assert project_adapter(chat, V, tmp_path / "a").modules == LAYERS


def test_no_adapter_and_one_that_is_not_a_local_folder_get_one_line(tmp_path):
    base = as_chat(without_biases("llama"))
    one_line("there is no adapter to take a direction out of", project_adapter, base, V, tmp_path / "a")
    chat = tuned(tmp_path / "tuned")
    remote = ChatModel(chat.model, chat.tokenizer, chat.name, adapter="org/adapter")
    one_line("org/adapter: no adapter_model.safetensors here.*local folder", project_adapter, remote, V, tmp_path / "a")


def test_the_files_of_another_checkpoint_are_not_taken_for_the_loaded_one(tmp_path):
    last, loaded = tmp_path / "organism", tmp_path / "organism" / "checkpoint-5"
    tuned(last, target_modules=["o_proj", "down_proj"])
    tuned(loaded, target_modules=["down_proj"])
    chat = attach(as_chat(without_biases("llama")), last, subfolder="checkpoint-5")
    one_line("is not that of the adapter that is loaded", project_adapter, chat, V, tmp_path / "a")


@pytest.mark.parametrize(
    "write", [project_adapter, lambda chat, v, out: ablation_adapter(chat, Ablate(v, **EVERYWHERE), out)]
)
def test_the_fine_tunes_own_folder_is_never_written_over(tmp_path, write):
    chat = tuned(tmp_path / "tuned")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()}
    for out in (tmp_path / "tuned", tmp_path):
        one_line(re.escape(f"{out}: holds the adapter itself"), write, chat, V, out)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()} == before


# --- weights that are not in memory ---------------------------------------------------------------------------------


NOT_HERE = r"^{}: is offloaded \(device meta\).*load the model whole.*--device cpu"


def test_a_model_with_a_block_on_disk_is_refused(tmp_path):
    network = without_biases("llama")
    placement = {f"model.{name}": "cpu" for name, _ in network.model.named_children() if name != "layers"}
    placement |= {f"model.layers.{n}": "disk" if n == 2 else "cpu" for n in range(LAYERS)} | {"lm_head": "cpu"}
    dispatch_model(network, placement, main_device="cpu", offload_dir=str(tmp_path / "disk"), force_hooks=True)
    words = NOT_HERE.format(r"model\.layers\.2\.self_attn\.o_proj\.weight")
    one_line(words, ablation_adapter, as_chat(network), Ablate(V, **EVERYWHERE), tmp_path / "a")
    assert not (tmp_path / "a").exists()


AWAY = {
    "embedding": ("llama", "model.embed_tokens", "model.embed_tokens.weight"),
    "bias": ("gpt2", "transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.c_proj.bias"),
    "gain": ("gemma2", f"model.layers.1.{POST[1]}", f"model.layers.1.{POST[1]}.weight"),
}


@pytest.mark.parametrize("name", AWAY)
def test_whatever_is_read_and_not_here_is_named(tmp_path, name):
    architecture, module, parameter = AWAY[name]
    chat = as_chat(without_biases(architecture))
    chat.model.get_submodule(module).to("meta")
    one_line(NOT_HERE.format(re.escape(parameter)), ablation_adapter, chat, Ablate(V, **EVERYWHERE), tmp_path / "a")


def test_packed_weights_that_are_not_here_are_named(tmp_path):
    chat = packed()
    chat.layers[2].mlp.down_proj.to("meta")
    words = NOT_HERE.format(r"model\.layers\.2\.mlp\.down_proj\.weight")
    one_line(words, ablation_adapter, chat, Ablate(V, **EVERYWHERE), tmp_path / "a")


@pytest.mark.parametrize(
    "write", [project_adapter, lambda chat, v, out: ablation_adapter(chat, Ablate(v, **EVERYWHERE), out)]
)
def test_a_fine_tune_that_is_not_here_is_named(tmp_path, write):
    chat = tuned(tmp_path / "tuned")
    chat.layers[1].self_attn.o_proj.lora_B.to("meta")
    one_line(NOT_HERE.format(r"model\.layers\.1\.self_attn\.o_proj\.lora_B"), write, chat, V, tmp_path / "a")


def test_a_fine_tune_alone_is_projected_though_its_base_is_not_here(tmp_path):
    chat = tuned(tmp_path / "tuned")
    chat.layers[1].self_attn.o_proj.base_layer.to("meta")
    assert project_adapter(chat, V, tmp_path / "a").modules == 2 * LAYERS
