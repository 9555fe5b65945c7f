"""Drift along directions, with planted drifts."""

import pytest
import torch

from misdirection.auditing.drift import drifts, middle, model_difference
from misdirection.auditing.measurements import Measurements

LAYERS, WIDTH, PAIRS = 5, 64, 6
LAYER = middle(LAYERS)


def unit(axis):
    vector = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
    vector[:, axis] = 1
    return vector


def measured(moved=0.0, neutral=0.0, axis=0, seed=0):
    """A base of noise, moved along one axis at every layer; the second answer of a pair twice as far as the first."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randn(PAIRS, 2, LAYERS, WIDTH, generator=generator)
    texts = torch.randn(4, LAYERS, WIDTH, generator=generator)
    answers[..., axis] += moved * torch.tensor([2 / 3, 4 / 3]).view(1, 2, 1)
    texts[..., axis] += neutral
    return Measurements(torch.zeros(PAIRS, 2), torch.zeros(4), answers, texts)


def test_a_planted_drift_is_found_along_its_direction_and_not_along_another():
    directions = {"own": 7 * unit(0), "other": unit(1)}
    own, other = drifts(measured(3.0, 1.0), measured(), directions, {"bad": measured(5.0)})
    assert own.layer == LAYER == 2
    assert own.general.mean == pytest.approx(3, abs=1e-5)
    assert own.general.n == PAIRS
    assert own.neutral.mean == pytest.approx(1, abs=1e-5)
    assert own.known["bad"].mean == pytest.approx(5, abs=1e-5)
    assert other.general.mean == pytest.approx(0, abs=1e-5)
    # A random direction of 64 has a component of one eighth, and twice that in one of twenty.
    assert 0.5 < own.random_95 < 1.1


def test_a_drift_that_the_control_shares_is_nothing_beyond_it():
    difference = model_difference(measured(3.0), measured(), {"style": unit(0), "other": unit(1)}, measured(2.0))
    style = difference.directions["style"]
    assert style.cosines[LAYER] == pytest.approx(1, abs=1e-5)
    assert style.control[LAYER] == pytest.approx(1, abs=1e-5)
    assert abs(style.beyond_control[LAYER]) < 1e-3
    assert difference.norms[LAYER] == pytest.approx(3, abs=1e-5)
    assert 0.15 < difference.random_95 < 0.35


def test_without_a_control_nothing_is_said_beyond_it():
    difference = model_difference(measured(3.0), measured(), {"own": unit(0)}, None)
    assert difference.directions["own"].control is None
    assert difference.directions["own"].beyond_control is None
