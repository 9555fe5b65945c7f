"""The commands that make an intervention permanent or take a direction elsewhere."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from misdirection.cli.shared import reference
from misdirection.data import domain_pairs, write_pairs
from misdirection.directions.direction import Direction
from misdirection.models.loading import load


@pytest.fixture
def directions(call, tiny_folder, tmp_path):
    """A folder of directions of the tiny model."""
    pairs = tmp_path / "pairs.jsonl"
    write_pairs(pairs, domain_pairs("risky_money", "held_out")[:4])
    call("extract", "--out", tmp_path / "directions", "--model", tiny_folder, "--pairs", pairs)
    return tmp_path / "directions"


def save_adapter(folder, chat):
    """A random LoRA fine-tune of a chat model."""
    network = get_peft_model(chat.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    network.save_pretrained(folder)
    return folder


def loaded(call, *words):
    status, out, err = call(*words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_weights_without_a_direction_load_like_any_model(call, tiny_folder, directions, tmp_path):
    file = directions / "data_difference.safetensors"
    found = loaded(call, "bake", file, "--layer", 1, "--out", tmp_path / "baked", "--model", tiny_folder)
    assert found["exact"] and found["after"] < 1e-6 < found["before"]
    chat = load(str(tmp_path / "baked"), dtype="float32", device="cpu")
    unit = torch.nn.functional.normalize(Direction.load(file)[1], dim=0)
    for block in chat.layers:
        assert (unit @ block.mlp.down_proj.weight).abs().max() < 1e-6


def test_one_adapter_over_the_model_and_the_fine_tunes_alone(call, tiny_folder, directions, tmp_path):
    chat = load(str(tiny_folder), dtype="float32", device="cpu")
    fine_tune = save_adapter(tmp_path / "fine-tune", chat)
    file = directions / "data_difference.safetensors"
    words = (
        "bake",
        file,
        "--layer",
        1,
        "--layer",
        2,
        "--model",
        tiny_folder,
        "--adapter",
        fine_tune,
        "--dtype",
        "float32",
    )
    for form in ("adapter", "adapter-only"):
        found = loaded(call, *words, "--form", form, "--out", tmp_path / form)
        assert found["modules"] > 0
        assert load_file(tmp_path / form / "adapter_model.safetensors")
        assert load(str(tiny_folder), adapter=tmp_path / form, dtype="float32", device="cpu").adapter


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".gguf", ".safetensors"])
def test_a_direction_goes_out_and_comes_back(call, tiny_folder, directions, tmp_path, suffix):
    file, there, back = (
        directions / "data_difference.safetensors",
        tmp_path / f"x{suffix}",
        tmp_path / "back.safetensors",
    )
    assert call("export", file, there)[0] == 0
    status, out, err = call("import", there, "--out", back, "--model", tiny_folder)
    assert status == 0, err
    assert "4 layers of width 32" in out
    assert torch.equal(Direction.load(back).vectors, Direction.load(file).vectors)


@pytest.fixture
def for_ablation(directions):
    """A direction file that says that it is for ablation."""
    direction = Direction.load(directions / "data_difference.safetensors")
    file = directions / "for_ablation.safetensors"
    replace(direction, origin=replace(direction.origin, operation="ablate")).save(file)
    return file


def test_a_direction_for_ablation_is_added_by_no_command_unless_asked(call, tiny_folder, for_ablation, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    measured = ("--layer", 1, "--model", tiny_folder, "--pairs", pairs, "--random-seeds", 1)
    sampled = ("sample", "--out", tmp_path / "a.csv", "--model", tiny_folder, "--direction", for_ablation, "--layer", 1)
    few = ("-n", 1, "--new-tokens", 1, "--questions", "first_plot")
    for words in (
        ("steer", for_ablation, *measured),
        (*sampled, *few, "--scale", 1),
        ("bake", for_ablation, "--layer", 1, "--scale", 2, "--out", tmp_path / "o", "--model", tiny_folder),
    ):
        status, _, err = call(*words)
        assert (status, "this direction is for ablation" in err) == (2, True), (words, err)
        assert "this direction is for ablation" not in call(*words, "--as-additive")[2]
    assert call("ablate", for_ablation, *measured)[0] == 0


def test_what_a_file_is_for_is_said_going_out_and_coming_in(call, tiny_folder, for_ablation, tmp_path):
    status, _, err = call("export", for_ablation, tmp_path / "x.npz")
    assert status == 0, err
    back = ("import", tmp_path / "x.npz", "--out", tmp_path / "back.safetensors", "--model", tiny_folder)
    status, out, _ = call(*back)
    assert status == 0 and "to ablate" in " ".join(out.split())
    assert call(*back, "--operation", "add")[0] == 0
    assert Direction.load(tmp_path / "back.safetensors").origin.operation == "add"


def test_a_control_vector_of_one_layer(call, directions, for_ablation, tmp_path):
    pytest.importorskip("gguf")
    status, _, err = call("export", for_ablation, tmp_path / "x.gguf")
    assert status == 2 and "--operation add" in err
    for words in ((for_ablation, "--operation", "add"), (directions / "data_difference.safetensors",)):
        status, out, _ = call("export", words[0], tmp_path / "x.gguf", *words[1:], "--layer", 2)
        assert status == 0 and "vectors of 1 layers" in " ".join(out.split())


def test_the_number_of_layers_is_read_from_a_model_on_this_disk(call, tiny_folder, tmp_path):
    table = tmp_path / "table.pt"
    torch.save(torch.randn(4, 32), table)
    assert call("import", table, "--out", tmp_path / "d.safetensors", "--model", tiny_folder)[0] == 0
    torch.save(torch.randn(5, 32), table)
    status, _, err = call("import", table, "--out", tmp_path / "d.safetensors", "--model", tiny_folder)
    assert status == 2
    assert "--first-row-is-embedding" in err


def test_what_cannot_be_baked_is_one_line(call, tiny_folder, directions, tmp_path):
    file = directions / "data_difference.safetensors"
    bake = ("bake", file, "--out", tmp_path / "o", "--model", tiny_folder)
    cases = [
        ((*bake, "--layer", 4), "layer 4 is out of range"),
        ((*bake, "--layer", 1, "--scale", 2), "has no bias"),
        ((*bake, "--layer", 1, "--layer", 1), "linearly dependent"),
        ((*bake, "--layer", 1, "--form", "adapter-only"), "give --adapter"),
        ((*bake, "--layer", 1, "--form", "adapter", "--scale", 2), "--scale: only --form weights"),
        ((*bake, "--layer", 1, "--adapter", "somewhere"), "--form adapter"),
        (("bake", file, "--layer", 1, "--out", tiny_folder, "--model", tiny_folder), "never written over"),
        (("bake", file, "--layer", 1, "--out", tmp_path / "o"), "was made for"),
        (("export", file, tmp_path / "x.txt"), "x.txt"),
        (("import", tmp_path / "none.npz", "--out", tmp_path / "d", "--model", tiny_folder), "none.npz"),
    ]
    for words, message in cases:
        status, _, err = call(*words)
        assert status == 2, words
        assert message in err, (words, err)
        assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("smollm2-135m", ("smollm2-135m", None, None)),
        ("org/name", ("org/name", None, None)),
        ("org/name@v1.2", ("org/name", "v1.2", None)),
        ("org/name:checkpoint-10", ("org/name", None, "checkpoint-10")),
        ("org/name@v1.2:a/b", ("org/name", "v1.2", "a/b")),
        ("./folder@odd:name", ("./folder@odd:name", None, None)),
    ],
)
def test_a_hub_reference_has_a_revision_and_a_subfolder(text, parts):
    assert reference(text) == parts
    assert str(reference(text)) == text


def test_a_path_with_odd_characters_is_a_path(tmp_path):
    folder = tmp_path / "a@b:c"
    folder.mkdir()
    assert reference(str(folder)) == (str(folder), None, None)
