"""CMMD (Jayasumana et al. 2024): discrepancy of CLIP directions under a wide Gaussian kernel."""

from __future__ import annotations

import torch

from .base import Value
from .feature_sets import Directions, Rows, check_comparable
from .mmd import mmd

SIGMA = 10.0
"""Width of the kernel; directions are at most 2 apart."""

SCALE = 1000.0
"""What the squared discrepancy is multiplied with, as published."""


def cmmd(generated: Rows, reference: Rows, *, block: int = 1024) -> Value:
    """``1000 MMD^2`` of the directions of features, kernel ``exp(-|x - y|^2 / (2 10^2))``.

    Args:
        generated: ``(M, d)`` features of any length; they are normalised here.
        reference: ``(N, d)`` features on the same device.
        block: rows and columns of the kernel matrix held at a time; does not change the result.

    Returns:
        The published, biased value; ``debiased`` leaves out the pairs of a sample with itself.  The error covers new
        samples on both sides and is up to ``sqrt(2)`` too large where the two laws are alike.

    Raises:
        UserError: fewer than two samples, values that are not finite or all zero, other dimensions.
    """
    check_comparable(generated, reference, least=2)
    a, b = Directions(generated, "generated features"), Directions(reference, "reference features")
    # The kernel less one: constants cancel in the discrepancy, and the kernel itself is nearly constant.
    result = mmd(a, b, lambda cosine: torch.expm1((cosine - 1) / SIGMA**2), block=block)
    return Value(SCALE * result.biased, SCALE * result.se, len(a), debiased=SCALE * result.unbiased)
