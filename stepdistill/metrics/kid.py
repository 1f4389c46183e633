"""Kernel distance (KID, Binkowski et al. 2018): the cubic kernel's discrepancy over all pairs, or over subsets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .base import Value
from .feature_sets import Rows, check_comparable
from .mmd import MMD, mmd


def kid(generated: Rows, reference: Rows, *, block: int = 1024) -> Value:
    """Squared discrepancy under ``(x . y / d + 1)^3``, unbiased, over all pairs.

    Args:
        generated: ``(M, d)`` features.
        reference: ``(N, d)`` features on the same device.
        block: rows and columns of the kernel matrix held at a time; does not change the result.

    Returns:
        The value, without any factor of 100 or 1000; its error covers new samples on both sides and is up to
        ``sqrt(2)`` too large where the two laws are alike.

    Raises:
        UserError: fewer than two samples, values that are not finite, other dimensions.
    """
    result = _cubic(generated, reference, block)
    return Value(result.unbiased, result.se, len(generated), debiased=result.unbiased)


def kid_subsets(generated: Rows, reference: Rows, *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Value:
    """Mean of ``kid`` over random subsets, to compare with what other tools print; noisier than ``kid``.

    The defaults draw the subsets of torch-fidelity; clean-fid's, after ``numpy.random.seed(seed)``, are drawn with
    generated and reference exchanged, which leaves the kernel distance as it is.

    Args:
        generated: ``(M, d)`` features.
        reference: ``(N, d)`` features on the same device.
        subsets: how many.
        size: samples of a subset, drawn from either side without replacement.
        seed: of numpy's Mersenne twister.

    Returns:
        The mean, with ``repeats`` the single subsets.  Those share samples, so their spread is no error of the mean:
        ``se`` is ``None``.

    Raises:
        UserError: fewer than ``size`` samples on a side, or settings that leave no pair.
    """
    if size < 2 or subsets < 1:
        raise UserError(f"at least 1 subset of 2 samples is needed, got {subsets} of {size}")
    check_comparable(generated, reference, least=size)
    random = np.random.RandomState(seed)

    def drawn(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.choice(len(features), size, replace=False)).to(features.device)]

    whole = generated[:], reference[:]  # a subset may take any row
    values = tuple(_cubic(drawn(whole[0]), drawn(whole[1]), size).unbiased for _ in range(subsets))
    return Value(sum(values) / subsets, None, len(generated), repeats=values)


def _cubic(a: Rows, b: Rows, block: int) -> MMD:
    dimension = a.shape[-1]
    return mmd(a, b, lambda inner: (inner / dimension + 1).pow(3), block=block)
