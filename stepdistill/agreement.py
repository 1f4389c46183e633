"""A picture of the samples on which two runs agree best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from .errors import UserError
from .images import to_float
from .metrics.base import Source
from .metrics.resampling import prepare
from .metrics.sources import batches, open_source
from .report import grid, write_figure

SIDE = 256
"""Larger images are drawn this large."""


def draw(path: Path, runs: Mapping[str, str], apart: Tensor, *, pairs: int = 8) -> None:
    """Write a PNG of the pairs of images with the nearest and with the farthest features, one run above the other.

    Args:
        path: the file; its folder exists.
        runs: where the images of either lie, by the name of the run.
        apart: distance ``(N,)`` of the features of image ``k`` of both.
        pairs: how many of each kind.

    Raises:
        UserError: there are no images, fewer than features, or the file cannot be written.
    """
    sources = [_source(name, images, len(apart)) for name, images in runs.items()]
    order = apart.argsort().tolist()
    figure, axes = plt.subplots(2, 1, figsize=(9, 6))
    for axis, kind, ids in zip(axes, ("best", "worst"), (order[:pairs], order[::-1][:pairs]), strict=True):
        tiles = torch.cat([_tiles(source, ids) for source in sources])
        axis.imshow(grid(tiles, columns=len(ids)), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{' above '.join(runs)}, agreeing {kind}: images {', '.join(map(str, ids))}", fontsize=8)
        axis.set_axis_off()
    write_figure(path, figure)


def _source(name: str, images: str, count: int) -> Source:
    try:
        source = open_source(images)
    except UserError as error:
        message = f"--plot draws images, and those of {name} were not kept (gen --save-images does): {error}"
        raise UserError(message) from None
    if len(source) < count:
        raise UserError(f"{images} holds {len(source)} images, and {name} has features of {count}")
    return source


def _tiles(source: Source, ids: Sequence[int]) -> Tensor:
    """Square colour images ``(B, 3, S, S)`` in [-1, 1]."""
    [batch] = batches(source, ids, batch_size=len(ids), rgb=True)
    return to_float(torch.cat([prepare(image[None], [f"bicubic {SIDE}"]) for image in batch.images]))
