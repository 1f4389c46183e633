"""Short checksums that tell one set of files or texts from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .bundled import BUILTIN
from .metrics.weights import sha256_of

_LARGE = 1 << 30
"""Bytes from which on a file of images is told by its size."""


def of_texts(texts: Sequence[str]) -> str:
    """A checksum of ``texts`` in their order."""
    return _short(repr(list(texts)))


def of_files(folder: Path) -> str:
    """A checksum of names and contents of all files in ``folder``."""
    return _short(repr([(name, sha256_of(file)) for name, file in _files(folder)]))


def of_images(path: str) -> str:
    """Images at ``path``, which may be many: names, sizes and times of change are read, and no image."""
    if path.startswith(BUILTIN):
        return path
    told = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in _files(Path(path))]
    return f"{path} ({_short(repr(told))})"


def of_reference(path: str) -> str:
    """A reference by its content where that is cheap, wherever it lies: of a folder by names and sizes."""
    if path.startswith(BUILTIN):
        return path
    file = Path(path)
    if file.is_file() and file.stat().st_size < _LARGE:
        return sha256_of(file)
    return _short(repr([(name, each.stat().st_size) for name, each in _files(file)]))


def _files(path: Path) -> list[tuple[str, Path]]:
    """All files at ``path`` with their names in it, in order; one file has none."""
    path = path.expanduser()
    if path.is_file():
        return [("", path)]
    return sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
