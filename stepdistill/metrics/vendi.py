"""Diversity without a reference: the Vendi score of a set, and how far apart the images of one prompt are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from .base import Value
from .feature_sets import Directions, Rows, blocks, check_features
from .jackknife import GROUPS, MIN_SAMPLES, group_of, jackknife


def vendi(features: Rows, *, q: float = 1.0) -> Value:
    """Effective number of different images (Friedman and Dieng 2023; order ``q``: Pasarkar and Dieng 2024).

    ``exp`` of the Renyi entropy of the eigenvalues of the mean outer product of directions, ``(d, d)``; the
    ``N x N`` matrix of cosines has the same ones.

    Args:
        features: ``(N, d)``.
        q: order above 0; 1 is Shannon's entropy, larger weighs the common more, ``inf`` sees only the most common.

    Returns:
        The score with its jackknife error; ``debiased`` from ``5 d`` samples on, as few samples score too low.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` samples, values not finite or all zero, or an order not above 0.
    """
    if not q > 0:
        raise UserError(f"the order of a Vendi score must be above 0, got {q}")
    check_features(features, "features", least=MIN_SAMPLES)
    u, (n, d) = Directions(features, "features"), features.shape
    total = _outer(u)
    value = _effective(total / n, q)
    # A group at a time: ten (d, d) sums at once are 336 MB at d = 2048.
    sizes = group_of(torch.arange(n)).bincount(minlength=GROUPS).tolist()
    parts = [_effective((total - _outer(u, g)) / (n - sizes[g]), q) for g in range(GROUPS)]
    result = jackknife(value, parts)
    return Value(value, result.se, n, debiased=result.debiased if n >= 5 * d else None)


def _outer(u: Directions, only: int | None = None) -> Tensor:
    """Sum of outer products ``(d, d)`` of all directions, or of those of one group."""
    total = u[:1].new_zeros(u.shape[1], u.shape[1])
    for rows, part in blocks(u):
        mine = part if only is None else part[(group_of(torch.arange(rows.start, rows.stop)) == only).to(part.device)]
        total.addmm_(mine.T, mine)
    return total


def _effective(matrix: Tensor, q: float) -> float:
    """``exp`` of the order-``q`` entropy of the eigenvalues, which sum to one; rounding counts as zero."""
    values = torch.linalg.eigvalsh(matrix)
    values = values[values > values[-1] * len(values) * torch.finfo(torch.float64).eps]
    if q == 1:
        return torch.special.entr(values).sum().exp().item()
    if math.isinf(q):
        return 1 / values[-1].item()
    return values.pow(q).sum().pow(1 / (1 - q)).item()


def per_prompt_diversity(features: Rows, prompt_ids: Tensor) -> Value:
    """Mean over prompts of the mean of ``1 - cos`` over all pairs of images of a prompt.

    Args:
        features: ``(N, d)``, of images made from several seeds a prompt.
        prompt_ids: ``(N,)`` integers, in any order.

    Returns:
        The mean over ``P`` prompts, each of one weight, in [0, 2]; its standard error is over new prompts and seeds,
        ``None`` for one prompt.

    Raises:
        UserError: a prompt of one image, other lengths, values not finite or all zero.
    """
    check_features(features, "features")
    if tuple(prompt_ids.shape) != tuple(features.shape[:1]):
        raise UserError(f"expected one prompt id a sample, {len(features)}, got shape {tuple(prompt_ids.shape)}")
    u = Directions(features, "features")
    prompts, index, seeds = prompt_ids.to(u[:1].device).unique(return_inverse=True, return_counts=True)
    if (seeds < 2).any():
        raise UserError(f"diversity needs 2 images or more of each prompt, got 1 of prompt {prompts[seeds < 2][0]}")
    # All pairs of a prompt at once: |sum of directions|^2 holds each twice, and every image with itself.
    totals = u[:1].new_zeros(len(prompts), u.shape[1])
    for rows, part in blocks(u):
        totals.index_add_(0, index[rows], part)
    apart = 1 - (totals.square().sum(1) - seeds) / (seeds * (seeds - 1))
    se = apart.std().item() / math.sqrt(len(apart)) if len(apart) > 1 else None
    return Value(apart.mean().item(), se, len(u))
