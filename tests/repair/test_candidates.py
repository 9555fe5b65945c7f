"""Candidates as interventions."""

import torch

from misdirection.interventions.kinds import Ablate, ProjectAdapters, ScaleAdapters
from misdirection.repair.candidates import Candidate, Material, basis, setting

MATERIAL = Material(
    gradients={"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 0.6, 0.8])},
    layers=(1, 2),
    directions=torch.eye(3).repeat(2, 1, 1).double(),
)


def test_what_changes_nothing_is_no_intervention():
    assert setting(Candidate(), MATERIAL) == []
    assert basis(Candidate(), MATERIAL) is None


def test_a_candidate_turns_scales_and_projects_in_this_order():
    turned, scaled, ablated = setting(
        Candidate(turn=2.0, scale=0.5, projection="writes", directions=2, layer=1, strength=0.3), MATERIAL
    )
    assert isinstance(turned, ProjectAdapters)
    assert turned.strength == 2.0
    torch.testing.assert_close(turned.bases["b"], torch.tensor([[0.0, 0.6, 0.8]]))
    assert isinstance(scaled, ScaleAdapters)
    assert scaled.factors == {1: 0.5, 2: 0.5}
    assert isinstance(ablated, Ablate)
    assert (ablated.at, ablated.positions, ablated.strength) == ("writes", "all", 0.3)
    torch.testing.assert_close(ablated.vector, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert setting(Candidate(projection="adapters"), MATERIAL)[0].at == "adapters"
