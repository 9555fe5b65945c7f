"""Directions that raise the margin, against finite differences."""

import pytest
import torch
from lora_fixtures import with_adapter

from misdirection.data import ProbePair
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import ProjectAdapters
from misdirection.likelihood.margin import margin
from misdirection.lora.view import LoraView
from misdirection.models.budgets import BUDGETS
from misdirection.repairing.gradients import margin_directions
from tiny import sharpened

PAIRS = [ProbePair(f"p{n}", "Why?" * (n + 1), "Because.", "No, " + "never " * n) for n in range(3)]


def bumped(chat, name, vector):
    """Mean margin with a constant vector added to what one adapter gives, at every token."""
    handle = LoraView.of(chat).linear_sites[name].output.register_forward_hook(lambda _m, _a, out: out + vector)
    try:
        return float(margin(chat, PAIRS).mean())
    finally:
        handle.remove()


@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_no_direction_raises_the_margin_as_the_gradient_does(target):
    chat = with_adapter(chat=sharpened(), target_modules=[target], r=2)
    found = margin_directions(chat, PAIRS)
    assert set(found) == set(LoraView.of(chat).linear_sites)
    name = list(found)[1]
    before, size = float(margin(chat, PAIRS).mean()), 1e-3
    own = (bumped(chat, name, size * found[name]) - bumped(chat, name, -size * found[name])) / 2
    assert own > 1e-6
    for seed in range(3):
        other = torch.nn.functional.normalize(
            torch.randn(len(found[name]), generator=torch.Generator().manual_seed(seed)), dim=0
        )
        there = (bumped(chat, name, size * other) - before) / 1
        assert there == pytest.approx(own * float(other @ found[name]), abs=0.1 * own)


def test_taking_them_out_lowers_the_margin():
    chat = with_adapter(chat=sharpened(), strength=0.3, r=2)
    found = margin_directions(chat, PAIRS)
    bases = {name: one.unsqueeze(0) for name, one in found.items()}
    with chat.as_base():
        base = margin(chat, PAIRS).mean()
    shift = margin(chat, PAIRS).mean() - base
    # Only a part of what the adapter adds lies along it, whichever sign the whole shift has.
    parts = [float((one @ LoraView.of(chat).linear_sites[n].b).norm()) for n, one in found.items()]
    assert min(parts) > 1e-3
    with intervene(chat, [ProjectAdapters(bases, 0.05)]):
        assert (margin(chat, PAIRS).mean() - base - shift).abs() > 1e-6


def test_the_result_does_not_depend_on_the_batches(monkeypatch):
    chat = with_adapter(r=2)
    together, done = margin_directions(chat, PAIRS), []
    monkeypatch.setitem(BUDGETS, "backward", 1)
    alone = margin_directions(chat, PAIRS, done.append)
    assert sum(done) == 2 * len(PAIRS)
    for name, one in together.items():
        torch.testing.assert_close(one, alone[name], atol=1e-4, rtol=0)


def test_it_leaves_no_gradient_behind():
    chat = with_adapter(r=2)
    margin_directions(chat, PAIRS)
    assert all(parameter.grad is None for parameter in chat.model.parameters() if not parameter.requires_grad)
