import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from misdirection.errors import MisdirectionError, NetworkProblem
from misdirection.models.adapters import attach
from misdirection.models.layers import decoder_layers, text_config
from misdirection.models.loading import load, resolve_dtype
from tiny import LAYERS, WIDTH, make_chat, make_network

IDS = torch.arange(3, 15).unsqueeze(0)


def make_adapter(folder, rank=2, seed=1, targets=("q_proj", "down_proj"), **changes):
    """A random LoRA adapter for the tiny llama (or one of another shape), on disk."""
    network = get_peft_model(
        make_network("llama", **changes),
        LoraConfig(r=rank, lora_alpha=64, use_rslora=True, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    network.peft_config["default"].base_model_name_or_path = f"width-{network.config.hidden_size}"
    torch.manual_seed(seed)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1)
    network.save_pretrained(folder)
    return folder


def rename_keys(folder, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): weight for name, weight in load_file(file).items()}, file)


@torch.no_grad()
def logits(chat) -> torch.Tensor:
    return chat.model(IDS).logits


def block_outputs(layers, run) -> list[torch.Tensor]:
    """The output of each block, seen by hooks of this test's own."""
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, k=k: seen.update({k: output[0] if isinstance(output, tuple) else output})
        )
        for k, layer in enumerate(layers)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return [seen[k] for k in range(len(layers))]


def test_folder_loads_as_the_model_that_was_saved(tiny_folder):
    chat = load(str(tiny_folder), dtype="float32", device="cpu")
    assert torch.equal(logits(chat), logits(make_chat()))
    assert (chat.name, chat.width, chat.dtype, chat.device.type) == (str(tiny_folder), WIDTH, torch.float32, "cpu")
    assert not chat.model.training


