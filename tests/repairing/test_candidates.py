"""Candidates as interventions."""

import pytest
import torch

from misdirection.interventions.kinds import Ablate, ProjectAdapters, ScaleAdapters
from misdirection.repairing.candidates import Candidate, Material

MATERIAL = Material(
    gradients={"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 0.6, 0.8])},
    layers=(1, 2),
    directions=torch.eye(3).repeat(2, 1, 1).double(),
)


def test_what_changes_nothing_is_no_intervention():
    assert Candidate().interventions(MATERIAL) == []
    assert Candidate().ablation(MATERIAL) is None


def test_a_candidate_turns_scales_and_projects_in_this_order():
    candidate = Candidate(turn=2.0, scale=0.5, projection="writes", directions=2, layer=1, strength=0.3)
    turned, scaled, ablated = candidate.interventions(MATERIAL)
    assert isinstance(turned, ProjectAdapters)
    assert turned.strength == 2.0
    torch.testing.assert_close(turned.bases["b"], torch.tensor([[0.0, 0.6, 0.8]]))
    assert isinstance(scaled, ScaleAdapters)
    assert scaled.factors == {1: 0.5, 2: 0.5}
    assert isinstance(ablated, Ablate)
    assert (ablated.at, ablated.positions, ablated.strength) == ("writes", "all", 0.3)
    torch.testing.assert_close(ablated.vector, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert Candidate(projection="adapters").ablation(MATERIAL).at == "adapters"


def test_random_material_has_the_same_norms_and_other_directions():
    random = MATERIAL.random()
    assert random.gradients.keys() == MATERIAL.gradients.keys()
    for name, gradient in random.gradients.items():
        assert gradient.norm() == pytest.approx(1.0, abs=1e-5)
        assert (gradient - MATERIAL.gradients[name]).norm() > 0.1
    torch.testing.assert_close(random.directions.norm(dim=-1), MATERIAL.directions.norm(dim=-1))
    assert not torch.equal(MATERIAL.random(1).gradients["b"], random.gradients["b"])
