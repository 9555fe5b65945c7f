"""Components of a LoRA, from its files and from a loaded model."""

import json
import math

import pytest
import torch
from lora_fixtures import with_adapter
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from misdirection.choices import BUNDLED
from misdirection.errors import MisdirectionError
from misdirection.lora.components import feature_names
from misdirection.lora.view import LoraView
from misdirection.models.adapters import recorded_base
from misdirection.models.bundled import hub_name
from misdirection.models.chat_model import ChatModel
from tiny import ALL_ARCHITECTURES, WIDTH, make_chat


@pytest.fixture
def folder(tmp_path):
    """Write a chat's adapter and give its folder."""

    def save(chat, **config):
        chat.model.save_pretrained(tmp_path / "adapter")
        if config:
            path = tmp_path / "adapter" / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return tmp_path / "adapter"

    return save


def one_line(words, function, *args):
    with pytest.raises(MisdirectionError, match=words) as error:
        function(*args)
    assert "\n" not in str(error.value)


def opened(folder):
    return LoraView.open(folder).modules


def live(chat):
    return LoraView.of(chat).modules


def equal(first, second):
    return [one.module for one in first] == [one.module for one in second] and all(
        torch.equal(a.a, b.a) and torch.equal(a.b, b.b) and a.scaling == b.scaling and a.layer == b.layer
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3", "gemma3_vision", "qwen2"])
def test_files_and_the_loaded_model_give_the_same(architecture, folder):
    chat = with_adapter(architecture, r=3)
    found = LoraView.open(folder(chat))
    assert equal(found.modules, LoraView.of(chat).modules)
    assert sorted({one.layer for one in found.modules}) == [0, 1, 2, 3]
    assert found.saved == ()


def test_patterns_give_each_module_its_own_rank_and_scaling(folder):
    targets = ["q_proj", "down_proj"]
    chat = with_adapter(
        r=2, target_modules=targets, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers.1.mlp.down_proj": 3}
    )
    modules = {one.module: one for one in LoraView.open(folder(chat)).modules}
    assert modules["model.layers.0.self_attn.q_proj"].rank == 4
    assert modules["model.layers.0.self_attn.q_proj"].scaling == 8 / math.sqrt(4)
    assert modules["model.layers.0.mlp.down_proj"].scaling == pytest.approx(8 / math.sqrt(2))
    assert modules["model.layers.1.mlp.down_proj"].scaling == pytest.approx(3 / math.sqrt(2))
    assert equal(tuple(modules.values()), LoraView.of(chat).modules)


def test_plain_lora_scales_by_rank(folder):
    chat = with_adapter(r=4, use_rslora=False)
    assert {one.scaling for one in LoraView.open(folder(chat)).modules} == {2.0}


@pytest.mark.parametrize(("rank", "alpha", "scaling"), [(32, 64, 64 / math.sqrt(32)), (1, 256, 256.0)])
def test_rslora_is_scaled_as_peft_scales_it(folder, rank, alpha, scaling):
    """At rank 1 both kinds of scaling agree, so that rank 1 alone would hide a wrong one."""
    chat = with_adapter(r=32, lora_alpha=64, rank_pattern={"down_proj": rank}, alpha_pattern={"down_proj": alpha})
    modules = LoraView.open(folder(chat)).modules
    assert [one.scaling for one in modules] == [pytest.approx(scaling)] * 4
    layers = LoraView.of(chat).linear_sites
    for one in modules:
        torch.testing.assert_close(one.scaling * one.b @ one.a, layers[one.module].module.get_delta_weight("default"))


# 16 numbers leave a key projection of the tiny model, so that rank 24 has 16 components.
@pytest.mark.parametrize(("rank", "targets"), [(1, ["down_proj"]), (4, ["down_proj"]), (24, ["k_proj", "q_proj"])])
def test_components_add_up_to_the_whole_update(rank, targets):
    for one in LoraView.of(with_adapter(r=rank, target_modules=targets)).modules:
        assert one.read.shape == (one.rank, one.a.shape[1]) and one.write.shape == (one.rank, len(one.b))
        assert one.rank == (16 if one.module.endswith("k_proj") else rank)
        whole = one.scaling * one.b @ one.a
        torch.testing.assert_close(one.write.T @ one.read, whole, atol=1e-5, rtol=1e-5)


def test_rank_one_is_the_papers_a_and_b():
    for one in LoraView.of(with_adapter()).modules:
        assert torch.equal(one.read, one.scaling * one.a) and torch.equal(one.write, one.b.T)


def test_above_rank_one_components_are_singular_vectors_in_order():
    for one in LoraView.of(with_adapter(r=4)).modules:
        sizes = torch.linalg.svdvals((one.scaling * one.b @ one.a).double())[:4]
        torch.testing.assert_close(one.read.norm(dim=1).double(), sizes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.write @ one.write.T, torch.eye(4), atol=1e-5, rtol=0)
        assert (one.write.gather(1, one.write.abs().argmax(1, keepdim=True)) > 0).all()


def test_what_was_trained_as_a_whole_is_named(folder):
    chat = with_adapter(modules_to_save=["lm_head"])
    found = LoraView.open(folder(chat, base_model_name_or_path="/old/cache/base-4bit"))
    assert found.saved == ("lm_head.weight",) and len(found.modules) == 4
    assert found.base == "/old/cache/base-4bit", "named, and not loaded"


def test_biases_and_single_tokens_are_named(folder):
    chat = with_adapter("gpt2", bias="all", fan_in_fan_out=True)
    assert "transformer.h.0.mlp.c_fc.bias" in LoraView.open(folder(chat)).saved
    chat = with_adapter(trainable_token_indices=[1, 2])
    (name,) = LoraView.open(folder(chat)).saved
    assert name.startswith("model.embed_tokens.")


def test_an_embedding_reads_tokens(folder):
    chat = with_adapter(r=2, target_modules=["embed_tokens", "down_proj"])
    found = LoraView.open(folder(chat))
    first = found.modules[0]
    assert (first.module, first.layer, first.rank) == ("model.embed_tokens", None, 2)
    assert found.saved == (), "the base's own embedding is in the file, but was not trained"
    weight = chat.model.get_input_embeddings()
    torch.testing.assert_close((first.write.T @ first.read).T, weight.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    assert list(feature_names([first]).values()) == [["model.embed_tokens.0", "model.embed_tokens.1"]]


def test_an_adapted_vision_tower_has_no_layers(folder):
    chat = with_adapter("gemma3_vision", target_modules=["q_proj"])
    found = LoraView.open(folder(chat)).modules
    assert equal(found, LoraView.of(chat).modules)
    assert {"vision_tower" in one.module for one in found if one.layer is None} == {True}
    assert sorted(one.layer for one in found if one.layer is not None) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora: DoRA rescales"),
        ({"peft_type": "IA3"}, "is no LoRA but IA3"),
        ({"peft_type": "VERA"}, "is no LoRA but VERA"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config: it is a variant"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config: it is a variant"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the base's own weights"),
        ({"lora_bias": True}, "lora_bias: its B has a bias"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "fused parameters"),
        ({"r": 7}, "has rank 1 in A and 1 in B, and adapter_config.json says 7"),
        ({"r": None}, "no usable r or rank_pattern"),
        ({"lora_alpha": "much"}, "no usable lora_alpha or alpha_pattern"),
        ({"alpha_pattern": {"(": 3}}, "no usable lora_alpha or alpha_pattern"),
        ({"alpha_pattern": [3]}, "no usable lora_alpha or alpha_pattern"),
    ],
)
def test_what_is_not_a_sum_of_components_is_refused(folder, config, words):
    one_line(words, opened, folder(with_adapter(), **config))


def change(folder, **changes):
    """Rewrite the weights of the first module: its parts by the end of their names; None takes one away."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    first = min(weights).partition(".lora_")[0]
    for part, value in changes.items():
        weights.pop(f"{first}.{part}.weight", None)
        if value is not None:
            weights[f"{first}.{part}.weight"] = value
    save_file(weights, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_B": None}, r"layers\.0\.mlp\.down_proj is no pair of matrices A and B \(\{'A': \[1, 64\]\}\)"),
        ({"lora_A": None}, "is no pair of matrices"),
        ({"lora_B": torch.ones(WIDTH, 1, 1)}, "is no pair of matrices"),
        ({"lora_B": torch.ones(WIDTH, 2)}, "has rank 1 in A and 2 in B"),
        ({"lora_B": torch.full((WIDTH, 1), torch.nan)}, "down_proj holds numbers that are not finite"),
        ({"lora_magnitude_vector": torch.ones(WIDTH)}, "down_proj.lora_magnitude_vector.weight is no part of a plain"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, changes, words):
    where = folder(with_adapter())
    change(where, **changes)
    one_line(words, opened, where)


def test_damaged_and_missing_files_are_refused(folder, tmp_path):
    where = folder(with_adapter())
    weights, config = where / "adapter_model.safetensors", where / "adapter_config.json"
    weights.write_bytes(b"no")
    one_line(r"adapter_model\.safetensors: cannot be read", opened, where)
    save_file({"base_model.model.lm_head.weight": torch.ones(2, 2)}, weights)
    one_line("holds no LoRA weights", opened, where)
    weights.rename(where / "adapter_model.bin")
    one_line("only a pickled adapter_model.bin", opened, where)
    (where / "adapter_model.bin").unlink()
    one_line(r"adapter_model\.safetensors: cannot be read", opened, where)
    config.write_text("[]")
    one_line(r"adapter_config\.json: damaged, no JSON object", opened, where)
    one_line(r"adapter_config\.json: cannot be read", opened, tmp_path / "nothing")


def merged(chat):
    chat.model.merge_adapter()
    return chat


def doubled(chat):
    chat.model.add_adapter("second", LoraConfig(r=1, target_modules=["down_proj"]))
    chat.model.base_model.set_adapter(["default", "second"])
    return chat


def with_ia3():
    chat = make_chat()
    network = get_peft_model(chat.model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    return ChatModel(network, chat.tokenizer, chat.name, adapter="in memory")


MOE = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_chat, "tiny-llama: has no LoRA adapter"),
        (with_ia3, "tiny-llama: has no LoRA adapter"),
        (lambda: merged(with_adapter()), "down_proj: its adapter is merged"),
        (lambda: doubled(with_adapter()), "2 adapters are active"),
        (lambda: with_adapter(use_dora=True), "use_dora: DoRA"),
        (lambda: with_adapter(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (lambda: with_adapter(lora_bias=True), "lora_bias: its B has a bias"),
        (lambda: with_adapter(init_lora_weights="pissa"), "pissa changes the base's own weights"),
        (lambda: with_adapter(init_lora_weights="mica"), r"is not plain LoRA \(MiCA"),
        (lambda: with_adapter("qwen3_moe", **MOE), "target_parameters: it adapts fused parameters"),
        (lambda: with_adapter(target_modules=["embed_tokens"]), r"embed_tokens: is not a plain LoRA .* \(Embedding\)"),
    ],
)
def test_live_models_that_cannot_be_read_are_refused(make, words):
    one_line(words, live, make())


def test_a_second_idle_adapter_is_not_read():
    chat = with_adapter()
    alone = LoraView.of(chat).modules
    chat.model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj", "up_proj"]))
    assert equal(LoraView.of(chat).modules, alone)


def test_more_than_the_matrices_and_modules_that_add_nothing_are_named(folder):
    chat = with_adapter(modules_to_save=["lm_head"], bias="all")
    with torch.no_grad():
        chat.layers[2].mlp.down_proj.lora_B["default"].weight.zero_()
    for view in (LoraView.open(folder(chat)), LoraView.of(chat)):
        assert view.beside == ["modules_to_save", "bias"]
        assert view.dead == ["model.layers.2.mlp.down_proj"]
        assert (len(view.adapted), view.layers) == (4, [0, 1, 3])
        assert "model.layers.2.mlp.down_proj" not in {module.module for module in view.modules}


def test_of_an_adapter_that_adds_nothing_nothing_is_read(folder):
    chat = with_adapter(strength=0.0)
    for view in (LoraView.open(folder(chat)), LoraView.of(chat)):
        assert len(view.dead) == len(view.adapted) == 4
        one_line("all of its B are zero", lambda view=view: view.modules)


def test_an_adapter_of_the_bundled_model_names_the_hub_and_is_read_as_the_bundled_ones(folder):
    where = folder(with_adapter(), base_model_name_or_path=hub_name(BUNDLED))
    assert hub_name(BUNDLED) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert LoraView.open(where).base == recorded_base(where) == BUNDLED


def test_features_are_named_as_shortly_as_is_clear():
    nine = LoraView.of(with_adapter()).modules
    assert list(feature_names(nine).values()) == [[f"layer_{layer}"] for layer in range(4)]
    two = LoraView.of(with_adapter(target_modules=["down_proj", "o_proj"], layers_to_transform=[2])).modules
    assert list(feature_names(two).values()) == [["layer_2.down_proj"], ["layer_2.o_proj"]]
    deep = LoraView.of(with_adapter(r=4, layers_to_transform=[1])).modules
    assert list(feature_names(deep).values()) == [[f"layer_1.down_proj.{number}" for number in range(4)]]
    assert list(feature_names(deep, top=2).values()) == [["layer_1.down_proj.0", "layer_1.down_proj.1"]]
    assert list(feature_names(deep, top=1).values()) == [["layer_1"]]
    alike = LoraView.of(with_adapter("gpt2", target_modules=["c_proj", "c_fc"], layers_to_transform=[1])).modules
    assert [name for (name,) in feature_names(alike).values()] == [
        "layer_1.attn.c_proj", "layer_1.c_fc", "layer_1.mlp.c_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_layers_are_found_by_structure_and_in_files_by_path(architecture, folder):
    # The experts of a mixture are one parameter, which "all-linear" would adapt too.
    targets = ["q_proj", "o_proj"] if architecture in ("mixtral", "qwen3_moe") else "all-linear"
    chat = with_adapter(architecture, target_modules=targets)
    found = LoraView.of(chat).modules
    blocks = {id(part): number for number, block in enumerate(chat.layers) for part in block.modules()}
    modules = dict(chat.model.get_base_model().named_modules())
    assert all(one.layer == blocks.get(id(modules[one.module])) for one in found)
    assert {one.layer for one in found} >= {0, 1, 2, 3}
    assert equal(LoraView.open(folder(chat)).modules, found)
    names = [name for names in feature_names(found).values() for name in names]
    assert len(set(names)) == len(names)
