"""Errors and debiased values from deleting a tenth of the samples at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 10
"""Groups of the delete-a-group jackknife, see ``group_of``."""

MIN_SAMPLES = 2 * GROUPS
"""Fewest samples on either side: two in every group, so that each has a spread and deleting one leaves a covariance."""


def group_of(ids: Tensor) -> Tensor:
    """Jackknife group ``(N,)`` of the samples ``ids (N,)``, int64.

    Every ten consecutive samples fall into ten groups, rotated by a hash of their position.  Without the rotation,
    labels dealt out as ``id % 10`` would make each group a class, and deleting one would not be leaving out a tenth.
    """
    # The finaliser of MurmurHash3 on 32 bits; its products stay below 2^63.
    turn = ids // GROUPS
    turn = (turn ^ (turn >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    turn = (turn ^ (turn >> 15)) * 0x45D9F3B & 0xFFFFFFFF
    return (ids + (turn ^ (turn >> 16))) % GROUPS


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
