"""Scoring a pipeline: generate by a protocol, and score in memory."""

from __future__ import annotations

import io
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError
from .images import to_picture, to_uint8
from .metrics.base import Value
from .metrics.protocols import Protocol
from .metrics.ranks import rank_and_world
from .metrics.score import Stream
from .metrics.sources import Batch
from .sample import Sampling, Traces, tracing
from .scoring import Options, Run


def gen(
    asked: Sampling, reference: str, options: Options, *, repeats: int | None = None, save_images: Path | None = None
) -> dict[str, Any]:
    """Generate and score in memory.

    Args:
        asked: what generates the images.
        reference: what to compare them with.
        options: the protocol, and how it is run; its prompts are those of ``asked``.
        repeats: sets of images, in place of the protocol's.
        save_images: folder to keep the images in too.

    Raises:
        UserError: a pipeline, an input or a choice that does not work.
    """
    changes: dict[str, object] = {} if options.count is None else {"samples": options.count}
    changes |= {} if repeats is None else {"repeats": repeats}
    run = Run(options, reference, {"labels": "prompts" if options.prompts else "balanced", **changes})
    protocol = run.protocol
    if protocol.quantisation == "none":
        raise UserError(f"{protocol.name} scores images that are not rounded, which gen does not make")
    if options.features is not None and protocol.repeats > 1:
        raise UserError("--features keeps one set of images; add --repeats 1")
    if save_images is not None:
        _save([], [], save_images)
    traces = tracing(asked)
    made = Generated(traces, protocol, options.batch_size, save_images)
    found = [
        run.measured(made.stream(number * protocol.samples), protocol.samples, asked.source)
        for number in range(protocol.repeats)
    ]
    metrics = {name: summed_up([each[name] for each in found], protocol) for name in found[0]}
    total = protocol.samples * protocol.repeats / rank_and_world()[1]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * _rss()
    seconds = sum(seconds for _, seconds in made.batches)
    cost = {"images_per_second": total / seconds, "generation_seconds": seconds, "peak_bytes": peak}
    saved = None if save_images is None else str(save_images)
    return run.record(asked.source, metrics, cost=cost, steps=asked.steps, saved=saved)


class Generated:
    """Images as they are asked for, and what making them took."""

    def __init__(self, traces: Traces, protocol: Protocol, batch_size: int, folder: Path | None = None) -> None:
        self.traces, self.protocol, self.batch_size, self.folder = traces, protocol, batch_size, folder
        self.batches: list[tuple[int, float]] = []
        """Images and seconds of every batch."""

    def stream(self, first: int) -> Stream:
        """The samples ``first + ids``."""

        def batches(ids: Sequence[int]) -> Iterator[Batch]:
            for start in range(0, len(ids), self.batch_size):
                part = ids[start : start + self.batch_size]
                yield Batch(list(part), self._made([first + k for k in part]))

        return batches

    def _made(self, ids: list[int]) -> list[Tensor]:
        began = time.perf_counter()
        pixels = stored(self.traces(ids)[:, -1], self.protocol)
        self.batches.append((len(ids), time.perf_counter() - began))
        if self.folder is not None:
            _save(ids, pixels, self.folder)
        return [image.expand(3, -1, -1) for image in pixels]


def _save(ids: Sequence[int], pixels: Iterable[Tensor], folder: Path) -> None:
    temporary = folder / f"{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for k, image in zip(ids, pixels, strict=True):
            to_picture(image).save(temporary, "PNG", compress_level=1)
            temporary.replace(folder / f"{k:06d}.png")
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write images to {folder}: {error.strerror or error}") from None


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stored(images: Tensor, protocol: Protocol) -> Tensor:
    """Images ``(B, C, H, W)`` in [-1, 1] as the bytes that ``protocol`` reads back, on the CPU."""
    images = images.cpu()
    if protocol.quantisation == "truncate":
        pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    else:
        pixels = to_uint8(images)
    if not protocol.file_form.startswith("jpeg"):
        return pixels  # A PNG gives back what it was given.
    return torch.stack([_through_jpeg(image, int(protocol.file_form.split()[1])) for image in pixels])


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    to_picture(image).save(file, "JPEG", quality=quality)
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def summed_up(repeats: Sequence[Value], protocol: Protocol) -> Value:
    """One value of several repeats, as ``protocol`` reports them."""
    if len(repeats) == 1:
        return repeats[0]
    every = [each.value for each in repeats]
    if protocol.repeats_reported == "min":
        return replace(min(repeats, key=lambda each: each.value), repeats=every)
    errors = [each.se for each in repeats]
    se = None if None in errors else (sum(error**2 for error in errors if error) ** 0.5) / len(every)
    known = [each.debiased for each in repeats if each.debiased is not None]
    debiased = sum(known) / len(known) if len(known) == len(every) else None
    return Value(sum(every) / len(every), se, sum(each.n for each in repeats), debiased, every)
