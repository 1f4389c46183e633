"""What the parts of the evaluator hand each other: images, features, measured values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor


class Source(ABC):
    """Images by number, read when they are asked for; image ``k`` is the same in any batch and on any rank."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def name(self, k: int) -> str:
        """What errors call image ``k``: a file's path, a row of an archive."""

    @abstractmethod
    def read(self, k: int) -> np.ndarray:
        """Image ``k`` as ``(H, W, C)`` uint8, C = 1 or 3.

        Raises:
            UserError: it cannot be read; the message names it.
        """


class Features(NamedTuple):
    """What a network says of a batch of images."""

    features: Tensor
    """``(B, d)``, float32 or float64."""
    logits: Tensor | None = None
    """``(B, classes)`` of a classifier, for the inception score."""
    marks: Tensor | None = None
    """``(B,)`` int64 hashes of the images, which order them whatever their files are called."""


class Extractor(ABC):
    """A frozen network that turns prepared images into features.

    How images are resized and cropped before it is the protocol's business; what the network needs on top (its own
    input size, scaling and normalisation) is its own.
    """

    name: ClassVar[str]
    """In protocols and reports."""
    dimension: int
    """``d`` of the features."""
    weights: str
    """sha256 of the file that the network was read from."""
    dtype: ClassVar[Literal["float32", "float64"]] = "float32"
    """Of the features, and so of those that are kept on disk."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """Features of ``(B, C, H, W)`` images in [0, 255], uint8 or float32, on the network's device."""


@dataclass(frozen=True)
class Value:
    """A measured number."""

    value: float
    se: float | None
    """Standard error; ``None`` where none is known."""
    n: int
    """Samples that it was measured on."""
    debiased: float | None = None
    """Estimate for infinitely many samples, where there is one."""
    repeats: Sequence[float] = ()
    """The values of single repeats (seed ranges), where ``value`` sums up several."""
