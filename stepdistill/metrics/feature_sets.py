"""What a set of features must be before it is measured, and how it is read: in blocks, from memory or from a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError

BLOCK = 1024
"""Samples that are read at a time."""


class Rows(Protocol):
    """Features ``(N, d)`` of which consecutive ones can be read; a tensor is such, and a file of them."""

    @property
    def shape(self) -> torch.Size:
        """``(N, d)``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def blocks(features: Rows, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Where, and float64 features there, ``size`` at a time."""
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        yield rows, features[rows].double()


def check_features(features: Rows, name: str, *, least: int = 1) -> None:
    """Refuse what no metric can use.

    Args:
        features: ``(N, d)``, one row a sample.
        name: what errors call them.
        least: the fewest samples.

    Raises:
        UserError: not a matrix, too few samples, or a value that is not finite.
    """
    if len(features.shape) != 2:
        raise UserError(f"{name} must be (N, d), got shape {tuple(features.shape)}")
    if len(features) < least:
        raise UserError(f"at least {least} {name} are needed, got {len(features)}")
    broken = [rows.start + k for rows, part in blocks(features) for k in (~part.isfinite().all(1)).nonzero()[:, 0]]
    if broken:
        raise UserError(f"{name} must be finite; {len(broken)} are not, first row {int(broken[0])}")


def check_comparable(generated: Rows, reference: Rows, *, least: int) -> None:
    """Refuse two sets that are not ``(M, d)`` and ``(N, d)`` features of one network.

    Raises:
        UserError: as ``check_features`` for either, or other dimensions.
    """
    check_features(generated, "generated features", least=least)
    check_features(reference, "reference features", least=least)
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"features must come from one network: got {generated.shape[1]} dimensions against {reference.shape[1]}"
        )


@dataclass(frozen=True, eq=False)
class Directions:
    """``(N, d)`` features over their Euclidean norm, float64; a zero one, whose cosine is undefined, is refused."""

    features: Rows
    name: str
    """What errors call them."""

    @property
    def shape(self) -> torch.Size:
        """``(N, d)``."""
        return self.features.shape

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Directions of consecutive features.

        Raises:
            UserError: one is zero.
        """
        found = self.features[rows].double()
        norms = found.norm(dim=1, keepdim=True)
        if not norms.all():
            row = rows.indices(len(self))[0] + int((norms == 0).nonzero()[0, 0])
            raise UserError(f"{self.name} must not be zero, row {row} is; its cosine is undefined")
        return found / norms
