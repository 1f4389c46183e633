"""The text-to-image digits: captions, and the styles that they name, made from real digits by fixed rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("", "bold", "thin", "tilted", "bold tilted", "thin tilted")
"""Words before "handwritten"; the empty style is the digit as it was written."""


def caption(digit: int, style: str = "") -> str:
    """``caption(3, "bold tilted")`` is "a bold tilted handwritten three"."""
    return " ".join(filter(None, ["a", style, "handwritten", DIGITS[digit]]))


CAPTIONS = tuple(caption(digit, style) for style in STYLES for digit in range(10))
"""All captions; number ``k`` asks for the digit ``k % 10`` in the style ``STYLES[k // 10]``."""


def digits_of(captions: Sequence[str]) -> Tensor | None:
    """``(N,)`` the digit that each of ``captions`` names; ``None`` where one names none or several."""
    named = [[k for k, word in enumerate(DIGITS) if word in text.split()] for text in captions]
    return torch.tensor([found[0] for found in named]) if all(len(found) == 1 for found in named) else None


def styled(grey: Tensor, style: str) -> Tensor:
    """Digits ``(N, 1, 8, 8)`` in [0, 1], bright on black, as ``(N, 1, 16, 16)`` in [0, 1], in one of ``STYLES``."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    x = F.interpolate(grey, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    # The weight comes after the shear, whose interpolation would soften it.
    for word, change in (("tilted", _tilted), ("bold", _bold), ("thin", _thin)):
        if word in style.split():
            x = change(x)
    return x


def _tilted(x: Tensor) -> Tensor:
    """Sheared about the centre line: the top moves to the right by 0.3 pixels per row of height."""
    shear = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0]], device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(shear, list(x.shape), align_corners=False), align_corners=False)


def _bold(x: Tensor) -> Tensor:
    """Half way to the dilation by a cross; the whole way closes the loops of 8x8 digits."""
    dilated = torch.maximum(F.max_pool2d(x, (3, 1), 1, (1, 0)), F.max_pool2d(x, (1, 3), 1, (0, 1)))
    return (x + dilated) / 2


def _thin(x: Tensor) -> Tensor:
    """The darkest quarter of the grey levels becomes black: strokes lose their soft edges and stay connected."""
    return ((x - 0.25) / 0.75).clamp(0, 1)