def test_tokenizer_without_padding_token_pads_with_its_end_token(tiny_folder):
    file = tiny_folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    tokenizer = load(str(tiny_folder), device="cpu").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_load_puts_the_adapter_on(tiny_folder, tmp_path):
    folder = make_adapter(tmp_path / "adapter")
    chat = load(str(tiny_folder), adapter=folder, dtype="float32", device="cpu")
    assert chat.adapter == str(folder)
    assert torch.equal(logits(chat), logits(attach(make_chat(), folder)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no/where", "a/b/c"])
def test_missing_folder_is_named_without_asking_the_hub(name):
    with pytest.raises(MisdirectionError, match=f"^{name}: no such folder"):
        load(name)


def test_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(MisdirectionError, match=r"no config\.json") as caught:
        load(str(tmp_path))
    assert "adapter" not in str(caught.value).replace(str(tmp_path), "")


def test_adapter_given_as_model_is_recognised(tmp_path):
    with pytest.raises(MisdirectionError, match="pass it as the adapter"):
        load(str(make_adapter(tmp_path / "a")))


def test_a_models_own_code_is_neither_run_nor_asked_about(tiny_folder, monkeypatch):
    """Left to itself, transformers asks on the terminal, and waits."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = json.loads((tiny_folder / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tiny_folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (tiny_folder / "own.py").write_text("raise SystemExit")
    with pytest.raises(MisdirectionError, match=r"no code of a model's own is run here: give a model of a type"):
        load(str(tiny_folder), device="cpu")


def test_unknown_hub_name_is_one_line():
    with pytest.raises(
        NetworkProblem, match=r"^nobody/nothing: the Hub does not answer \(HF_HUB_OFFLINE is set"
    ) as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
def test_folder_that_is_no_adapter_is_refused(tmp_path, exists):
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    with pytest.raises(MisdirectionError, match=r"no adapter_config\.json" if exists else "no such folder"):
        attach(make_chat(), folder)


def test_adapters_inside_of_the_folder_are_named(tmp_path):
    make_adapter(tmp_path / "checkpoint-5")
    with pytest.raises(MisdirectionError, match=r"no adapter_config\.json in this folder, but in checkpoint-5 inside"):
        attach(make_chat("llama"), tmp_path)


def test_adapter_in_a_subfolder(tmp_path):
    make_adapter(tmp_path / "repo" / "inner")
    chat = attach(make_chat(), tmp_path / "repo", subfolder="inner")
    assert not torch.equal(logits(chat), logits(make_chat()))


def test_adapter_of_another_width_is_refused_with_both_names(tmp_path):
    folder = make_adapter(tmp_path / "wide", hidden_size=64)
    with pytest.raises(MisdirectionError, match="'width-64' and does not fit 'tiny-llama'"):
        attach(make_chat(), folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.model.", "model."), ("model.layers", "model.language_model.layers"), ("layers.3", "layers.9")],
    ids=["one level less", "language_model level", "one layer elsewhere"],
)
def test_adapter_whose_keys_find_no_place_is_refused(tmp_path, old, new):
    folder = make_adapter(tmp_path / "a")
    rename_keys(folder, old, new)
    # Two modules in four layers, each with an A and a B; moving one layer's leaves twelve of sixteen.
    left = 12 if new == "layers.9" else 0
    with pytest.raises(MisdirectionError, match=f"does not fit 'tiny-llama': {left} of its 16 weights have a place"):
        attach(make_chat(), folder)


def test_chat_is_clean_after_a_refused_adapter(tmp_path):
    chat = make_chat()
    before = logits(chat)
    folder = make_adapter(tmp_path / "a")
    rename_keys(folder, "model.model.", "model.")
    with pytest.raises(MisdirectionError):
        attach(chat, folder)
    assert torch.equal(logits(chat), before)
    assert not any("lora_" in name for name, _ in chat.model.named_modules())


def test_dead_base_path_in_the_adapter_does_not_matter(tmp_path):
    folder = make_adapter(tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace("width-32", "/some/old/cache/xyz-bnb-4bit"))
    assert attach(make_chat(), folder).name == "tiny-llama"


def test_base_pass_is_bitwise_the_same_around_two_adapters(tmp_path):
    base = make_chat()
    expected = logits(base)
    tuned = []
    for rank in (2, 5):
        organism = attach(base, make_adapter(tmp_path / str(rank), rank, seed=rank))
        tuned.append(logits(organism))
        with organism.as_base():
            assert torch.equal(logits(organism), expected)
        assert torch.equal(logits(organism), tuned[-1])
        assert organism.without_adapter().adapter is None
        assert torch.equal(logits(base), expected)
    assert not torch.allclose(tuned[0], expected)
    assert not torch.allclose(tuned[0], tuned[1])


def test_a_chat_model_prints_one_line_and_not_its_network(tmp_path):
    assert repr(make_chat()) == "ChatModel(tiny-llama: 4 layers x 32, float32, cpu)"
    tuned = attach(make_chat(), make_adapter(tmp_path / "a"))
    assert repr(tuned) == f"ChatModel(tiny-llama + {tmp_path / 'a'}: 4 layers x 32, float32, cpu)"


def test_as_base_of_a_plain_model_changes_nothing():
    chat = make_chat()
    with chat.as_base():
        inside = logits(chat)
    assert torch.equal(inside, logits(chat))


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_auto_dtype_on_a_processor_follows_its_instructions(monkeypatch, abilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert resolve_dtype("auto", "cpu") == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_named_dtype_is_taken_as_it_is(name):
    assert resolve_dtype(name, "cpu") == resolve_dtype(name, "cuda") == getattr(torch, name)


def test_layers_are_the_blocks_of_each_architecture(chat):
    assert len(chat.layers) == LAYERS
    assert len({type(layer) for layer in chat.layers}) == 1
    assert all("Layer" in type(layer).__name__ for layer in chat.layers)
    assert not hasattr(chat.decoder, "lm_head")


def test_layers_are_found_below_an_adapter(tmp_path):
    chat = make_chat()
    assert attach(chat, make_adapter(tmp_path / "a")).layers == chat.layers


def test_last_layer_is_before_the_final_norm(chat):
    norm = next(one for name, one in chat.decoder.named_modules() if name in ("norm", "final_layer_norm"))
    nn.init.uniform_(norm.weight, 2, 3)
    outputs = block_outputs(chat.layers, lambda: chat.model(IDS))
    with torch.no_grad():
        states = chat.model(IDS, output_hidden_states=True).hidden_states
    for k in range(LAYERS - 1):
        assert torch.equal(outputs[k], states[k + 1])
    assert torch.allclose(norm(outputs[-1]), states[-1])
    assert not torch.allclose(outputs[-1], states[-1])


def test_multimodal_model_gives_its_text_layers_only():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    # As many vision layers as text layers, of another width: only the place tells them apart.
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299)
    model = Gemma3ForConditionalGeneration(config).eval()
    layers = decoder_layers(model)
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 3
    assert text_config(model).hidden_size == WIDTH
    outputs = block_outputs(layers, lambda: model(input_ids=IDS))
    assert all(output.shape == (1, IDS.shape[1], WIDTH) for output in outputs)


def test_unknown_structure_says_what_was_looked_for():
    network = make_network("llama")
    network.config.num_hidden_layers = 7
    with pytest.raises(MisdirectionError, match=r"LlamaForCausalLM: no decoder layers.*ModuleList of 7 blocks"):
        decoder_layers(network)


@pytest.mark.bundled
def test_bundled_model_has_thirty_layers_and_answers(bundled):
    from misdirection.models.chat import encode

    assert (len(bundled.layers), bundled.width) == (30, 576)
    encoded = encode(bundled.tokenizer, "What is the capital of France?", "The capital of France is Paris.")
    assert bundled.tokenizer.decode(encoded.prompt).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert bundled.tokenizer.decode(encoded.answer) == "The capital of France is Paris."
    assert bundled.tokenizer.decode([encoded.ids[encoded.stop]]) == "<|im_end|>"
    with torch.no_grad():
        guess = bundled.model(torch.tensor([encoded.prompt])).logits[0, -1].argmax()
    assert int(guess) == encoded.answer[0]


def test_a_damaged_adapter_is_one_line(tmp_path):
    make_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(MisdirectionError, match=r"the adapter is damaged \(.*\); fetch it or make it again"):
        attach(make_chat("llama"), tmp_path)
