"""How far each sample pulls a Frechet distance: its error, and that of the difference of two runs on common seeds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from .base import Value
from .feature_sets import check_comparable, check_features
from .frechet import FeatureSums, FrechetDistance, Reference, frechet_distance, moments_of
from .jackknife import MIN_SAMPLES


def frechet_influence(features: Tensor, reference: Reference, *, block: int = 4096) -> Tensor:
    """How far each sample pulls the distance: ``n`` times its change per added weight, ``(N,)`` float64 of mean 0.

    ``psi(x) = 2 (x - m2) . (m2 - m1) + (x - m2)^T (I - T) (x - m2)`` less its mean, with ``T`` the optimal transport
    from the features' Gaussian to the reference's.

    Args:
        features: ``(N, d)`` on the device of the reference.
        reference: what they are compared with; counts as exact.
        block: samples held in float64 at a time.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` samples, other dimensions, values that are not finite.
    """
    _check(features, reference)
    moments = moments_of(features)
    shift = moments.mean - reference.moments.mean
    transport = reference.transport(moments)

    def pull(rows: Tensor) -> Tensor:
        x = rows.double() - moments.mean
        return 2 * x @ shift + ((x - x @ transport) * x).sum(1)

    psi = torch.cat([pull(rows) for rows in features.split(block)])
    return psi - psi.mean()


def frechet_with_influence(features: Tensor, reference: Reference) -> Value:
    """The Frechet distance of ``(N, d)`` features with the standard error of their influence.

    Too large below about ``20 d`` samples; above, that of the jackknife without its scatter.

    Raises:
        UserError: as ``frechet_influence``.
    """
    psi = frechet_influence(features, reference)
    distance = _distance(features, reference)
    return Value(distance.value, _error_of_mean(psi), len(psi), debiased=distance.debiased)


def paired_difference(a: Tensor, b: Tensor, reference: Reference, *, ddof: int = 1) -> Value:
    """Frechet distance of run ``a`` less that of run ``b``, both made from the same sample ids.

    What a seed adds to both cancels, so that a thousand pairs can tell more than fifty thousand unpaired samples.
    ``value / se`` is the z score.

    Args:
        a: ``(N, d)`` features, row ``k`` from the same seed, label and prompt as row ``k`` of ``b``.
        b: ``(N, d)`` features.
        reference: what both are compared with; counts as exact.
        ddof: covariances of both are over ``N - ddof``.

    Returns:
        The difference, negative where ``a`` is nearer, with the standard error of the paired influences (too large
        below about ``20 d`` pairs); ``debiased`` from ``5 d`` pairs on.

    Raises:
        UserError: other shapes, or as ``frechet_influence``.
    """
    _check_pairs(a, b)
    psi = frechet_influence(a, reference) - frechet_influence(b, reference)
    one, two = _distance(a, reference, ddof), _distance(b, reference, ddof)
    debiased = None if one.debiased is None or two.debiased is None else one.debiased - two.debiased
    return Value(one.value - two.value, _error_of_mean(psi), len(psi), debiased=debiased)


def paired_mean_difference(a: Tensor, b: Tensor) -> Value:
    """Mean of ``a - b``, ``(N,)`` scores of single samples (CLIP scores, say), from the same sample ids.

    Raises:
        UserError: other shapes, fewer than 2 pairs, or values that are not finite.
    """
    _check_pairs(a, b)
    check_features(a[:, None], "scores", least=2)
    check_features(b[:, None], "scores", least=2)
    difference = a.double() - b.double()
    return Value(difference.mean().item(), _error_of_mean(difference), len(difference))


def _check(features: Tensor, reference: Reference) -> None:
    check_features(features, "features", least=MIN_SAMPLES)
    check_comparable(features, reference.moments.mean[None], least=1)


def _check_pairs(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"runs are compared on the same sample ids: got shapes {tuple(a.shape)} and {tuple(b.shape)}; keep the "
            "common ids of both"
        )


def _distance(features: Tensor, reference: Reference, ddof: int = 1) -> FrechetDistance:
    sums = FeatureSums(features.shape[1], features.device)
    sums.add(features, range(len(features)))
    return frechet_distance(sums, reference, ddof=ddof)


def _error_of_mean(samples: Tensor) -> float:
    return samples.std().item() / math.sqrt(len(samples))
