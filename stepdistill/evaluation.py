"""Scores a generator: Frechet distance, class balance and speed, on noise that belongs to sample ids."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .images import load_images, to_uint8
from .metrics.digits import DigitsExtractor
from .metrics.frechet import FeatureSums, FrechetDistance, Moments, Reference, frechet_distance

Generate = Callable[[range], Tensor]
"""The samples of the given ids, ``(B, C, H, W)`` in [-1, 1]; sample ``k`` is the same in any batch."""


@dataclass(frozen=True)
class Measurement:
    """What is known about one generator."""

    label: str
    network_calls: int
    distance: FrechetDistance
    class_shares: tuple[float, ...]
    """Share of the samples that the bundled classifier takes for each digit."""
    diversity: float
    """Root mean square distance between the features of two samples, ``sqrt(2 tr Cov)``."""
    images_per_second: float
    """Of the median batch, noise to 8-bit images on the CPU, features excluded: a slow first batch has no say."""
    prompt_accuracy: float | None = None
    """Share of the samples that the bundled classifier takes for the digit asked of them, where digits were asked."""


class Evaluator:
    """Compares generators with one set of reference images.

    Args:
        reference: source of the reference images, see ``load_images``.
        device: where features are computed.
    """

    def __init__(self, reference: str, device: torch.device | str = "cpu") -> None:
        self.extractor = DigitsExtractor(device)
        self.reference = Reference(self.moments(load_images(reference)))

    def moments(self, images: Tensor) -> Moments:
        """Feature moments of uint8 ``(N, C, H, W)`` images."""
        return self._sums(images).moments()

    def distance(self, images: Tensor) -> FrechetDistance:
        """Distance of uint8 ``(N, C, H, W)`` images to the reference."""
        return frechet_distance(self._sums(images), self.reference)

    def _sums(self, images: Tensor) -> FeatureSums:
        sums = FeatureSums(self.extractor.dimension)
        for start in range(0, len(images), 1000):
            sums.add(self.extractor(images[start : start + 1000]), range(start, min(start + 1000, len(images))))
        return sums

    def floor(self, images: Tensor, seed: int) -> float:
        """Distance of a random half of the reference's own ``images``: what no generator can be asked to beat."""
        half = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: len(images) // 2]
        return self.reference.distance(self.moments(images[half]))

    @torch.no_grad()
    def measure(
        self,
        label: str,
        network_calls: int,
        generate: Generate,
        *,
        samples: int,
        batch_size: int,
        digits: Tensor | None = None,
    ) -> Measurement:
        """Generate samples ``0 .. samples - 1`` in batches and score them as 8-bit images.

        Args:
            label: name of the generator.
            network_calls: what one sample takes.
            generate: the generator.
            samples: how many.
            batch_size: at a time.
            digits: ``(samples,)`` the digit 0..9 that each sample was asked for.
        """
        sums, seen, speeds = FeatureSums(self.extractor.dimension), [], []
        for start in range(0, samples, batch_size):
            ids = range(start, min(start + batch_size, samples))
            began = time.perf_counter()
            images = to_uint8(generate(ids)).cpu()
            speeds.append(len(ids) / (time.perf_counter() - began))
            sums.add(self.extractor(images), ids)
            seen.append(self.extractor.classify(images).cpu())
        found = torch.cat(seen)
        shares = torch.bincount(found, minlength=10) / samples
        return Measurement(
            label,
            network_calls,
            frechet_distance(sums, self.reference),
            tuple(shares.tolist()),
            diversity=(2 * sums.moments().covariance.trace()).sqrt().item(),
            images_per_second=statistics.median(speeds),
            prompt_accuracy=None if digits is None else (found == digits).double().mean().item(),
        )
