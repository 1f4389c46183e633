"""Scores a generator: Frechet distance, class balance and speed, on noise that belongs to sample ids."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import DigitsExtractor
from .frechet import FeatureSums, FrechetDistance, Moments, Reference, frechet_distance
from .images import load_images, to_uint8
from .samplers import SampleNoise

Generate = Callable[[Tensor, SampleNoise], Tensor]
"""``(first noise (B, C, H, W), source of more) -> images (B, C, H, W)`` in [-1, 1]."""


@dataclass(frozen=True)
class Measurement:
    """What is known about one generator."""

    label: str
    network_calls: int
    distance: FrechetDistance
    class_shares: tuple[float, ...]
    """Share of the samples that the bundled classifier takes for each digit."""
    images_per_second: float
    """Generation alone, without features."""


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
        sums = FeatureSums(self.extractor.dimension)
        for start in range(0, len(images), 1000):
            sums.add(self.extractor(images[start : start + 1000]), start)
        return sums.moments()

    @torch.no_grad()
    def measure(
        self,
        label: str,
        network_calls: int,
        generate: Generate,
        shape: tuple[int, ...],
        *,
        samples: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        on_batch: Callable[[int], object] = lambda _: None,
    ) -> Measurement:
        """Generate samples ``0 .. samples - 1`` in batches and score them as 8-bit images."""
        sums, digits, seconds = FeatureSums(self.extractor.dimension), [], 0.0
        for start in range(0, samples, batch_size):
            ids = range(start, min(start + batch_size, samples))
            noise = SampleNoise(ids, shape, device=device)
            began = time.monotonic()
            images = to_uint8(generate(noise(), noise)).cpu()
            seconds += time.monotonic() - began
            sums.add(self.extractor(images), start)
            digits.append(self.extractor.classify(images))
            on_batch(len(ids))
        shares = torch.bincount(torch.cat(digits).cpu(), minlength=10) / samples
        distance = frechet_distance(sums, self.reference)
        return Measurement(label, network_calls, distance, tuple(shares.tolist()), samples / seconds)
