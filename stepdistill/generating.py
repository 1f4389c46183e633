"""Scoring a pipeline: generate by a protocol, and score in memory."""

from __future__ import annotations

import io
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .errors import UserError
from .identity import of_texts
from .image_folder import ImageFolder
from .images import to_picture, to_uint8
from .labels import followed, inputs
from .metrics.base import Value
from .metrics.collecting import Stream
from .metrics.precision import tf32
from .metrics.protocols import Protocol
from .metrics.ranks import gathered, rank_and_world, together
from .metrics.sources import Batch
from .sample import tracing
from .sampling import Sampling, Traced, Traces, made_by
from .scoring import Options, Run


def gen(
    asked: Sampling,
    reference: str | None,
    options: Options,
    *,
    repeats: int | None = None,
    save_images: Path | None = None,
) -> dict[str, Any]:
    """Generate and score in memory.

    Args:
        asked: what generates the images; the protocol says which labels they have.
        reference: what to compare them with, where a metric does.
        options: the protocol, and how it is run; its prompts are those of ``asked``.
        repeats: sets of images, in place of the protocol's.
        save_images: folder to keep the images in too.

    Raises:
        UserError: a pipeline, an input or a choice that does not work.
    """
    return Session(reference, options, repeats).scored(asked, options.features, save_images)


class Session:
    """A protocol and its reference, read once, for one pipeline in any number of settings.

    Raises:
        UserError: a choice under which nothing can be generated.
    """

    def __init__(self, reference: str | None, options: Options, repeats: int | None = None) -> None:
        changes: dict[str, object] = {} if options.count is None else {"samples": options.count}
        changes |= {} if repeats is None else {"repeats": repeats}
        self.run = Run(options, reference, changes)
        if self.run.protocol.quantisation == "none":
            raise UserError(f"{self.run.protocol.name} scores images that are not rounded, which gen does not make")
        if options.features is not None and self.run.protocol.repeats > 1:
            raise UserError("--features keeps one set of images; add --repeats 1")
        self._law = self.run.protocol.labels

    def scored(self, asked: Sampling, features: Path | None, save_images: Path | None) -> dict[str, Any]:
        """Generate what is ``asked`` and score it; see ``gen``."""
        run = self.run
        run.begin(features)
        source = asked.source if features is None and save_images is None else made_by(asked)
        images = None if save_images is None else together(lambda: self._folder(save_images, source))
        asked, traced = self._traced(asked)
        protocol = run.protocol
        made = Generated(traced.traces, protocol, run.options.batch_size, images, held_bytes=_allocated())
        calls, latency = _alone(traced)
        found = []
        for number in range(protocol.repeats):
            before = made.seconds
            found.append(run.measured(made.stream(number * protocol.samples), protocol.samples, source))
            run.seconds["features"] -= made.seconds - before
        made.complete(protocol.repeats * protocol.samples)
        run.seconds["generation"] = made.seconds
        metrics = {name: summed_up([each[name] for each in found], protocol) for name in found[0]}
        cost = {"network_calls": calls, "latency_seconds": latency, **_speed(made)}
        dtype = str(next(traced.networks[0].parameters()).dtype).removeprefix("torch.")
        told = {"steps": asked.steps, "labels": asked.labels, "dtype": dtype, "tf32": tf32(run.device)}
        saved = None if save_images is None else str(save_images)
        return run.record(asked.source, metrics, cost=cost, generator=told, saved=saved)

    def _folder(self, path: Path, source: str) -> ImageFolder:
        told = self.run.protocol
        return ImageFolder(path, of_texts([source, str(told.samples), self._law, told.quantisation, told.file_form]))

    def _traced(self, asked: Sampling) -> tuple[Sampling, Traced]:
        """The pipeline under the labels of the protocol, which then says what the pipeline takes of them."""
        law = self._law if asked.labels is None else "balanced"
        asked = replace(asked, law=law, period=self.run.protocol.samples)
        traced = tracing(asked)
        self.run.change({"labels": followed(traced.told, law)})
        self.run.inputs = inputs(traced.told, traced.conditions, self.run.protocol.samples)
        return asked, traced


