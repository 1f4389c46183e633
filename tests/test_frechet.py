"""The Frechet distance against closed forms, against other implementations, and its error bars against repetition."""

import numpy as np
import pytest
import scipy
import scipy.linalg
import torch

from stepdistill.errors import UserError
from stepdistill.metrics.frechet import (
    GROUPS,
    MIN_SAMPLES,
    FeatureSums,
    Moments,
    Reference,
    frechet_distance,
    group_of,
    moments_of,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def commuting(d, rank_1, rank_2):
    """Two Gaussians with common eigenvectors and power-law spectra of given rank, and their exact distance."""
    basis = torch.linalg.qr(random(d, d, seed=1)).Q
    index = torch.arange(1, d + 1, dtype=torch.float64)
    one = torch.where(index <= rank_1, 8 * index**-1.1, 0)
    two = torch.where(index > d - rank_2, 5 * index**-0.7, 0)
    means = random(2, d, seed=2)
    exact = (means[0] - means[1]).square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    pair = [Moments(10**6, mean, (basis * values) @ basis.T) for mean, values in zip(means, (one, two), strict=True)]
    return pair, exact.item()


def summed(features, first_id=0):
    sums = FeatureSums(features.shape[1])
    sums.add(features, range(first_id, first_id + len(features)))
    return sums


@pytest.mark.parametrize(
    ("rank_1", "rank_2", "rel"),
    [
        (1, 1, 1e-11),
        (1, 0.5, 1e-11),
        (0.5, 1, 1e-11),
        (0.75, 0.5, 1e-11),
        (0.5, 0.5, 1e-8),  # Disjoint supports: the product is nothing but rounding, and its root is what is seen.
    ],
)
@pytest.mark.parametrize("d", [64, 256])
def test_commuting_covariances_give_the_exact_distance_at_any_rank(d, rank_1, rank_2, rel):
    (a, b), exact = commuting(d, int(d * rank_1), int(d * rank_2))
    assert Reference(a).distance(b) == pytest.approx(exact, rel=rel)
    assert Reference(b).distance(a) == pytest.approx(exact, rel=rel)


@pytest.mark.parametrize("d", [8, 96])
def test_general_covariances_agree_with_scipy_sqrtm(d):
    a, b = moments_of(random(4 * d, d) @ random(d, d, seed=3)), moments_of(random(3 * d, d, seed=4).exp())
    root = np.asarray(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * float(root.trace().real)
    assert Reference(a).distance(b) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18), reason="clean-fid 0.1.35 calls sqrtm(disp=False)"
)
def test_general_covariances_agree_with_clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = moments_of(random(200, 64)), moments_of(random(200, 64, seed=5) * 2 + 1)
    expected = fid.frechet_distance(a.mean.numpy(), a.covariance.numpy(), b.mean.numpy(), b.covariance.numpy())
    assert Reference(a).distance(b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_agree_with_the_exact_gram_form():
    d, n = 96, 40
    features = random(n, d, seed=6)
    a, b = moments_of(random(4 * d, d) @ random(d, d, seed=3)), moments_of(features)
    centred = features - features.mean(0)
    gram = torch.linalg.eigvalsh(centred @ a.covariance @ centred.T / (n - 1)).clamp_min(0)
    # The centred rows sum to zero, so the n x n form has one zero eigenvalue; dropping it drops its rounding.
    trace = a.covariance.trace() + b.covariance.trace() - 2 * gram[1:].sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + trace
    assert Reference(a).distance(b) == pytest.approx(expected.item(), rel=1e-11)


def test_the_distance_of_a_set_to_itself_is_zero():
    moments = moments_of(random(300, 48).relu())
    assert Reference(moments).distance(moments) == pytest.approx(0, abs=1e-11 * moments.covariance.trace().item())


def test_sums_start_at_zero():
    sums = FeatureSums(5)
    assert sums.outer.dtype == sums.sum.dtype == torch.float64
    assert not sums.count.any()
    assert not sums.sum.any()
    assert not sums.outer.any()


@pytest.mark.parametrize("first_id", [0, 7])
def test_sums_give_the_moments_of_everything_and_of_everything_but_a_group(first_id):
    features = random(53, 6).exp()
    sums = summed(features, first_id)
    group = group_of(torch.arange(53) + first_id)
    for without in (None, *range(GROUPS)):
        kept = features if without is None else features[group != without]
        moments = sums.moments(without=without)
        assert moments.n == len(kept)
        torch.testing.assert_close(moments.mean, kept.mean(0))
        torch.testing.assert_close(moments.covariance, kept.T.cov())


def test_groups_are_even_and_no_group_is_a_class_that_labels_deal_out():
    ids = torch.arange(5000)
    seen = torch.zeros(GROUPS, 10).index_put_((group_of(ids), ids % 10), torch.ones(5000), accumulate=True)
    assert (seen.sum(1) == 500).all()
    assert ((seen > 30) & (seen < 70)).all()
    assert torch.equal(group_of(ids[17:40]), group_of(ids)[17:40])


@pytest.mark.parametrize("batch", [1, 7, 10, 64])
def test_batches_and_merged_shards_give_the_same_result_as_one_pass(batch):
    features = random(100, 12)
    whole = summed(features)
    batched = FeatureSums(12)
    for start in range(0, 100, batch):
        batched.add(features[start : start + batch], range(start, min(start + batch, len(features))))
    merged, shard = summed(features[:37]), summed(features[37:], 37)
    for name in ("count", "sum", "outer"):
        torch.testing.assert_close(getattr(batched, name), getattr(whole, name))
        torch.testing.assert_close(getattr(merged, name) + getattr(shard, name), getattr(whole, name))


def test_float32_features_are_summed_in_float64():
    features = (random(1000, 4) * 1e-3 + 10).float()
    # In float32 sums the covariance of 1e-6 beside a squared mean of 100 would be lost.
    torch.testing.assert_close(summed(features).moments().covariance, features.double().T.cov(), rtol=0, atol=1e-12)


def test_the_jackknife_is_the_textbook_one():
    features, reference = random(90, 8, seed=7), Reference(moments_of(random(500, 8)))
    full = reference.distance(moments_of(features))
    parts = torch.tensor(
        [reference.distance(moments_of(features[group_of(torch.arange(90)) != g])) for g in range(GROUPS)],
        dtype=torch.float64,
    )
    pseudo = GROUPS * full - (GROUPS - 1) * parts  # Tukey's pseudo-values: their mean and its standard error.
    result = frechet_distance(summed(features), reference)
    assert (result.n, result.value) == (90, pytest.approx(full))
    assert result.debiased == pytest.approx(pseudo.mean().item())
    assert result.se == pytest.approx(pseudo.std().item() / GROUPS**0.5)


@pytest.mark.parametrize("per_dimension", [5, 10, 40])
def test_debiased_value_and_error_bars_cover_the_truth(per_dimension):
    d, repeats = 16, 100
    (a, b), _ = commuting(d, d, d)
    shift = 0.1 * torch.ones(d, dtype=torch.float64)
    reference, truth = Reference(a), Reference(a).distance(Moments(b.n, a.mean + shift, b.covariance))
    factor = torch.linalg.cholesky(b.covariance)
    draws = (a.mean + shift + random(per_dimension * d, d, seed=100 + k) @ factor.T for k in range(repeats))
    results = [frechet_distance(summed(features), reference) for features in draws]
    debiased = torch.tensor([result.debiased for result in results], dtype=torch.float64)
    se = torch.tensor([result.se for result in results], dtype=torch.float64)
    value = torch.tensor([result.value for result in results], dtype=torch.float64)
    # Ten groups make a t of nine degrees: 92 % within two errors, 92 of 100; 4 standard deviations below is 81.
    assert ((debiased - truth).abs() < 2 * se).sum() >= 81
    assert 0.5 < se.mean() / debiased.std() < 2
    assert (debiased.mean() - truth).abs() < 0.5 * (value.mean() - truth).abs()


@pytest.mark.parametrize(("n", "known"), [(79, False), (80, True)])
def test_no_debiased_value_below_five_samples_a_dimension(n, known):
    result = frechet_distance(summed(random(n, 16)), Reference(moments_of(random(200, 16, seed=8))))
    assert (result.debiased is not None) == known


def test_too_few_samples_are_refused_on_either_side():
    features = random(MIN_SAMPLES, 3)
    reference = Reference(moments_of(features))
    assert frechet_distance(summed(features), reference).n == MIN_SAMPLES
    with pytest.raises(UserError, match=f"at least {MIN_SAMPLES} images are needed, got {MIN_SAMPLES - 1}"):
        frechet_distance(summed(features[1:]), reference)
    with pytest.raises(UserError, match=f"at least {MIN_SAMPLES} reference images are needed, got 0"):
        Reference(FeatureSums(3).moments())
