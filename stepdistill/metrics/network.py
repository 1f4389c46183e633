"""What the large networks behind the metrics have in common: full precision, no gradients, colour images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .base import Extractor, Features


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 means float32 inside: no TF32, no bfloat16 kernels, no autocast; afterwards all is as before.

    cuDNN uses TF32 by default; a Frechet distance moves visibly by it.
    """
    with torch.autocast(device.type, enabled=False), _ieee_backends():
        yield


@contextmanager
def _ieee_backends() -> Iterator[None]:
    backends: Any = torch.backends
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            backends.cudnn.allow_tf32 = before[1]
        return
    # These switches can be read and restored whether the caller uses them or the older ones; not so the reverse.
    switches = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    values = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, values, strict=True):
            switch.fp32_precision = value


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


def pillow_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 ``(B, 3, H, W)`` resized to ``(B, 3, height, width)`` by Pillow, rounded to bytes; on the same device.

    Raises:
        UserError: images that are not bytes, which Pillow would resize otherwise.
    """
    if images.shape[2:] == (height, width):
        return images
    if images.dtype != torch.uint8:
        raise UserError(f"only uint8 images can be resized to {width}x{height} here, got {images.dtype}")
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = [np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)
