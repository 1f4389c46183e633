"""Frechet distance between Gaussian fits of features: streaming sums, float64, with error and debiased value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .feature_sets import Rows, blocks
from .jackknife import GROUPS, MIN_SAMPLES, group_of, jackknife

_ROUNDING = 1e-3
"""What sums in float32 may leave below zero, relative to the largest eigenvalue: 5e-5 at 2,048 dimensions."""

_LARGEST = 1e100
"""Beyond which products overflow."""


@dataclass(frozen=True)
class Moments:
    """Mean ``(d,)`` and covariance ``(d, d)`` of ``n`` features, float64; ``None`` where a file does not say."""

    n: int | None
    mean: Tensor
    covariance: Tensor


class FeatureSums:
    """Float64 sums of features, one set per jackknife group; ranks and shards merge by adding the three tensors."""

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(GROUPS, dtype=torch.int64, device=device)
        self.sum = torch.zeros(GROUPS, dimension, dtype=torch.float64, device=device)
        self.outer = torch.zeros(GROUPS, dimension, dimension, dtype=torch.float64, device=device)

    def add(self, features: Tensor, ids: Sequence[int]) -> None:
        """Add ``(N, d)`` features of the samples ``ids``."""
        features = features.to(self.sum.device, torch.float64)
        groups = group_of(torch.tensor(ids, device=features.device))
        for g in range(GROUPS):
            mine = features[groups == g]
            self.count[g] += len(mine)
            self.sum[g] += mine.sum(0)
            self.outer[g].addmm_(mine.T, mine)  # in place: a product apart is 32 MB of fresh memory at d = 2048

    def moments(self, without: int | None = None, ddof: int = 1) -> Moments:
        """Mean and covariance over ``n - ddof`` of everything, or of everything but one group."""
        count, total, outer = self.count.sum(), self.sum.sum(0), self.outer.sum(0)
        if without is not None:
            count, total, outer = count - self.count[without], total - self.sum[without], outer - self.outer[without]
        n = int(count)
        mean = total / n
        return Moments(n, mean, (outer - n * torch.outer(mean, mean)) / (n - ddof))


def moments_of(features: Rows) -> Moments:
    """Moments of ``(N, d)`` features, read twice."""
    n, d = features.shape
    mean, outer = features[:1].double().new_zeros(d), features[:1].double().new_zeros(d, d)
    for _, part in blocks(features):
        mean += part.sum(0) / n
    for _, part in blocks(features):
        outer.addmm_((part - mean).T, part - mean)
    return Moments(n, mean, outer / (n - 1))


class Reference:
    """Moments to compare with; the factor ``A A^T = covariance`` is computed once.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` samples, or a covariance that is none.
    """

    def __init__(self, moments: Moments) -> None:
        if moments.n is not None and moments.n < MIN_SAMPLES:
            raise UserError(f"at least {MIN_SAMPLES} reference images are needed, got {moments.n}")
        self.moments = moments
        if (largest := moments.covariance.abs().max().item()) > _LARGEST:
            raise UserError(f"sigma of the reference has entries up to {largest:.3g}, which no features have")
        values, vectors = torch.linalg.eigh(moments.covariance)
        if values[0] < -_ROUNDING * values[-1]:
            raise UserError(
                f"sigma of the reference has eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, so it is not a "
                "covariance; make the statistics again"
            )
        self._half = vectors * values.clamp_min(0).sqrt()

    def distance(self, other: Moments) -> float:
        """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` in float64.

        The trace of the root is the sum of the root eigenvalues of ``A^T S2 A``; eigenvalues below rounding
        (``e_max d 2.2e-16``) count as zero, which is exact where sqrtm loses 1e-5 on rank-deficient input.
        """
        reference = self.moments
        product = self._half.T @ other.covariance @ self._half
        values = torch.linalg.eigvalsh((product + product.T) / 2)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        root = torch.where(kept, values, 0.0).clamp_min(0).sqrt().sum()
        shift = (reference.mean - other.mean).square().sum()
        return (shift + reference.covariance.trace() + other.covariance.trace() - 2 * root).item()

    def transport(self, other: Moments) -> Tensor:
        """``T = A (A^T S2 A)^(-1/2) A^T``, ``(d, d)``: ``m1 + T (x - m2)`` carries the other Gaussian to this one.

        ``-T`` is the derivative of ``-2 tr (S1 S2)^(1/2)`` by ``S2``; eigenvalues count as zero as in ``distance``.
        """
        product = self._half.T @ other.covariance @ self._half
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        half = self._half @ vectors * torch.where(kept, values, math.inf).pow(-0.25)
        return half @ half.T


@dataclass(frozen=True)
class FrechetDistance:
    """A measured distance."""

    value: float
    """The plain estimate, biased upward by about ``1/n``."""
    se: float
    """Standard error by the delete-a-group jackknife; the reference counts as exact."""
    debiased: float | None
    """Jackknife-corrected estimate; ``None`` below ``5 d`` samples, where it is not to be trusted.

    Takes the samples as independent of the reference; a subset of it comes out negative.
    """
    n: int
    """Samples measured."""


def frechet_distance(sums: FeatureSums, reference: Reference, *, ddof: int = 1) -> FrechetDistance:
    """Distance of accumulated features, their covariance over ``n - ddof``, to ``reference``, with error and bias.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` samples.
    """
    n, dimension = int(sums.count.sum()), sums.sum.shape[1]
    if n < MIN_SAMPLES:
        raise UserError(f"at least {MIN_SAMPLES} images are needed, got {n}")
    value = reference.distance(sums.moments(ddof=ddof))
    parts = [reference.distance(sums.moments(g, ddof)) for g in range(GROUPS)]
    found = jackknife(value, parts)
    return FrechetDistance(value, found.se, found.debiased if n >= 5 * dimension else None, n)
