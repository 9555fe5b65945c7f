"""Candidates: which components go, and what is done to the model."""

import pytest
import torch

from misdirection.interventions.kinds import Ablate, ScaleComponents
from misdirection.repair.candidates import Candidate, Material, basis, factors, setting

# Shift 1.0 and what was learned -1.0, both in shares: c carries most of the shift and nothing of the skill.
MATERIAL = Material(
    margin={"a": torch.tensor([0.3, 0.1]), "b": torch.tensor([0.6, 0.2, -0.2])},
    loss={"a": torch.tensor([-0.7, 0.0]), "b": torch.tensor([-0.1, -0.1, -0.1])},
    directions=torch.eye(3).repeat(2, 1, 1).double(),
)


def gone(candidate):
    return [
        name
        for name, factor in zip("abcde", torch.cat(list(factors(candidate, MATERIAL).values())), strict=True)
        if factor == 0
    ]


@pytest.mark.parametrize(
    ("share", "spare", "components"),
    [
        (0.0, 0.0, ""),
        (0.5, 0.0, "c"),
        (0.7, 0.0, "ac"),
        (1.0, 0.0, "acd"),
        (9.0, 0.0, "abcd"),
        (0.7, 1.0, "bc"),
        (9.0, 1.0, "bcd"),
    ],
)
def test_the_components_that_carry_most_go_first_and_those_of_the_skill_are_spared(share, spare, components):
    assert gone(Candidate(share=share, spare=spare)) == list(components)


def test_what_is_left_is_scaled():
    found = factors(Candidate(share=0.5, scale=0.5), MATERIAL)
    torch.testing.assert_close(torch.cat(list(found.values())), torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5]))
    assert [len(factor) for factor in found.values()] == [2, 3]


def test_nothing_goes_where_there_is_no_shift_and_nothing_is_spared_where_nothing_was_learned():
    flat = Material({"a": torch.tensor([-0.1, 0.05])}, {"a": torch.tensor([-1.0, 0.0])}, MATERIAL.directions)
    assert factors(Candidate(share=1.0), flat)["a"].all()
    worse = Material({"a": torch.tensor([0.1, 0.05])}, {"a": torch.tensor([1.0, 0.5])}, MATERIAL.directions)
    assert not factors(Candidate(share=9.0, spare=5.0), worse)["a"].any()


def test_a_candidate_as_interventions():
    assert setting(Candidate(), MATERIAL) == []
    (scaled,) = setting(Candidate(scale=0.5), MATERIAL)
    assert isinstance(scaled, ScaleComponents)
    scaled, ablated = setting(Candidate(share=1, projection="writes", directions=2, layer=1, strength=0.3), MATERIAL)
    assert isinstance(ablated, Ablate)
    assert (ablated.at, ablated.positions, ablated.strength) == ("writes", "all", 0.3)
    torch.testing.assert_close(ablated.vector, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert setting(Candidate(projection="adapters"), MATERIAL)[0].at == "adapters"
    assert basis(Candidate(), MATERIAL) is None
