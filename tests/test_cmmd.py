"""CMMD against its formula, its closed forms, and its errors against repetition."""

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.metrics.cmmd import cmmd


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_scores(results, truth):
    measured = torch.tensor([[result.debiased, result.se] for result in results], dtype=torch.float64)
    return (measured[:, 0] - truth) / measured[:, 1]


def test_it_is_the_published_formula():
    a, b = random(40, 6) + 0.2, random(30, 6, seed=1) * 3
    one, two = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)

    def mean_kernel(x, y):
        return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * 10**2)).mean()

    expected = 1000 * (mean_kernel(one, one) + mean_kernel(two, two) - 2 * mean_kernel(one, two))
    own, n_a, n_b = (mean_kernel(one, one), mean_kernel(two, two)), 40, 30
    # Without the pairs of a sample with itself, where the kernel is 1.
    off = (own[0] * n_a - 1) / (n_a - 1) + (own[1] * n_b - 1) / (n_b - 1) - 2 * mean_kernel(one, two)
    assert cmmd(a, b).debiased == pytest.approx(1000 * off.item(), abs=1e-11)
    # The formula subtracts means near 1: 1e-16 of them is 1e-13 after the factor.
    assert cmmd(a, b).value == pytest.approx(expected.item(), abs=1e-11)


def test_opposite_points_give_the_value_by_hand():
    a = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    assert cmmd(a, -a).value == pytest.approx(2000 * -torch.tensor(-4 / 200, dtype=torch.float64).expm1().item())


def test_a_set_is_at_zero_from_itself():
    a = random(50, 8)
    assert cmmd(a, a).value == pytest.approx(0, abs=1e-13)


def test_length_order_and_block_do_not_matter():
    a, b = random(50, 8), random(45, 8, seed=1) + 0.5
    whole, other = cmmd(a, b), cmmd((a * 7).flip(0), b * torch.rand(45, 1) + b, block=8)
    assert other.value == pytest.approx(whole.value, rel=1e-9)
    assert other.debiased == pytest.approx(whole.debiased, rel=1e-9)
    assert other.se == pytest.approx(whole.se, rel=1e-9)


def test_two_errors_around_the_debiased_value_cover_the_truth():
    shift = torch.tensor([0.8, 0.0, 0.0, 0.0], dtype=torch.float64)
    # From samples of their own, so many that their error is an eighth of those tested.
    truth = cmmd(random(4000, 4, seed=10**6), random(4000, 4, seed=10**6 + 1) + shift)
    results = [cmmd(random(60, 4, seed=2 * k), random(60, 4, seed=2 * k + 1) + shift) for k in range(200)]
    z = z_scores(results, truth.debiased)
    assert (z.abs() < 2).sum() >= 179
    assert 0.75 < z.std() < 1.2


def test_a_feature_without_direction_is_refused():
    a = random(5, 3)
    a[3] = 0
    with pytest.raises(UserError, match="reference features must not be zero, row 3 is"):
        cmmd(random(5, 3), a)
