"""Resizing and cropping to the letter of a protocol: Pillow's arithmetic, by Pillow or as products of matrices.

An image is resized along its rows, then along its columns, by one matrix each.  Pillow rounds their coefficients to
22 bits and the image to bytes in between; split into small integers, that arithmetic is exact in float32 products.
Pillow 13 turns the order round where an image loses more than twice as many rows as columns, which moves pixels by a
level; here it stays, so that a protocol means one thing under every Pillow.  On square images nothing differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..images import to_picture
from .precision import full_precision

KINDS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Filters, as Pillow names and defines them; all antialias."""
GRAMMAR = f"center-crop | crop N | KIND N | KIND-float N | short-KIND N, with KIND one of {', '.join(KINDS)}, N > 0"
"""What a step may be; after ``KIND-float``, nothing resizes."""

_KIND = "|".join(KINDS)
_STEP = re.compile(rf"(center-crop)|(?:(crop)|(short-)?({_KIND})|({_KIND})-float) ([1-9][0-9]*)")
_SMALL = 64
"""Size up to which products in float64 are faster than Pillow."""
_BAND = 38
"""Rows made at a time by them: most of a matrix is zero, and what a band makes stays in the cache."""
_BITS = 22
"""Fractional bits of Pillow's coefficients."""


def check_steps(steps: Sequence[str]) -> None:
    """Refuse what is no chain of steps.

    Raises:
        ValueError: a step is not of the grammar, or one resizes what ``KIND-float`` has left unrounded.
    """
    unrounded = None
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"a step of preparation must be {GRAMMAR}; got {step!r}")
        if unrounded and (match[4] or match[5]):
            raise ValueError(f"{unrounded!r} must be the last step that resizes; {step!r} follows it")
        unrounded = step if match[5] else unrounded


def prepare(images: Tensor, steps: Sequence[str]) -> Tensor:
    """Run a protocol's chain of resizes and crops.

    Each step is one of:

    - ``center-crop``: the square of the short side; ``crop N``: ``N x N``; both placed as torchvision does;
    - ``KIND N``: to ``N x N`` whatever the shape, rounded to bytes; Pillow's, pixel for pixel on any device;
    - ``short-KIND N``: the short side to ``N``, the long one in proportion, as torchvision's ``Resize(N)``;
    - ``KIND-float N``: to ``N x N``, not rounded, clipped to [0, 255], as clean-fid; within 1e-3 on any device.

    Args:
        images: ``(B, C, H, W)`` uint8, on any device.
        steps: applied in order.

    Returns:
        ``(B, C, h, w)`` in [0, 255] on the same device, float32 after a ``KIND-float`` and uint8 otherwise.

    Raises:
        ValueError: a step that is none, or images that are not uint8 ``(B, C, H, W)``.
        UserError: an image is smaller than its crop.
    """
    check_steps(steps)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    for step in steps:
        images = _apply(images, step)
    return images


def prepare_mixed(images: Sequence[Tensor], steps: Sequence[str], device: torch.device | str) -> Tensor:
    """``prepare`` images ``(C, H, W)`` of different sizes on ``device``, those of one size together; order is kept.

    Raises:
        UserError: what comes out has several sizes.
    """
    shapes = [image.shape for image in images]
    groups = [[k for k, each in enumerate(shapes) if each == shape] for shape in dict.fromkeys(shapes)]
    parts = [prepare(torch.stack([images[k] for k in group]).to(device), steps) for group in groups]
    check_one_size([part.shape[1:] for part in parts], steps)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.tensor([k for group in groups for k in group]).argsort()]


def check_one_size(shapes: Iterable[torch.Size], steps: Sequence[str]) -> None:
    """Refuse images ``(C, h, w)`` of several shapes after ``steps``.

    Raises:
        UserError: they have several.
    """
    sizes = sorted({f"{width}x{height}x{channels}" for channels, height, width in shapes})
    if len(sizes) > 1:
        raise UserError(
            f"images must have one width x height x channels after {list(steps)}, got {', '.join(sizes)}; "
            f"add a step such as center-crop or 'bicubic N'"
        )


def _apply(images: Tensor, step: str) -> Tensor:
    match = _STEP.fullmatch(step)
    assert match is not None  # check_steps has seen it.
    height, width = images.shape[-2:]
    if match[1]:
        return crop(images, min(height, width))
    size = int(match[6])
    if match[2]:
        return crop(images, size)
    if match[3]:
        short = min(height, width)
        return resize(images, match[4], size * height // short, size * width // short)
    return resize(images, match[4] or match[5], size, size, rounded=match[5] is None)


def crop(images: Tensor, size: int) -> Tensor:
    """The centre ``(..., size, size)``, placed as torchvision does.

    Raises:
        UserError: an image is smaller.
    """
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise UserError(f"images of {width}x{height} are too small to crop {size}x{size} from; resize them first")
    # Python rounds halves to even, and so torchvision places an odd margin.
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top : top + size, left : left + size]


