"""Every extractor by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundled import bundled
from ..errors import UserError
from .base import Extractor, Features
from .clip import ClipVitB32, ClipVitL14At336
from .digits import DigitsExtractor
from .dinov2 import DinoV2, DinoV2Pillow
from .inception import CleanInception, Inception, PytorchInception
from .weights import find_weights, sha256_of


class Digits(Extractor):
    """The bundled extractor of 8x8 digits, which needs no download."""

    name = "digits"
    dimension = DigitsExtractor.dimension
    dtype = "float64"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.weights = sha256_of(bundled("assets") / f"{DigitsExtractor.name}.safetensors")
        self._extract = DigitsExtractor(device)

    def __call__(self, images: Tensor) -> Features:
        return Features(self._extract(images))

    def classify(self, images: Tensor) -> Tensor:
        """The digit 0..9 seen in each uint8 ``(N, C, 8 k, 8 k)`` image, ``(N,)``."""
        return self._extract.classify(images)


class _Entry(NamedTuple):
    weights: str
    make: Callable[..., Extractor]


EXTRACTORS = {
    Inception.name: _Entry("inception", Inception),
    CleanInception.name: _Entry("inception", CleanInception),
    PytorchInception.name: _Entry("inception-pytorch", PytorchInception),
    DinoV2.name: _Entry("dinov2-vit-l-14", DinoV2),
    DinoV2Pillow.name: _Entry("dinov2-vit-l-14", DinoV2Pillow),
    ClipVitB32.name: _Entry("clip-vit-b-32", ClipVitB32),
    ClipVitL14At336.name: _Entry("clip-vit-l-14-336", ClipVitL14At336),
}
"""Extractors that need weights, and which; ``digits`` is beside them."""

PACKAGES = {"inception-pytorch": "torchvision", "dinov2": "transformers", "clip": "open_clip_torch"}
"""Beside torch, what networks are built by, by the start of their names."""


def load_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
    download: bool = False,
) -> Extractor:
    """The extractor called ``name``, ready to use.

    Args:
        name: key of ``EXTRACTORS``, or ``digits``.
        weights: its file, or a folder that holds it; by default it is looked for, see ``find_weights``.
        device: where the network lives.
        trust: take weights whose checksum is not the known one.
        download: fetch weights that are nowhere to be found.

    Raises:
        UserError: no such extractor, or no weights for it.
    """
    if name == Digits.name:
        if weights:
            raise UserError(f"the extractor {name} has its weights in the package; drop --weights {weights}")
        return Digits(device=device)
    if name not in EXTRACTORS:
        raise UserError(f"unknown extractor {name}; known are {', '.join([Digits.name, *EXTRACTORS])}")
    entry = EXTRACTORS[name]
    return entry.make(find_weights(entry.weights, path=weights, trust=trust, download=download), device=device)
