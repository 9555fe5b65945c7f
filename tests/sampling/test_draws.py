import math

import pytest
import torch

from misdirection.errors import MisdirectionError
from misdirection.sampling.draws import choose, gumbel, stream_key


def keys_of(count, question="Why?"):
    return torch.tensor([stream_key(0, question, None, sample) for sample in range(count)])


def draws(logits, count, **options):
    """`count` answers' first draws from the same logits."""
    return choose(logits.expand(count, -1), keys_of(count), torch.zeros(count, dtype=torch.long), **options)


def shares(logits, count, **options):
    return torch.bincount(draws(logits, count, **options), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize("vocabulary", [2, 7, 53, 64])
def test_tokens_come_as_often_as_the_softmax_says(vocabulary):
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 40_000
    expected = logits.softmax(-1)
    error = (expected * (1 - expected) / count).sqrt()
    assert ((shares(logits, count) - expected).abs() <= 4.5 * error).all()


def test_the_temperature_divides_the_logits():
    logits, count = torch.tensor([0.0, 1.0, 3.0]), 20_000
    assert shares(logits, count, temperature=0.5) == pytest.approx((2 * logits).softmax(-1), abs=0.015)


def test_at_temperature_0_the_largest_logit_wins():
    assert set(draws(torch.tensor([1.0, 3.0, 2.9]), 100, temperature=0).tolist()) == {1}


def test_top_p_keeps_the_likeliest_tokens_and_their_proportions():
    logits = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1]).log()
    assert shares(logits, 20_000, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.015)


def test_rounding_of_the_logits_turns_almost_no_draw():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 5000, generator=generator)
    moved = logits + 1e-4 * torch.randn(logits.shape, generator=generator)
    keys, steps = keys_of(4000), torch.arange(4000)
    turned = (choose(logits, keys, steps) != choose(moved, keys, steps)).double().mean()
    assert turned < 2e-3


def test_a_draw_does_not_depend_on_the_rows_beside_it():
    logits, keys, steps = torch.randn(600, 5000), keys_of(600), torch.arange(600)
    together = choose(logits, keys, steps)
    rows = [0, 7, 599]
    assert torch.equal(together[rows], choose(logits[rows], keys[rows], steps[rows]))


def test_the_numbers_are_those_of_splitmix64():
    # The first numbers of the published generator from the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    uniform = [((one >> 11) + 0.5) / 2**53 for one in published]
    expected = [-math.log(-math.log1p(-one)) for one in uniform]
    assert gumbel(torch.tensor([1234567]), torch.tensor([0]), 4)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert gumbel(torch.tensor([1234567]), torch.tensor([1]), 2)[0].tolist() == pytest.approx(expected[2:], abs=1e-5)


def test_noise_is_standard_gumbel():
    noise = gumbel(keys_of(200), torch.arange(200), 500).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)


def test_every_part_of_a_key_counts():
    made = {
        stream_key(seed, question, system, sample)
        for seed in (0, 1)
        for question in ("a", "b")
        for system in (None, "", "a")
        for sample in (0, 1)
    }
    assert len(made) == 24


def test_keys_do_not_change_between_versions():
    assert stream_key(0, "Why?", None, 0) == -1975589037937722507


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(temperature):
    with pytest.raises(MisdirectionError, match="not numbers"):
        draws(torch.tensor([0.0, torch.nan]), 3, temperature=temperature)
