"""Influence on the Frechet distance against its derivative, and paired differences against repetition."""

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.metrics.frechet import FeatureSums, Moments, Reference, frechet_distance, moments_of
from stepdistill.metrics.influence import (
    frechet_influence,
    frechet_with_influence,
    paired_difference,
    paired_mean_difference,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_scores(results, truth):
    measured = torch.tensor([[result.debiased, result.se] for result in results], dtype=torch.float64)
    return (measured[:, 0] - truth) / measured[:, 1]


def gaussian(mean, scale, d=6):
    """Moments of ``N(mean, diag(scale^2))``."""
    eye = torch.eye(d, dtype=torch.float64)
    return Moments(10**6, torch.full((d,), mean, dtype=torch.float64), eye * scale**2)


def test_influence_is_the_derivative_of_the_distance_by_the_weight_of_a_sample():
    features, reference = random(60, 5).exp(), Reference(moments_of(random(200, 5) @ random(5, 5, seed=1)))
    psi = frechet_influence(features, reference)

    def distance(k, added):
        weights = torch.ones(60, dtype=torch.float64)
        weights[k] += added
        weights /= weights.sum()
        mean = weights @ features
        centred = features - mean
        return reference.distance(Moments(60, mean, centred.T @ (weights[:, None] * centred)))

    derivative = torch.tensor([60 * (distance(k, 1e-4) - distance(k, -1e-4)) / 2e-4 for k in range(60)])
    # The covariance of the library divides by 59, the weighted one by 60.
    torch.testing.assert_close(psi, derivative.double(), rtol=0.05, atol=0.05 * psi.std().item())
    assert psi.mean().item() == pytest.approx(0, abs=1e-12 * psi.abs().max().item())


def test_transport_carries_one_gaussian_to_the_other():
    a, b = moments_of(random(90, 7).exp()), moments_of(random(80, 7, seed=1))
    transport = Reference(a).transport(b)
    torch.testing.assert_close(transport @ b.covariance @ transport, a.covariance)
    torch.testing.assert_close(transport, transport.T)
    deficient = moments_of(random(5, 7, seed=2))
    assert Reference(a).transport(deficient).isfinite().all()


@pytest.mark.parametrize("block", [1, 17])
def test_order_and_block_do_not_matter(block):
    features, reference = random(90, 6), Reference(gaussian(0.3, 1.2))
    psi = frechet_influence(features, reference)
    torch.testing.assert_close(
        frechet_influence(features.flip(0), reference, block=block).flip(0), psi, rtol=1e-9, atol=1e-9
    )


def test_the_error_agrees_with_the_jackknife_and_the_value_with_the_distance():
    reference = Reference(gaussian(0.4, 1.3))
    pairs = []
    for k in range(40):
        features = random(400, 6, seed=k)
        sums = FeatureSums(6)
        sums.add(features, range(len(features)))
        jackknife, influence = frechet_distance(sums, reference), frechet_with_influence(features, reference)
        assert (influence.value, influence.debiased, influence.n) == (jackknife.value, jackknife.debiased, 400)
        pairs.append((influence.se, jackknife.se))
    error, jackknife = torch.tensor(pairs).square().mean(0).sqrt()
    assert 0.85 < error / jackknife < 1.15


@pytest.mark.parametrize("per_dimension", [5, 20, 60])
def test_debiased_value_is_within_two_errors_of_the_truth(per_dimension):
    reference, truth = Reference(gaussian(0.4, 1.3)), Reference(gaussian(0.4, 1.3)).distance(gaussian(0.0, 1.0))
    draws = [random(6 * per_dimension, 6, seed=k) for k in range(120)]
    results = [frechet_with_influence(features, reference) for features in draws]
    z = z_scores(results, truth)
    assert (z.abs() < 2).sum() >= 105  # 114.5 expected, less 4 standard deviations of the binomial.


def twins(seed, n=300):
    """Two runs on common seeds: the second a little wider, and shifted."""
    noise = random(n, 6, seed=seed)
    return noise, noise * 1.05 + 0.02 + 0.02 * random(n, 6, seed=seed + 10**6)


def test_a_paired_difference_is_that_of_distances_over_the_same_divisor():
    generator = torch.Generator().manual_seed(0)
    a, b, real = (torch.randn(30, 4, generator=generator) * scale for scale in (1, 1.3, 1.1))
    reference = Reference(moments_of(real))

    def distance(features, ddof):
        sums = FeatureSums(4)
        sums.add(features, range(30))
        return frechet_distance(sums, reference, ddof=ddof).value

    for ddof in (0, 1):
        expected = distance(a, ddof) - distance(b, ddof)
        assert paired_difference(a, b, reference, ddof=ddof).value == pytest.approx(expected, rel=1e-12)
    assert paired_difference(a, b, reference, ddof=0).value != pytest.approx(expected, rel=1e-3)


def test_two_errors_of_a_paired_difference_cover_the_truth_and_are_far_smaller_than_unpaired_ones():
    reference = Reference(gaussian(0.4, 1.3))
    wider = gaussian(0.02, (1.05**2 + 0.02**2) ** 0.5)
    truth = reference.distance(gaussian(0.0, 1.0)) - reference.distance(wider)
    results = [paired_difference(*twins(k), reference) for k in range(80)]
    z = z_scores(results, truth)
    assert (z.abs() < 2).sum() >= 68  # 76.4 expected, less 4 standard deviations of the binomial.
    assert 0.7 < z.std() < 1.25
    a, b = twins(0)
    unpaired = torch.tensor([frechet_with_influence(run, reference).se for run in (a, b)]).norm()
    assert torch.tensor(results[0].se) < 0.2 * unpaired


def test_a_run_does_not_differ_from_itself_and_differs_as_much_the_other_way():
    a, b = twins(0, n=40)
    reference = Reference(gaussian(0.4, 1.3))
    same = paired_difference(a, a, reference)
    assert (same.value, same.se, same.debiased) == (0, 0, 0)
    one, two = paired_difference(a, b, reference), paired_difference(b, a, reference)
    assert (one.value, one.se) == (-two.value, two.se)
    assert paired_difference(a[:29], b[:29], reference).debiased is None


def test_scores_of_single_samples_are_compared_in_pairs():
    a, b = torch.tensor([0.31, 0.25, 0.28]), torch.tensor([0.30, 0.26, 0.24])
    result = paired_mean_difference(a, b)
    assert result.value == pytest.approx(0.04 / 3, rel=1e-6)
    assert result.se == pytest.approx((a - b).std().item() / 3**0.5, rel=1e-6)
    assert result.n == 3


def test_runs_on_other_ids_or_networks_are_refused():
    a, reference = random(30, 6), Reference(gaussian(0.0, 1.0))
    with pytest.raises(UserError, match="keep the common ids of both"):
        paired_difference(a, a[1:], reference)
    with pytest.raises(UserError, match="keep the common ids of both"):
        paired_mean_difference(a[:, 0], a[1:, 0])
    with pytest.raises(UserError, match="5 dimensions against 6"):
        frechet_influence(a[:, :5], reference)
    with pytest.raises(UserError, match="at least 20 features are needed, got 19"):
        paired_difference(a[:19], a[:19], reference)