def resize(images: Tensor, kind: str, height: int, width: int, *, rounded: bool = True) -> Tensor:
    """``(B, C, H, W)`` by Pillow's filter ``kind``, uint8 where ``rounded`` and float32 in [0, 255] otherwise.

    Raises:
        UserError: images that are not bytes, which Pillow would resize otherwise.
    """
    if images.shape[-2:] == (height, width):
        return images if rounded else images.float()
    if images.dtype != torch.uint8:
        raise UserError(f"only uint8 images can be resized to {width}x{height} here, got {images.dtype}")
    if images.device.type != "cpu":
        return _by_products(images, kind, height, width, rounded=rounded)
    # On one thread: Pillow's bytes take a half to a seventh of products, its numbers of small images 1.7 to 3 times.
    if rounded or max(images.shape[-2:]) > _SMALL:
        return _by_pillow(images, kind, height, width, rounded=rounded)
    return _by_doubles(images, kind, height, width)


def _by_doubles(images: Tensor, kind: str, height: int, width: int) -> Tensor:
    """Pillow's numbers, which are rounded to float32 after each axis, but for the last bit of a few."""
    planes = images.flatten(0, 1).double()
    count = len(planes)
    # Plane by plane, so that the bits of an image do not depend on those beside it.
    rows = torch.bmm(planes, _matrix(images.shape[-1], width, kind).T.expand(count, -1, -1)).float().double()
    made = torch.empty(count, height, width)
    for ours, theirs, weights in _bands(images.shape[-2], height, kind):
        made[:, ours] = torch.bmm(weights.expand(count, -1, -1), rows[:, theirs]).clamp_(0, 255)
    return made.unflatten(0, images.shape[:2])


def _by_pillow(images: Tensor, kind: str, height: int, width: int, *, rounded: bool) -> Tensor:
    batch, channels = images.shape[:2]
    if rounded:
        pictures = (to_picture(image) for image in images)
    else:
        pictures = (Image.fromarray(plane.numpy().astype(np.float32)) for plane in images.flatten(0, 1))
    rows = (picture.resize((width, picture.height), KINDS[kind]) for picture in pictures)
    made = torch.from_numpy(np.stack([np.asarray(row.resize((width, height), KINDS[kind])) for row in rows]))
    if rounded:
        return made.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return made.reshape(batch, channels, height, width).clamp_(0, 255)


def _by_products(images: Tensor, kind: str, height: int, width: int, *, rounded: bool) -> Tensor:
    with full_precision(images.device):
        x = images.float()
        for size in (width, height):
            if rounded:
                x = _rounded_pass(x, *_digits(x.shape[-1], size, kind, x.device)).mT
            else:
                x = (x @ _matrix(x.shape[-1], size, kind).to(x).T).mT
    return x.to(torch.uint8) if rounded else x.clamp_(0, 255)


def _rounded_pass(x: Tensor, digits: Sequence[Tensor], base: int) -> Tensor:
    """Resize the last axis of bytes held as float32; rows sum to at most 1.58 in absolute value, which fits 32 bits."""
    total = torch.zeros((), dtype=torch.int32, device=x.device)
    for digit in digits:
        total = total * base + (x @ digit.T).to(torch.int32)
    return ((total + (1 << (_BITS - 1))) >> _BITS).clamp_(0, 255).float()


@lru_cache(maxsize=64)
def _digits(size: int, new_size: int, kind: str, device: torch.device) -> tuple[list[Tensor], int]:
    """Pillow's integer coefficients as float32 digits ``(new_size, size)``, highest first, and their base.

    The base is such that no sum of 255 times a digit exceeds 2^24, up to which float32 counts exactly.
    """
    matrix = _matrix(size, new_size, kind)
    rest = (matrix * 2**_BITS + 0.5 * matrix.sign()).trunc().long()
    base = 1 << ((2**25 // (255 * int((rest != 0).sum(1).max()))).bit_length() - 1)
    digits = []
    while 255 * rest.abs().sum(1).max() > 2**24:
        low = (rest + base // 2) % base - base // 2
        digits.append(low)
        rest = (rest - low) // base
    return [digit.float().to(device) for digit in (rest, *reversed(digits))], base


@lru_cache(maxsize=64)
def _matrix(size: int, new_size: int, kind: str) -> Tensor:
    """Pillow's resampling of one axis as a matrix ``(new_size, size)``, float64."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    reach = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}[kind] * stretch
    centre = (np.arange(new_size)[:, None] + 0.5) * scale
    pixel = np.arange(size)[None]
    inside = (pixel >= np.trunc(centre - reach + 0.5)) & (pixel < np.trunc(centre + reach + 0.5))
    weights = np.where(inside, _filter(kind, (pixel - centre + 0.5) * (1 / stretch)), 0.0)
    return torch.from_numpy(weights * (1 / weights.cumsum(1)[:, -1:]))  # Summed one by one, as Pillow does.


@lru_cache(maxsize=64)
def _bands(size: int, new_size: int, kind: str) -> list[tuple[slice, slice, Tensor]]:
    """``_matrix`` in bands: new rows, the few old ones that they are made of, and the part of the matrix there."""
    bands = []
    for start in range(0, new_size, _BAND):
        part = _matrix(size, new_size, kind)[start : start + _BAND]
        used = part.any(0).nonzero()[:, 0]
        theirs = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(start, start + len(part)), theirs, part[:, theirs].contiguous()))
    return bands


def _filter(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "box":
        return ((x > -0.5) & (x <= 0.5)).astype(np.float64)
    if kind == "lanczos":
        return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)
    x = np.abs(x)
    if kind == "bilinear":
        return np.maximum(1 - x, 0)
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)  # Keys's cubic with a = -1/2.
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
