"""The kernel distance against its expectation, against other implementations, and its errors against repetition."""

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torchmetrics.image.kid import poly_mmd

from stepdistill.errors import UserError
from stepdistill.metrics.kid import kid, kid_subsets


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_scores(results, truth):
    measured = torch.tensor([[result.debiased, result.se] for result in results], dtype=torch.float64)
    return (measured[:, 0] - truth) / measured[:, 1]


def third_moment(mean):
    """``E[x x x]`` of ``N(mean, I)``, ``(d, d, d)``."""
    eye = torch.eye(len(mean), dtype=mean.dtype)
    tensor = torch.einsum("a,b,c->abc", mean, mean, mean)
    return tensor + sum(torch.einsum(f"{index}->abc", eye, mean) for index in ("ab,c", "ac,b", "bc,a"))


def expected_kernel(one, two):
    """``E (1 + x . y / d)^3`` of independent ``x ~ N(one, I)`` and ``y ~ N(two, I)``, by their moments."""
    d = len(one)
    second = [torch.eye(d, dtype=mean.dtype) + torch.outer(mean, mean) for mean in (one, two)]
    cube = (third_moment(one) * third_moment(two)).sum()
    return 1 + 3 * (one @ two) / d + 3 * (second[0] * second[1]).sum() / d**2 + cube / d**3


@pytest.mark.parametrize("block", [3, 64, 1000])
def test_block_and_order_do_not_matter(block):
    a, b = random(90, 12), random(70, 12, seed=1) + 0.3
    whole, blocked = kid(a, b, block=4096), kid(a.flip(0), b.roll(5, 0), block=block)
    assert blocked.value == pytest.approx(whole.value, rel=1e-9)
    assert blocked.se == pytest.approx(whole.se, rel=1e-9)
    assert whole.n == 90


def test_two_points_a_side_give_the_value_by_hand():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [-1.0]])
    # Pairs within a: 0 . 1 -> 1; within b: (1 - 2)^3 = -1; between: 1, 1, 27, 0.
    assert kid(a, b).value == pytest.approx(1 - 1 - 2 * (1 + 1 + 27 + 0) / 4)


def test_the_distance_to_itself_is_minus_the_bias_that_the_unbiased_form_takes_off():
    a = random(40, 5)
    kernel = (a @ a.T / 5 + 1).pow(3)
    off = (kernel.sum() - kernel.trace()) / (40 * 39)
    assert kid(a, a).value == pytest.approx((2 * off - 2 * kernel.mean()).item(), rel=1e-10)


def test_all_pairs_agree_with_torchmetrics_and_torch_fidelity_in_float64():
    a, b = random(50, 16), random(50, 16, seed=1) * 1.2
    value = kid(a, b).value
    assert value == pytest.approx(poly_mmd(a, b).item(), rel=1e-11)
    one = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=50, verbose=False)
    assert value == pytest.approx(one[KEY_METRIC_KID_MEAN], rel=1e-11)


def test_subsets_are_those_of_torch_fidelity():
    a, b = random(300, 16), random(250, 16, seed=1) + 0.1
    theirs = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False)
    ours = kid_subsets(a, b, subsets=20, size=100)
    assert ours.value == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-11)
    assert np.std(ours.repeats) == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-10)
    assert ours.se is None
    assert kid_subsets(a, b, subsets=20, size=100, seed=1).value != ours.value


def test_subsets_are_those_of_clean_fid():
    a, b = random(300, 16).float(), random(250, 16, seed=1).float() + 0.1
    np.random.seed(3)  # noqa: NPY002
    theirs = kernel_distance(a.numpy(), b.numpy(), num_subsets=20, max_subset_size=100)
    # Their kernel and its sums are float32: values near 1, summed to a difference near 0.01.
    assert kid_subsets(b, a, subsets=20, size=100, seed=3).value == pytest.approx(theirs, abs=1e-6)


def test_float16_features_are_multiplied_in_float64():
    a, b = random(60, 8).half(), random(60, 8, seed=1).half()
    assert kid(a, b) == kid(a.double(), b.double())


def test_two_errors_cover_the_true_distance():
    d, n, repeats = 3, 50, 200
    shift = torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64)
    zero = torch.zeros(d, dtype=torch.float64)
    truth = expected_kernel(zero, zero) + expected_kernel(shift, shift) - 2 * expected_kernel(zero, shift)
    results = [kid(random(n, d, seed=2 * k), random(n, d, seed=2 * k + 1) + shift) for k in range(repeats)]
    z = z_scores(results, truth.item())
    # 190.9 of 200 expected, 4 standard deviations of the binomial below is 179.
    assert (z.abs() < 2).sum() >= 179
    assert 0.75 < z.std() < 1.2
    assert z.mean().abs() < 0.35


def test_the_error_is_the_square_root_of_two_too_large_for_one_law_on_both_sides():
    pairs = [kid(random(60, 4, seed=2 * k), random(60, 4, seed=2 * k + 1)) for k in range(300)]
    variance = torch.tensor([pair.se for pair in pairs]).square().mean()
    assert 1.5 < variance / torch.tensor([pair.value for pair in pairs]).var() < 2.6


def test_what_cannot_be_compared_is_refused():
    a = random(30, 4)
    with pytest.raises(UserError, match="4 dimensions against 3"):
        kid(a, a[:, :3])
    with pytest.raises(UserError, match="at least 2 reference features are needed, got 1"):
        kid(a, a[:1])
    with pytest.raises(UserError, match=r"must be \(N, d\), got shape \(30,\)"):
        kid(a[:, 0], a)
    with pytest.raises(UserError, match="at least 31 generated features are needed, got 30"):
        kid_subsets(a, a, size=31)
    with pytest.raises(UserError, match="at least 1 subset of 2 samples"):
        kid_subsets(a, a, subsets=0)
    broken = a.clone()
    broken[7, 2] = float("nan")
    with pytest.raises(UserError, match="generated features must be finite; 1 are not, first row 7"):
        kid(broken, a)
