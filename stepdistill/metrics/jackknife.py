"""Errors and debiased values from deleting a tenth of the samples at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .frechet import GROUPS, MIN_SAMPLES, group_of

__all__ = ["GROUPS", "MIN_SAMPLES", "Jackknife", "groups", "jackknife"]


class Jackknife(NamedTuple):
    """What deleting groups says of a measured value."""

    se: float
    debiased: float
    """The value without its bias of order ``1/n``."""


def jackknife(value: float, parts: Sequence[float]) -> Jackknife:
    """Delete-a-group jackknife of ``value``, where ``parts`` are measured without one group each."""
    count = len(parts)
    centre = sum(parts) / count
    spread = sum((part - centre) ** 2 for part in parts)
    return Jackknife(math.sqrt((count - 1) / count * spread), count * value - (count - 1) * centre)


def groups(n: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The samples ``0 .. n - 1`` in ``GROUPS`` fixed lists, whose lengths differ by one at most."""
    group = group_of(torch.arange(n, device=device))
    return [(group == g).nonzero()[:, 0] for g in range(GROUPS)]
