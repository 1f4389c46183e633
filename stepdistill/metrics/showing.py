"""Showing images to networks, always so many at once, so that what they say of one is the same bits in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .base import Features
from .precision import full_precision
from .resampling import check_one_size, prepare_mixed
from .sources import Batch

Steps = tuple[str, ...]
"""See ``resampling.prepare``."""
Stream = Callable[[Sequence[int]], Iterable[Batch]]
"""Images of the given ids, in order."""


@dataclass(frozen=True, eq=False)
class Network:
    """What turns images into features, and how they are prepared for it."""

    name: str
    dimension: int
    steps: Steps
    see: Callable[[Tensor, Sequence[int]], Features]
    """Features of images ``(B, C, H, W)`` that are the samples of these ids."""
    weights: str
    """sha256 of its file."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of its features."""
    marked: bool = False
    """Whether a metric wants images in an order that their files have no say in."""


def at_once(device: torch.device) -> int:
    """Images of a call in float32, where products round differently with their rows: values move by 1e-7 of them.

    On a CPU four images take the time of more, and what is made of them on the way stays in the cache.
    """
    return 4 if device.type == "cpu" else 32


def shown(
    stream: Stream, ids: Sequence[int], told: Sequence[Network], device: torch.device
) -> Iterator[tuple[list[int], dict[Network, Features]]]:
    """What every network says of each batch of ``stream``.

    Raises:
        UserError: images that cannot be read, or whose sizes the protocol does not make one.
    """
    coarse = any(network.dtype == "float32" for network in told)
    shapes: dict[Steps, torch.Size] = {}
    with _each(device) as each:
        for batch in stream(ids):
            size = at_once(device) if coarse else len(batch.ids)
            seen = partial(_seen, size=size, told=told, device=device, shapes=shapes)
            parts = [slice(start, start + size) for start in range(0, len(batch.ids), size)]
            # Once for all threads: it sets, and puts back, what is of the whole process.
            with full_precision(device):
                found = list(each(seen, [batch.images[part] for part in parts], [batch.ids[part] for part in parts]))
            joined = {network: _joined([part[network] for part in found]) for network in told}
            marked = {n: f._replace(marks=_marks(batch.images)) if n.marked else f for n, f in joined.items()}
            yield batch.ids, marked


@contextmanager
def _each(device: torch.device) -> Iterator[Callable[..., Iterable[dict[Network, Features]]]]:
    """``map``; on a CPU in as many threads as torch may use, each with one for its products, whose bits they decide."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # Also what threads of others begin with.


def _seen(
    images: list[Tensor],
    ids: list[int],
    *,
    size: int,
    told: Sequence[Network],
    device: torch.device,
    shapes: dict[Steps, torch.Size],
) -> dict[Network, Features]:
    """What networks say of images, the last of which fills up to ``size``; ``shapes`` are those of images before."""
    count, lacking = len(ids), size - len(ids)
    images, ids = images + images[-1:] * lacking, ids + ids[-1:] * lacking
    prepared = {steps: prepare_mixed(images, steps, device) for steps in {network.steps for network in told}}
    for steps, made in prepared.items():
        shape = made.shape[1:]
        check_one_size([shapes.setdefault(steps, shape), shape], steps)
    found = {network: network.see(prepared[network.steps], ids) for network in told}
    return {
        network: Features(features[:count], None if logits is None else logits[:count])
        for network, (features, logits, _) in found.items()
    }


def _joined(parts: Sequence[Features]) -> Features:
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)


def _marks(images: Sequence[Tensor]) -> Tensor:
    """The first eight bytes of a hash of each image."""
    hashes = [hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest() for image in images]
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in hashes])
