"""Images from wherever they lie: a folder, a zip, an array file, memory; read ahead by threads, in order."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arrays import ArrayFile, open_npy, open_npz
from ..errors import UserError
from ..images import DIGITS, EXTENSIONS, TEXT_DIGITS, load_digits, load_text_digits, natural, read_image
from .base import Source

AHEAD = 2
"""Batches that threads read while one is in use."""


def open_source(path: str | Path) -> Source:
    """The images at ``path``, in an order that depends on nothing but their names: ``2.png`` before ``10.png``.

    Args:
        path: a folder of images (with its subfolders) or of ``.npy`` shards, a ``.zip`` of images, an ``.npz`` with
            ``arr_0`` of uint8 ``(N, H, W)`` or ``(N, H, W, C)``, an ``.npy`` of uint8 ``(N, H, W, C)``,
            ``builtin:digits`` (scikit-learn's 1,797 real 8x8 digits) or ``builtin:digits_text`` (the same in six
            styles, 16x16 RGB).  Folders and zips may hold images of
            different sizes.

    Raises:
        UserError: nothing there, nothing in it, images beside arrays, or something unreadable.
    """
    if str(path) == DIGITS:
        return MemorySource(load_digits()[0], label=DIGITS)
    if str(path) == TEXT_DIGITS:
        return MemorySource(load_text_digits()[0], label=TEXT_DIGITS)
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() in _OPENERS:
        return _OPENERS[path.suffix.lower()](path)
    raise UserError(
        f"{path} is neither a folder of images or .npy arrays, a file ending in {', '.join(_OPENERS)}, "
        f"{DIGITS} nor {TEXT_DIGITS}"
    )


def load_images(path: str | Path) -> Tensor:
    """All images of ``open_source`` as uint8 ``(N, C, H, W)``, C = 1 or 3.

    Raises:
        UserError: as ``open_source``; or images of different sizes.
    """
    source = open_source(path)
    pixels = [source.read(k) for k in range(len(source))]
    odd = next((k for k, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        raise UserError(
            f"images must have one size: {source.name(0)} is {_size(pixels[0])} and {source.name(odd)} is "
            f"{_size(pixels[odd])}; convert them first"
        )
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _size(image: np.ndarray) -> str:
    height, width, channels = image.shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


class MemorySource(Source):
    """Images in memory: uint8 ``(N, C, H, W)``, C = 1 or 3, on any device."""

    def __init__(self, images: Tensor, *, label: str = "memory") -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 (N, C, H, W) with C = 1 or 3, got {images.dtype} {tuple(images.shape)}"
            )
        self._images, self._label = images, label

    def __len__(self) -> int:
        return len(self._images)

    def name(self, k: int) -> str:
        return f"{self._label}[{k}]"

    def read(self, k: int) -> np.ndarray:
        return self._images[k].permute(1, 2, 0).cpu().numpy()


class _Files(Source):
    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def name(self, k: int) -> str:
        return str(self._files[k])

    def read(self, k: int) -> np.ndarray:
        return read_image(self._files[k], self.name(k))


class _Arrays(Source):
    """Arrays of files, one after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._arrays = files, [_open_images(file) for file in files]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, k: int) -> str:
        shard, row = self._find(k)
        return f"{self._files[shard]}[{row}]"

    def read(self, k: int) -> np.ndarray:
        shard, row = self._find(k)
        image = self._arrays[shard][row : row + 1][0]
        return image[..., None] if image.ndim == 2 else image

    def _find(self, k: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, k, side="right"))
        return shard, k - int(self._ends[shard]) + len(self._arrays[shard])


class _Zip(Source):
    """Images of a zip file, which every thread and every forked process opens for itself."""

    def __init__(self, path: Path) -> None:
        self._path, self._opened = path, threading.local()
        try:
            names = set(self._archive().namelist())
        except Exception as error:  # zipfile raises several of its own on damaged files.
            raise UserError(f"cannot read {path}: {error}") from None
        # Archives made on a Mac hold a second tree of files that are named like images.
        images = {name for name in names if _is_image(name) and not name.startswith("__MACOSX/")}
        if not images:
            raise UserError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))})")
        self._names = sorted(images, key=lambda name: [natural(part) for part in PurePosixPath(name).parts])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, k: int) -> str:
        return f"{self._path}/{self._names[k]}"

    def read(self, k: int) -> np.ndarray:
        try:
            content = self._archive().read(self._names[k])
        except Exception as error:  # A bad checksum, an unknown compression, a file that was cut after opening.
            raise UserError(f"cannot read the image {self.name(k)}: {error}") from None
        return read_image(io.BytesIO(content), self.name(k))

    def _archive(self) -> zipfile.ZipFile:
        if self._opened.__dict__.get("process") != os.getpid():
            self._opened.archive, self._opened.process = zipfile.ZipFile(self._path), os.getpid()
        return self._opened.archive


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS and not name.endswith("/")