def _alone(traced: Traced) -> tuple[float, float]:
    """Network calls of one sample, one of a guided network for each of its two inputs, and its seconds."""
    rows = []

    def count(network: nn.Module, inputs: tuple[object, ...], told: dict[str, object]) -> None:
        rows.append(next(len(x) for x in (*inputs, *told.values()) if isinstance(x, Tensor) and x.ndim > 1))

    hooks = [network.register_forward_pre_hook(count, with_kwargs=True) for network in traced.networks]
    traced.traces([0])
    for hook in hooks:
        hook.remove()
    return sum(rows), latency(traced.traces)


def latency(traces: Traces) -> float:
    """Seconds of one image alone: the median of up to three, after what is built for the first, within a second."""
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < 1:
        began = time.perf_counter()
        traces([0])[:, -1].cpu()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:] or seconds)


def _speed(made: Generated) -> dict[str, Any]:
    """Of the images that were made now, on all processes; none were where a run was complete."""
    parts = gathered((sum(count for count, _ in made.batches), made.seconds, made.peak_bytes))
    images, seconds = (sum(part[k] for part in parts) for k in range(2))
    return {
        "images_generated": images,
        "images_per_second": images / seconds if images else None,
        "generation_peak_bytes": max(part[2] for part in parts) or None,
        "peak_bytes": peak_bytes(made),
    }


def peak_bytes(made: Generated) -> int:
    """Of this process: on the GPU, if any."""
    process = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * _rss()
    return max(process, made.process_peak_bytes)


def _allocated() -> int:
    """Bytes on the GPU, if any."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Generated:
    """Images as they are asked for, and what making them took."""

    def __init__(
        self,
        traces: Traces,
        protocol: Protocol,
        batch_size: int,
        images: ImageFolder | None = None,
        *,
        held_bytes: int = 0,
    ) -> None:
        self.traces, self.protocol, self.batch_size, self.images = traces, protocol, batch_size, images
        self.held_bytes = held_bytes
        """What the pipeline takes on the GPU between batches."""
        self.batches: list[tuple[int, float]] = []
        """Images and seconds of every batch."""
        self.peak_bytes = 0
        """What the pipeline took on the GPU at most, without the networks behind the metrics; 0 on the CPU."""
        self.process_peak_bytes = 0
        """All that was taken there before the last batch."""

    @property
    def seconds(self) -> float:
        """That were spent on generating."""
        return sum(seconds for _, seconds in self.batches)

    def stream(self, first: int) -> Stream:
        """The samples ``first + ids``."""

        def batches(ids: Sequence[int]) -> Iterator[Batch]:
            for start in range(0, len(ids), self.batch_size):
                part = ids[start : start + self.batch_size]
                yield Batch(list(part), self._made([first + k for k in part]))

        return batches

    def complete(self, count: int) -> None:
        """Make the images that are to be kept and are not there, as their features were; processes share them."""
        rank, world = rank_and_world()

        def make() -> None:
            lacking = [] if self.images is None else self.images.lacking(range(rank, count, world))
            for start in range(0, len(lacking), self.batch_size):
                self._made(lacking[start : start + self.batch_size])

        together(make)

    def _made(self, ids: list[int]) -> list[Tensor]:
        began, others = time.perf_counter(), _allocated() - self.held_bytes
        if torch.cuda.is_available():
            self.process_peak_bytes = max(self.process_peak_bytes, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        pixels = stored(self.traces(ids)[:, -1], self.protocol)
        self.batches.append((len(ids), time.perf_counter() - began))
        if torch.cuda.is_available():
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
        if self.images is not None:
            self.images.save(ids, pixels)
        return [image.expand(3, -1, -1) for image in pixels]


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
