"""The shared contrast on planted means, where everything about it is known."""

from itertools import product

import numpy as np
import pytest
import torch

from misdirection.directions.contrast import share
from misdirection.directions.shared_contrast import relabelled, shared_contrast
from misdirection.errors import InputError

LAYERS, WIDTH = 3, 400


def fine_tunes(domains, seeds, common, own=1.0):
    """Means of bad and good fine-tunes: noise, a part of the domain's own, and for bad ones a part that all share."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(LAYERS, WIDTH, generator=generator)
    bad, good = {}, {}
    for domain in "abcdef"[:domains]:
        subject = torch.randn(LAYERS, WIDTH, generator=generator)
        bad[domain] = [
            subject + common * planted + own * torch.randn(LAYERS, WIDTH, generator=generator) for _ in range(seeds)
        ]
        good[domain] = [subject + own * torch.randn(LAYERS, WIDTH, generator=generator) for _ in range(seeds)]
    return bad, good, planted


def plain_p(bad, good):
    """The permutation test, one relabelling after another."""
    (seeds,) = {len(each) for each in bad.values()}

    def statistic(chosen):
        contrasts = []
        for members, domain in zip(chosen, bad, strict=True):
            every = [*bad[domain], *good[domain]]
            sides = [[every[i] for i in range(2 * seeds) if (i in members) is side] for side in (True, False)]
            contrasts.append(torch.stack(sides[0]).mean(0) - torch.stack(sides[1]).mean(0))
        pairs = [(a, b) for i, a in enumerate(contrasts) for b in contrasts[i + 1 :]]
        return torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean(0)

    subsets = [{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}] if seeds == 2 else [{0}, {1}]
    every = torch.stack([statistic(chosen) for chosen in product(subsets, repeat=len(bad))])
    return every, (every >= every[0] - 1e-6).double().mean(0)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_permutation_test_is_the_plain_one(seeds):
    bad, good, _ = fine_tunes(3, seeds, common=0.1)
    shared = shared_contrast(bad, good)
    every, p = plain_p(bad, good)
    assert shared.relabellings == len(every) == (2 if seeds == 1 else 6) ** 3
    assert shared.mean == pytest.approx(every[0].tolist(), abs=1e-5)
    assert shared.relabelled == pytest.approx(every[1:].mean(0).tolist(), abs=1e-5)
    assert shared.p == pytest.approx(p.tolist())


def test_what_all_share_is_found_and_what_none_shares_is_not():
    bad, good, planted = fine_tunes(4, 2, common=1.0)
    shared = shared_contrast(bad, good)
    # Nothing but the true labels, and those that swap good and bad everywhere, reaches it.
    assert shared.p_all == pytest.approx(2 / 6**4)
    assert min(shared.mean) > max(shared.relabelled_95) > 0
    assert min(shared.variance[0]) > max(shared.variance_relabelled)
    contrasts = [torch.stack(bad[each]).mean(0) - torch.stack(good[each]).mean(0) for each in bad]
    assert torch.cosine_similarity(share(contrasts), planted.double(), dim=-1).min() > 0.85
    bad, good, _ = fine_tunes(4, 2, common=0.0)
    assert shared_contrast(bad, good).p_all > 0.05


def test_without_noise_domains_share_one_direction_as_seeds_do():
    shared = shared_contrast(*fine_tunes(3, 2, common=1.0, own=1e-4)[:2])
    for curve in (shared.mean, shared.single, shared.ceiling, shared.variance[0], shared.principal[0]):
        assert curve == pytest.approx([1.0] * LAYERS, abs=1e-3)
    assert np.sum(shared.variance, axis=0) == pytest.approx([1.0] * LAYERS)


def test_more_relabellings_than_can_be_counted_are_drawn():
    shared = shared_contrast(*fine_tunes(4, 3, common=1.0)[:2])
    assert shared.relabellings == 20_000
    assert shared.p_all < 0.001


def test_the_shared_part_favours_no_domain_and_is_as_long_as_they_reach_along_it():
    first, second = torch.zeros(1, 3), torch.zeros(1, 3)
    first[0, 0], second[0, 1] = 10.0, 2.0
    # Half way between both, though one is five times as long; they reach 10 and 2, times cos 45 degrees, along it.
    torch.testing.assert_close(share([first, second]), torch.tensor([[1.0, 1.0, 0.0]]).double() / 2**0.5 * 6 / 2**0.5)
    with pytest.raises(InputError, match="no contrast"):
        share([])


def test_domains_that_swap_good_and_bad_give_vectors_of_the_same_norm():
    generator = torch.Generator().manual_seed(1)
    contrasts = [torch.randn(LAYERS, WIDTH, generator=generator) for _ in range(3)]
    swapped = list(relabelled(contrasts))
    assert len(swapped) == 3
    for each in swapped:
        torch.testing.assert_close(each.norm(dim=-1), share(contrasts).norm(dim=-1))
    assert list(relabelled(contrasts[:1])) == []


@pytest.mark.parametrize("wrong", ["one domain", "unequal seeds", "other domains"])
def test_what_cannot_be_compared_is_refused(wrong):
    bad, good, _ = fine_tunes(3, 2, common=1.0)
    sides = {
        "one domain": ({"a": bad["a"]}, {"a": good["a"]}),
        "unequal seeds": (bad | {"a": bad["a"][:1]}, good),
        "other domains": (bad, {name: good[name] for name in "ab"}),
    }
    with pytest.raises(InputError, match="needs two domains"):
        shared_contrast(*sides[wrong])
