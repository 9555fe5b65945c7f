"""The algebra of interventions, on plain tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from misdirection.errors import MisdirectionError
from misdirection.interventions.kinds import Ablate, Clamp, Steer
from misdirection.interventions.vectors import orthonormal

WIDTH = 16


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apply(x, *interventions, touched=None):
    """`x` after each intervention."""
    mask = torch.ones(*x.shape[:2], 1, dtype=torch.bool) if touched is None else touched
    for one in interventions:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = type(one).stack([one], 0).on(x.device, wide).apply(x, mask)
    return x


seeds = st.integers(0, 10**6)


@given(seed=seeds, rows=st.integers(1, 4), size=st.floats(1e-2, 1e3))
def test_ablation_is_idempotent_and_leaves_what_is_orthogonal(seed, rows, size):
    x, v, other = size * drawn(seed, rows, 3, WIDTH), drawn(seed + 1, WIDTH), drawn(seed + 2, WIDTH)
    once = apply(x, Ablate(v))
    assert (once @ normalize(v, dim=0)).abs().max() <= 1e-9 * size
    torch.testing.assert_close(apply(once, Ablate(v)), once)
    torch.testing.assert_close(apply(x, Ablate(-7 * v)), once)
    unit = normalize(v, dim=0)
    other = other - (other @ unit) * unit
    torch.testing.assert_close(once @ other, x @ other)


@given(seed=seeds, scale=st.floats(-50, 50))
def test_steering_by_a_scale_and_by_its_negative_is_nothing(seed, scale):
    x, v = drawn(seed, 2, 3, WIDTH), drawn(seed + 1, WIDTH)
    torch.testing.assert_close(apply(x, Steer(v, 0, scale), Steer(v, 0, -scale)), x)
    torch.testing.assert_close(apply(x, Steer(v, 0, scale)), x + scale * v)


@given(seed=seeds, scale=st.floats(-50, 50))
def test_norm_preserving_steering_turns_and_does_not_lengthen(seed, scale):
    x, v = drawn(seed, 2, 3, WIDTH), drawn(seed + 1, WIDTH)
    turned = apply(x, Steer(v, 0, scale, keep_norm=True))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    plain = x + scale * v
    torch.testing.assert_close(normalize(turned, dim=-1), normalize(plain, dim=-1), atol=1e-6, rtol=0)


@given(seed=seeds, count=st.integers(1, 5), strength=st.floats(0, 1))
def test_a_subspace_is_removed_whole_and_in_any_basis(seed, count, strength):
    x, vectors = drawn(seed, 2, 3, WIDTH), drawn(seed + 1, count, WIDTH)
    once = apply(x, Ablate(vectors))
    assert (once @ vectors.T).abs().max() < 1e-9
    mixed = drawn(seed + 2, count, count) + 10 * torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(apply(x, Ablate(mixed @ vectors)), once)
    torch.testing.assert_close(apply(x, Ablate(vectors, strength=strength)), x + strength * (once - x))


@given(seed=seeds)
def test_affine_ablation_leaves_the_component_of_the_mean(seed):
    x, v, mean = drawn(seed, 2, 3, WIDTH), drawn(seed + 1, WIDTH), drawn(seed + 2, WIDTH)
    unit = normalize(v, dim=0)
    moved = apply(x, Ablate(v, toward=mean))
    torch.testing.assert_close(moved @ unit, (mean @ unit).expand(2, 3))
    torch.testing.assert_close(moved, apply(x, Ablate(v)) + (mean @ unit) * unit)
    torch.testing.assert_close(apply(moved, Ablate(v, toward=mean)), moved)


@given(seed=seeds, low=st.floats(-2, 0), high=st.floats(0, 2))
def test_clamping_changes_only_what_is_out_of_bounds(seed, low, high):
    x, v = drawn(seed, 2, 3, WIDTH), drawn(seed + 1, WIDTH)
    unit = normalize(v, dim=0)
    clamped = apply(x, Clamp(v, low, high))
    torch.testing.assert_close(clamped @ unit, (x @ unit).clamp(low, high))
    torch.testing.assert_close(clamped - (clamped @ unit)[..., None] * unit, x - (x @ unit)[..., None] * unit)
    inside = ((x @ unit) >= low) & ((x @ unit) <= high)
    assert torch.equal(clamped[inside], x[inside])
    torch.testing.assert_close(apply(x, Clamp(v, low=high, high=high)) @ unit, torch.full((2, 3), high).double())
    torch.testing.assert_close(apply(x, Clamp(v, high=high)) @ unit, (x @ unit).clamp(max=high))


@given(seed=seeds)
def test_what_is_not_touched_stays_to_the_last_bit(seed):
    x, v = 1e4 * drawn(seed, 2, 3, WIDTH, dtype=torch.float32), drawn(seed + 1, WIDTH, dtype=torch.float32)
    touched = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    for one in (Steer(v, 0, 3.0), Steer(v, 0, 3.0, keep_norm=True), Ablate(v), Clamp(v, high=0.0)):
        changed = apply(x, one, touched=touched)
        rest = ~touched.squeeze(-1)
        assert torch.equal(changed[rest], x[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [lambda v: Steer(v, 0, 2.0), lambda v: Steer(v, 0, 2.0, keep_norm=True), Ablate, lambda v: Clamp(v, -0.1, 0.1)],
)
def test_low_precision_gives_the_float32_result_rounded_once(make, dtype):
    x = drawn(0, 2, 5, WIDTH).to(dtype)
    low, full = apply(x, make(drawn(1, WIDTH))), apply(x.float(), make(drawn(1, WIDTH)))
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), full, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@given(seed=seeds, count=st.integers(1, 6))
def test_an_orthonormal_basis_spans_the_same_and_keeps_a_single_vectors_sign(seed, count):
    vectors = drawn(seed, count, WIDTH)
    basis = orthonormal(vectors)
    torch.testing.assert_close(basis @ basis.T, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(vectors @ basis.T @ basis, vectors)
    torch.testing.assert_close(orthonormal(vectors[0])[0], normalize(vectors[0], dim=0))


def test_linearly_dependent_directions_are_refused():
    v = drawn(0, WIDTH)
    with pytest.raises(MisdirectionError, match="linearly dependent"):
        orthonormal(torch.stack([v, 2 * v]))


def test_many_interventions_in_one_operation_act_as_each_alone():
    x = drawn(0, 3, 4, WIDTH)
    everyone = torch.ones(3, 4, 1, dtype=torch.bool)
    ones = [Ablate(drawn(n, WIDTH), strength=n / 3, toward=drawn(n + 9, WIDTH) if n else None) for n in range(3)]
    together = Ablate.stack(ones, 0).on(x.device, x.dtype).apply(x, everyone)
    torch.testing.assert_close(together, torch.cat([apply(x[n : n + 1], one) for n, one in enumerate(ones)]))
