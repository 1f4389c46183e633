"""Inception score (Salimans et al. 2016): how sure a classifier is of each image, and how unsure of all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .base import Value
from .feature_sets import check_features
from .jackknife import MIN_SAMPLES, groups, jackknife


def inception_score(logits: Tensor, *, block: int = 4096) -> Value:
    """``exp(mean_x KL(p(y | x) || p(y)))`` over all images.

    Args:
        logits: ``(N, classes)``.
        block: images whose probabilities are held at a time; does not change the result.

    Returns:
        The score with its jackknife error; ``debiased`` from 5 images a class on, as few images score too low.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` images, or logits that are not finite.
    """
    check_features(logits, "logits", least=MIN_SAMPLES)
    n, classes = logits.shape
    members = groups(n, logits.device)
    sums = [_sums(logits[mine], block) for mine in members]
    probability, entropy = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
    value = _score(probability, entropy, n)
    parts = [_score(probability - p, entropy - e, n - len(mine)) for mine, (p, e) in zip(members, sums, strict=True)]
    result = jackknife(value, parts)
    return Value(value, result.se, n, debiased=result.debiased if n >= 5 * classes else None)


def inception_score_splits(parts: Sequence[Tensor]) -> Value:
    """Mean score of parts of the images, each scored alone: the published protocols, biased by the size of a part.

    Args:
        parts: ``(N_i, classes)`` logits each.  ADM cuts ``logits.split(5000)``; torch-fidelity shuffles, then cuts
            ``logits.tensor_split(10)``.  Images in order of their class must be shuffled first.

    Returns:
        The mean, with its standard error over the parts, which ``repeats`` holds.

    Raises:
        UserError: no part, an empty one, or logits that are not finite.
    """
    if not parts:
        raise UserError("at least one part of logits is needed, got none")
    values = []
    for part in parts:
        check_features(part, "logits of a part")
        probability, entropy = _sums(part, 4096)
        values.append(_score(probability, entropy, len(part)))
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Value(statistics.fmean(values), se, sum(map(len, parts)), repeats=tuple(values))


def _sums(logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Over the images: their class probabilities ``(classes,)``, and the entropies of these ``()``; float64."""
    probability = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    entropy = probability.new_zeros(())
    for rows in logits.split(block):
        p = rows.double().softmax(1)
        probability += p.sum(0)
        entropy += torch.special.entr(p).sum()
    return probability, entropy


def _score(probability: Tensor, entropy: Tensor, n: int) -> float:
    return (torch.special.entr(probability / n).sum() - entropy / n).exp().item()
