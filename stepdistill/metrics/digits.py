"""Feature extractors: what a Frechet distance compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor, nn

from ..bundled import bundled
from ..errors import UserError
from ..images import to_float


class DigitsNet(nn.Module):
    """A small classifier of 8x8 digits; 18,506 parameters, input in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(128, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(logits (N, 10), features (N, 80))``: pooled edges, pooled parts, and the penultimate layer."""
        edges = F.relu(self.conv1(x))
        parts = F.relu(self.conv3(F.max_pool2d(F.relu(self.conv2(edges)), 2)))
        hidden = F.relu(self.hidden(F.max_pool2d(parts, 2).flatten(1)))
        return self.out(hidden), torch.cat([edges.mean((2, 3)), parts.mean((2, 3)), hidden], dim=1)


class DigitsExtractor:
    """``fd-digits-v1``: the frozen ``DigitsNet`` of this package, standardised on the real digits.

    Pixel statistics alone see little of shape, the penultimate layer alone little of noise; the three layers
    together saw every corruption tried.  Computed in float64, which neither TF32 nor autocast touches.
    Weights and standardisation come from one file, made by ``training/train_digits_features.py``; another training
    seed would be another metric.
    """

    name = "fd-digits-v1"
    dimension = 80

    def __init__(self, device: torch.device | str = "cpu") -> None:
        weights = load_file(bundled("assets") / f"{self.name}.safetensors")
        self.device = torch.device(device)
        self._mean = weights.pop("mean").to(self.device).double()
        self._std = weights.pop("std").to(self.device).double()
        self._net = DigitsNet().to(self.device).double().eval()
        self._net.load_state_dict(weights)

    @staticmethod
    def compares(shape: Sequence[int]) -> bool:
        """Whether images of this ``(C, H, W)`` can be reduced to 8x8 grey: 1 or 3 channels, both sides ``8 k``."""
        channels, height, width = shape
        return channels in (1, 3) and height == width and height > 0 and height % 8 == 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return (self._net(self._prepare(images))[1] - self._mean) / self._std

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The digit 0..9 seen in each uint8 ``(N, C, 8 k, 8 k)`` image, ``(N,)``."""
        return self._net(self._prepare(images))[0].argmax(1)

    def _prepare(self, images: Tensor) -> Tensor:
        """Grey float64 ``(N, 1, 8, 8)`` in [-1, 1]: the mean of the channels, and of the area behind each pixel."""
        if not self.compares(images.shape[1:]):
            channels, height, width = images.shape[1:]
            raise UserError(
                f"{self.name} compares 8x8 digits, or square multiples of that with 1 or 3 channels, got images of "
                f"{width}x{height} with {channels}"
            )
        grey = to_float(images.to(self.device)).double().mean(1, keepdim=True)
        return F.avg_pool2d(grey, images.shape[-1] // 8)