def _open_folder(folder: Path) -> Source:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {folder}: {error}")

    found = [Path(at, name) for at, _, names in os.walk(folder, onerror=refuse) for name in names]
    found.sort(key=lambda file: [natural(part) for part in file.relative_to(folder).parts])
    images = [file for file in found if _is_image(file.name)]
    arrays = [file for file in found if file.suffix.lower() == ".npy"]
    if images and arrays:
        raise UserError(f"{folder} holds both images ({images[0]}) and arrays ({arrays[0]}); keep one kind in a folder")
    if not images and not arrays:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))}) and no .npy arrays")
    return _Files(images) if images else _Arrays(arrays)


def _open_images(file: Path) -> ArrayFile:
    packed = file.suffix.lower() == ".npz"
    array = open_npz(file, "arr_0") if packed else open_npy(file)
    grey = packed and len(array.shape) == 3
    if array.dtype != np.uint8 or not (grey or (len(array.shape) == 4 and array.shape[-1] in (1, 3))):
        place, form = (": arr_0", "(N, H, W) or ") if packed else ("", "")
        raise UserError(
            f"{file}{place} must be uint8 {form}(N, H, W, C) with C = 1 or 3, got {array.dtype} {array.shape}"
        )
    return array


_OPENERS: dict[str, Callable[[Path], Source]] = {
    ".zip": _Zip,
    ".npz": lambda path: _Arrays([path]),
    ".npy": lambda path: _Arrays([path]),
}


class Batch(NamedTuple):
    """Some images of a source."""

    ids: list[int]
    images: list[Tensor]
    """``(C, H, W)`` uint8 each, sizes may differ."""


def batches(
    source: Source,
    ids: Sequence[int],
    *,
    batch_size: int,
    workers: int = 0,
    rgb: bool = False,
    skip_broken: list[str] | None = None,
) -> Generator[Batch]:
    """Read ``ids`` of ``source`` in their order; the result is the same for any number of threads.

    Args:
        source: where the images are.
        ids: which of them.
        batch_size: images in a batch; fewer in the last one, and where broken ones are left out.
        workers: threads, which read at most ``AHEAD`` batches ahead; 0 reads when a batch is asked for.
        rgb: whether grey images are repeated to three channels.
        skip_broken: a list that takes the names of images that cannot be read, which are then left out; ``None``
            makes the first of them an error.

    Raises:
        UserError: an image cannot be read.
        ValueError: ``batch_size`` below 1 or ``workers`` below 0.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be >= 1 and workers >= 0, got {batch_size} and {workers}")

    def load(part: Sequence[int]) -> list[tuple[int, Tensor | None]]:
        return [(k, _load(source, k, rgb, optional=skip_broken is not None)) for k in part]

    # Threads share every batch, so that what lies in memory does not grow with their number.
    share = -(-batch_size // max(workers, 1))
    for loaded in _in_order(load, ids, batch_size, share, workers):
        if skip_broken is not None:
            skip_broken += [source.name(k) for k, image in loaded if image is None]
        kept = [(k, image) for k, image in loaded if image is not None]
        if kept:
            yield Batch([k for k, _ in kept], [image for _, image in kept])


def _load(source: Source, k: int, rgb: bool, *, optional: bool) -> Tensor | None:
    try:
        image = torch.from_numpy(source.read(k)).permute(2, 0, 1)
    except UserError:
        if optional:
            return None
        raise
    return image.expand(3, -1, -1) if rgb else image


def _in_order(
    load: Callable[[Sequence[int]], list], ids: Sequence[int], batch_size: int, share: int, workers: int
) -> Iterator[list]:
    """``load`` of each batch of ``ids``, done by ``workers`` threads in shares."""
    groups = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    if workers == 0:
        yield from map(load, groups)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[list] = deque()
    try:
        for group in groups:
            waiting.append([pool.submit(load, group[at : at + share]) for at in range(0, len(group), share)])
            if len(waiting) > AHEAD:
                yield [image for part in waiting.popleft() for image in part.result()]
        while waiting:
            yield [image for part in waiting.popleft() for image in part.result()]
    finally:  # Also when the caller stops early or an image is broken: nothing more is read.
        pool.shutdown(cancel_futures=True)
