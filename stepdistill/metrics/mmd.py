"""Maximum mean discrepancy of two sets in blocks: float64, every pair once, memory for one block of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .feature_sets import Rows, check_comparable

Kernel = Callable[[Tensor], Tensor]
"""Kernel values from inner products, elementwise."""


@dataclass(frozen=True)
class MMD:
    """A measured squared discrepancy."""

    unbiased: float
    """U-statistic, without the pairs of a sample with itself; negative by chance where the sets are alike."""
    biased: float
    """V-statistic, with them."""
    se: float
    """Standard error of either over new samples on both sides, by Hajek projection.

    Right for sets that differ; where they come from one law, ``sqrt(2)`` too large.
    """


def mmd(a: Rows, b: Rows, kernel: Kernel, *, block: int) -> MMD:
    """Squared discrepancy of ``(M, d)`` and ``(N, d)`` features (Gretton et al. 2012, equations 4 and 5).

    Args:
        a: features, any floating type.
        b: features on the same device.
        kernel: a function of the inner product.
        block: rows and columns of the kernel matrix held at a time.

    Raises:
        UserError: fewer than two samples, values that are not finite, other dimensions.
    """
    check_comparable(a, b, least=2)
    m, n = len(a), len(b)
    (own_a, self_a), (own_b, self_b) = _within(a, kernel, block), _within(b, kernel, block)
    cross_a, cross_b = _between(a, b, kernel, block)
    cross = 2 * cross_a.sum() / (m * n)
    # How far each sample moves the U-statistic, but for a constant.
    pull_a = 2 * ((own_a - self_a) / (m - 1) - cross_a / n)
    pull_b = 2 * ((own_b - self_b) / (n - 1) - cross_b / m)
    unbiased = (own_a - self_a).sum() / (m * (m - 1)) + (own_b - self_b).sum() / (n * (n - 1)) - cross
    biased = own_a.sum() / m**2 + own_b.sum() / n**2 - cross
    return MMD(unbiased.item(), biased.item(), math.sqrt((pull_a.var() / m + pull_b.var() / n).item()))


def _within(a: Rows, kernel: Kernel, block: int) -> tuple[Tensor, Tensor]:
    """Sums over each row of a set's kernel matrix, ``(N,)``, and its diagonal."""
    rows, diagonal = _zeros(a), _zeros(a)
    for i in range(0, len(a), block):
        x = a[i : i + block].double()
        values = kernel(x @ x.T)
        rows[i : i + block] += values.sum(1)
        diagonal[i : i + block] = values.diagonal()
        for j in range(i + block, len(a), block):
            values = kernel(x @ a[j : j + block].double().T)
            rows[i : i + block] += values.sum(1)
            rows[j : j + block] += values.sum(0)
    return rows, diagonal


def _between(a: Rows, b: Rows, kernel: Kernel, block: int) -> tuple[Tensor, Tensor]:
    """Sums over the rows ``(M,)`` and the columns ``(N,)`` of the kernel matrix of two sets."""
    rows, columns = _zeros(a), _zeros(b)
    for i in range(0, len(a), block):
        x = a[i : i + block].double()
        for j in range(0, len(b), block):
            values = kernel(x @ b[j : j + block].double().T)
            rows[i : i + block] += values.sum(1)
            columns[j : j + block] += values.sum(0)
    return rows, columns


def _zeros(a: Rows) -> Tensor:
    return torch.zeros(len(a), dtype=torch.float64, device=a[:1].device)
