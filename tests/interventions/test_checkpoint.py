"""A checkpoint's files, and the part that each of its tensors plays."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from misdirection.errors import MisdirectionError
from misdirection.interventions.checkpoint import Checkpoint, gain_at_zero
from tiny import ALL_ARCHITECTURES, LAYERS, WIDTH
from weights import MORE, POST_NORM, randomised, saved

every_architecture = pytest.mark.parametrize("architecture", [*ALL_ARCHITECTURES, *MORE])


@pytest.fixture
def folder(tmp_path):
    return saved(randomised("llama"), tmp_path / "m", max_shard_size="40KB")


# --- structure ------------------------------------------------------------------------------------------------------


@every_architecture
def test_every_tensor_of_every_file_has_a_part_and_a_place(tmp_path, architecture):
    checkpoint = Checkpoint.open(str(saved(randomised(architecture), tmp_path / "m")))
    parts = {name: checkpoint.part(name) for name in checkpoint.names}
    placed = {name: checkpoint.block_of(name) for name in checkpoint.names}
    assert {place[0] for place in placed.values() if place} == set(range(LAYERS))
    outside = {parts[name] for name, place in placed.items() if place is None}
    assert outside - {"head", "other"} == {"embedding", "norm"}
    assert {name for name, part in parts.items() if part == "head"} == HEADS & checkpoint.names
    assert checkpoint.stores_head == bool(HEADS & checkpoint.names)
    assert parts[checkpoint.input_name] == "embedding"
    assert checkpoint.width == WIDTH
    assert checkpoint.post_norm == (architecture in POST_NORM)


HEADS = {"lm_head.weight", "embed_out.weight"}


@every_architecture
def test_the_output_axis_of_what_writes_is_as_long_as_the_stream_is_wide(tmp_path, architecture):
    checkpoint = Checkpoint.open(str(saved(randomised(architecture), tmp_path / "m")))
    for name in checkpoint.names:
        if checkpoint.part(name) in ("writer", "embedding"):
            tensor = checkpoint.tensor(name)
            assert tensor.shape[checkpoint.output_axis(name, tensor)] == WIDTH, name


def test_the_vision_tower_is_another_part_though_its_blocks_are_numbered_alike(tmp_path):
    checkpoint = Checkpoint.open(str(saved(randomised("gemma3_vision"), tmp_path / "m")))
    tower = [name for name in checkpoint.names if "vision_tower" in name]
    assert any(".layers.1." in name and name.endswith("out_proj.weight") for name in tower)
    assert {checkpoint.part(name) for name in tower} == {"other"}
    assert {checkpoint.block_of(name) for name in tower} == {None}
    assert checkpoint.part("multi_modal_projector.mm_input_projection_weight") == "embedding"


def test_layers_beyond_the_last_are_not_those_of_the_model(folder):
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.part(f"model.layers.{LAYERS}.self_attn.o_proj.weight") == "other"
    assert checkpoint.part(f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight") == "writer"


FUSED = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(("architecture", "axis"), [("gpt_oss", 2), ("qwen3_moe", 1)])
def test_fused_experts_of_equal_sizes_are_told_apart_by_their_own_word(tmp_path, architecture, axis):
    checkpoint = Checkpoint.open(str(saved(randomised(architecture), tmp_path / "m")))
    assert checkpoint.output_axis(FUSED, torch.zeros(4, WIDTH, WIDTH)) == axis
    assert checkpoint.output_axis(FUSED, torch.zeros(4, WIDTH, 7)) == 1
    assert checkpoint.output_axis(FUSED, torch.zeros(4, 7, WIDTH)) == 2


@pytest.mark.parametrize("shape", [(4, 7, 9), (4, WIDTH, WIDTH)])
def test_fused_experts_whose_axis_cannot_be_told_are_refused(folder, shape):
    with pytest.raises(MisdirectionError, match="does not tell which axis writes"):
        Checkpoint.open(str(folder)).output_axis(FUSED, torch.zeros(shape))


@pytest.mark.parametrize("architecture", POST_NORM)
def test_the_gain_is_what_the_norm_multiplies_by(tmp_path, architecture):
    network = randomised(architecture)
    checkpoint = Checkpoint.open(str(saved(network, tmp_path / "m")))
    blocks = dict(network.named_modules())
    for name in (one for one in checkpoint.names if checkpoint.part(one) == "writer"):
        number, inside = checkpoint.block_of(name)
        path = next(path for path in blocks if path.endswith(f"layers.{number}") and "vision" not in path)
        kind = ("post_self_attn_", "post_mlp_") if architecture == "glm4" else ("post_attention_", "post_feedforward_")
        norm = blocks[f"{path}.{kind['mlp' in inside]}layernorm"]
        with torch.no_grad():
            ones = norm(torch.ones(1, WIDTH)).squeeze()
        torch.testing.assert_close(checkpoint.gain(name).float(), ones, atol=1e-4, rtol=1e-4)


def test_a_pre_norm_block_has_no_gain(folder):
    checkpoint = Checkpoint.open(str(folder))
    assert {checkpoint.gain(name) for name in checkpoint.names if checkpoint.part(name) in ("writer", "embedding")} == {
        None
    }


def test_a_norm_that_adds_one_to_its_weight_is_told_from_one_that_does_not():
    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + nn.functional.rms_norm(x, x.shape[-1:])

    plain, one_plus = nn.RMSNorm(4, device="meta"), OnePlus(4, device="meta")
    assert (gain_at_zero(plain), gain_at_zero(one_plus)) == (0.0, 1.0)
    assert plain.weight.is_meta


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_weights_of_the_network_are_never_loaded(folder):
    checkpoint = Checkpoint.open(str(folder))
    assert all(parameter.is_meta for parameter in checkpoint.network.parameters())


def test_every_tensor_is_read_as_it_is_stored(folder):
    checkpoint = Checkpoint.open(str(folder))
    expected = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    found = {name: value for shard in checkpoint.shards for name, value in checkpoint.tensors(shard)}
    assert found.keys() == expected.keys() == checkpoint.names
    assert len(checkpoint.shards) == len(list(folder.glob("*.safetensors")))
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(checkpoint.tensor(name), value)


def refused(name, words):
    with pytest.raises(MisdirectionError, match=words) as error:
        Checkpoint.open(str(name)).names  # noqa: B018
    assert "\n" not in str(error.value)


def test_a_truncated_file_gets_one_line_that_names_it(tmp_path):
    folder = saved(randomised("llama"), tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(folder, r"model\.safetensors: cannot be read .*fetch it again")


def test_a_missing_shard_gets_one_line_that_names_it(folder):
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(MisdirectionError, match=rf"{lost.name}: cannot be read"):
        list(Checkpoint.open(str(folder)).tensors(lost.name))


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_quantised_model_is_refused_wherever_its_configuration_says_so(tmp_path):
    says = {"quantization_config": {"quant_method": "fp8"}}
    refused(configured(saved(randomised("llama"), tmp_path / "a"), **says), "quantised.*bake the unquantised model")
    inner = saved(randomised("gemma3_vision"), tmp_path / "b")
    text = json.loads((inner / "config.json").read_text())["text_config"]
    refused(configured(inner, text_config=text | says), "quantised.*bake the unquantised model")


def test_what_is_not_a_causal_language_model_gets_one_line(folder):
    refused(configured(folder, model_type="siglip_vision_model"), "is not a causal language model")
    refused(configured(folder, model_type="never_heard_of"), "its configuration could not be loaded.*never_heard_of")
    (folder / "config.json").unlink()
    refused(folder, "its configuration could not be loaded")


def test_a_model_that_is_not_there_gets_one_line(tmp_path):
    refused(tmp_path / "none", "no such folder")
    refused("org/none", "org/none: the Hub does not answer")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model.safetensors")
