"""What the large networks behind the metrics have in common: full precision, no gradients, colour images."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..errors import UserError
from .base import Extractor, Features
from .precision import full_precision


class FrozenNetwork(Extractor):
    """An extractor whose network is float32 and sees RGB."""

    def __call__(self, images: Tensor) -> Features:
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"{self.name} needs RGB images (B, 3, H, W), got {tuple(images.shape)}")
        with torch.no_grad(), full_precision(images.device):
            return self._features(images)

    @abstractmethod
    def _features(self, images: Tensor) -> Features:
        """Features of ``(B, 3, H, W)`` images in [0, 255], with all precautions taken."""
