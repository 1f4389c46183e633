"""Images as 8-bit tensors: reading them from a source, and the one rounding rule between [-1, 1] and bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError
from .styles import STYLES, styled

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
DIGITS = "builtin:digits"
TEXT_DIGITS = "builtin:digits_text"
_NUMBERS = re.compile(r"([^0-9]*)([0-9]*)")


def natural(name: str) -> list[tuple[str, int]]:
    """A key that puts ``img2.png`` before ``img10.png``."""
    return [(text, int(number or 0)) for text, number in _NUMBERS.findall(name)] + [(name, 0)]


def to_uint8(x: Tensor) -> Tensor:
    """``round((x + 1) * 127.5)`` clipped to bytes; EDM's rule, which loses none of the 256 levels."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1]; ``to_uint8`` is its inverse."""
    return images.float() / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """One uint8 ``(C, H, W)`` image, C = 1 or 3, as a Pillow picture."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, uint8 ``(1797, 1, 8, 8)`` with 17 levels spread over 0..255, and labels ``(1797,)``."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    grey = np.rint(np.asarray(images) * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(grey).reshape(-1, 1, 8, 8), torch.from_numpy(np.asarray(labels)).long()


def load_text_digits() -> tuple[Tensor, Tensor]:
    """The digits in every style, uint8 ``(10782, 3, 16, 16)`` grey as RGB, and numbers ``(10782,)`` in ``CAPTIONS``."""
    grey, labels = load_digits()
    images = torch.cat([styled(grey / 255, style) for style in STYLES])
    captions = torch.cat([labels + 10 * k for k in range(len(STYLES))])
    return to_uint8(images * 2 - 1).expand(-1, 3, -1, -1).contiguous(), captions


def read_image(file: Path | BinaryIO, name: str) -> np.ndarray:
    """A picture as ``(H, W, C)`` uint8, C = 1 or 3; errors call it ``name``.

    Raises:
        UserError: it is damaged, or not 8-bit.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it is not 8-bit (Pillow's mode {image.mode})")
            pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # Decoders raise nearly anything on damaged files.
        raise UserError(f"cannot read the image {name}: {error}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels
