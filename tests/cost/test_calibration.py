import pytest

from misdirection.cost import calibration
from tiny import make_chat


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
