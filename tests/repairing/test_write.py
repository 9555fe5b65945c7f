"""Repaired adapters and whole models as they are written."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from misdirection.errors import InputError
from misdirection.models.adapters import ADAPTER_WEIGHTS, attach
from misdirection.repairing.candidates import Candidate, Material
from misdirection.repairing.write import bake_weights, write_adapter
from tiny import WIDTH, make_chat, vector

KEY = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"


def adapter(folder, size, dtype=torch.float32, **settings):
    """A rank-2 adapter on the down projections, its B of this size."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["down_proj"], task_type="CAUSAL_LM", **settings)
    get_peft_model(make_chat().model, config).save_pretrained(folder)
    weights, generator = load_file(folder / ADAPTER_WEIGHTS), torch.Generator().manual_seed(2)
    for name, value in weights.items():
        if "lora_B" in name:
            weights[name] = size * torch.randn(value.shape, generator=generator)
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, folder / ADAPTER_WEIGHTS)
    return folder


def in_half():
    chat = make_chat()
    chat.model.bfloat16()
    return chat


@pytest.mark.filterwarnings("ignore")
def test_a_small_repair_of_an_adapter_in_half_precision_is_not_rounded_away(tmp_path):
    source, v = adapter(tmp_path / "in", 0.3, torch.bfloat16), vector(5)
    (tmp_path / "out").mkdir()
    material = Material({}, (0, 1, 2, 3), v.repeat(1, 4, 1))
    candidate = Candidate(projection="adapters", strength=0.01)
    write_adapter(attach(make_chat(), source), source, candidate, material, tmp_path / "out")
    before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (source, tmp_path / "out"))
    for layer in range(4):
        b = before[KEY.format(layer, "B")].float()
        exact = b - 0.01 * torch.outer(v, v @ b)
        torch.testing.assert_close(after[KEY.format(layer, "B")], exact, atol=1e-7, rtol=1e-6)
        assert torch.equal(after[KEY.format(layer, "A")], before[KEY.format(layer, "A")])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_base_in_half_precision_takes_the_adapter_rounded_once(tmp_path, settings):
    folder = adapter(tmp_path / "a", 0.3, **settings)
    weights, before = load_file(folder / ADAPTER_WEIGHTS), in_half().model.state_dict()
    rounding = bake_weights(in_half(), folder)
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    lost = change = 0.0
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        delta = weights[KEY.format(layer, "B")] @ weights[KEY.format(layer, "A")]
        exact = before[name].float() + delta
        torch.testing.assert_close(after[name], exact.bfloat16(), atol=0, rtol=2**-7)
        lost += float((after[name].float() - exact).square().sum())
        change += float(delta.square().sum())
    assert rounding.share == pytest.approx((lost / change) ** 0.5, rel=0.05)
    assert 0 < rounding.share < 0.1
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)
    }


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_a_base_in_half_precision_rounds_away_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", 1e-4)
    words = r"--bake: rounding .* loses \d\d+% of the change .*KL .*25% is the limit: repair without --bake"
    with pytest.raises(InputError, match=words):
        bake_weights(in_half(), folder)
    assert (folder / ADAPTER_WEIGHTS).is_file()


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_single_precision_loses_nothing(tmp_path):
    folder = adapter(tmp_path / "a", 1e-4)
    assert bake_weights(make_chat(), folder).share == 0
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == WIDTH
