"""Norms of updates, and noise beside them, against whole matrices."""

import math
from dataclasses import replace

import pytest
import torch
from lora_fixtures import with_adapter

from misdirection.lora.components import inner, norm_of
from misdirection.lora.noise import OrthogonalNoise, orthogonal
from misdirection.lora.view import LoraView
from tiny import padded

# Rank 24 is above that of a key projection of the tiny model, which 16 numbers leave.
RANKS = [(1, ["down_proj"]), (4, ["q_proj", "down_proj"]), (24, ["k_proj"])]


def deltas(chat):
    """What the adapter adds to each module's weight, as PEFT itself makes it."""
    sites = LoraView.of(chat).linear_sites
    return {path: site.module.get_delta_weight(site.adapter).double() for path, site in sites.items()}


def logits(chat):
    with torch.inference_mode():
        ids, mask = padded(chat)
        return chat.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize(("rank", "targets"), RANKS)
def test_a_norm_is_the_whole_matrixs(rank, targets):
    chat = with_adapter(r=rank, target_modules=targets)
    modules, whole = LoraView.of(chat).modules, deltas(chat)
    for one in modules:
        assert one.norm == pytest.approx(float(whole[one.module].norm()), rel=1e-5)
    together = math.sqrt(sum(float(delta.square().sum()) for delta in whole.values()))
    assert norm_of(modules) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(("rank", "targets"), RANKS)
def test_noise_is_orthogonal_in_every_module_and_as_long_as_it_is_said_to_be(rank, targets):
    chat = with_adapter(r=rank, target_modules=targets)
    own = deltas(chat)
    with OrthogonalNoise(chat, 3).added(0.5):
        added = {path: delta - own[path] for path, delta in deltas(chat).items()}
    for path, noise in added.items():
        assert float(noise.norm() / own[path].norm()) == pytest.approx(0.5, rel=1e-4)
        assert abs(float((noise * own[path]).sum())) < 1e-4 * float(noise.norm() * own[path].norm())


def test_noise_belongs_to_its_seed_and_to_the_product_of_both_matrices_alone():
    (module, *_) = LoraView.of(with_adapter(r=2)).modules
    shared_otherwise = replace(module, a=8 * module.a, b=module.b / 8)
    first, same, other = (
        orthogonal(each, torch.Generator().manual_seed(seed))
        for each, seed in ((module, 0), (shared_otherwise, 0), (module, 1))
    )
    torch.testing.assert_close(same.b @ same.a, first.b @ first.a)
    assert abs(inner(first, other)) < 0.9 * first.norm * other.norm


def test_noise_of_no_size_changes_nothing_and_none_is_left_behind():
    chat = with_adapter(r=2)
    before, noise = logits(chat), OrthogonalNoise(chat, 0)
    with noise.added(0.0):
        torch.testing.assert_close(logits(chat), before, atol=1e-6, rtol=0)
    with pytest.raises(ZeroDivisionError), noise.added(1.0):
        assert (logits(chat) - before).abs().max() > 1e-3
        raise ZeroDivisionError
    assert torch.equal(logits(chat), before)
