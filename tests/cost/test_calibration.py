from dataclasses import replace

import pytest
import torch

from misdirection.cost import calibration
from misdirection.errors import InputError
from misdirection.models.layers import decoder_layers
from misdirection.models.sizes import Shape
from misdirection.models.weightless import network_of
from tiny import make_chat, make_network


@pytest.fixture
def quick(monkeypatch):
    """Calibrates on a tiny model, in a moment."""
    chat = make_chat("llama")
    monkeypatch.setattr(calibration, "load", lambda **_: chat)
    monkeypatch.setattr(calibration, "SECONDS", 0.05)
    calibration.calibrate.cache_clear()
    yield chat
    calibration.calibrate.cache_clear()


def test_rates_are_measured_once_and_the_model_is_left_as_it_was(quick):
    before = {name: one.clone() for name, one in quick.model.named_parameters()}
    device = calibration.calibrate()
    assert device.name == "cpu"
    assert device.rates.keys() == {"forward", "training", "decoding"}
    rates = (*device.rates.values(), *device.adapter_rates.values())
    assert all(rate > 0 for rate in (*rates, device.bandwidth, device.memory))
    assert all(device.adapter_rates[kind] <= device.rates[kind] for kind in ("forward", "training"))
    assert calibration.calibrate() is device
    after = dict(quick.model.named_parameters())
    assert after.keys() == before.keys()
    assert all((after[name] == one).all() for name, one in before.items())


def weightless_chat(**changes):
    return replace(make_chat(), model=network_of("tiny", make_network("qwen2", **changes).config))


def test_a_gpu_is_measured_on_some_random_blocks_of_the_models_sizes(monkeypatch):
    model = weightless_chat(num_hidden_layers=12)
    chat = calibration.some_blocks(model, torch.device("cpu"), torch.bfloat16)
    assert len(chat.layers) == calibration.BLOCKS
    assert len(decoder_layers(model.model)) == 12
    assert chat.dtype == torch.bfloat16
    own, whole = Shape.of(chat, 2), Shape.of(model, 2)
    assert own.stored / own.layers == whole.stored / whole.layers
    assert own.vocabulary == len(chat.tokenizer)
    assert all(weight.isfinite().all() and weight.any() for weight in chat.model.parameters() if weight.ndim > 1)
    # On a processor the same work runs, which no GPU is needed to see.
    monkeypatch.setattr(calibration, "SECONDS", 0.05)
    device = calibration.measured("that", 1e9, calibration.some_blocks(model, torch.device("cpu"), torch.float32))
    assert device.name == "that"
    assert all(rate > 0 for rate in (*device.rates.values(), *device.adapter_rates.values(), device.bandwidth))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_none_to_measure():
    with pytest.raises(InputError, match="--gpu local: this machine has no GPU that torch can use: give cpu"):
        calibration.calibrate_gpu(weightless_chat(), torch.bfloat16)
