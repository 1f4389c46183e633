"""Arrays in ``.npy`` and ``.npz`` files, read row by row: what lies in memory does not grow with the file."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .errors import UserError

_LOCAL_HEADER = 30
"""Bytes before the name in front of a zip's member; the last four are the lengths of that name and of what follows."""


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """An array ``(N, ...)`` in an open file, which threads and forked processes may read at once."""

    name: str
    """What errors call it."""
    file: IO[bytes]
    start: int
    """Of the first row in the file."""
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """A copy of consecutive ``rows``.

        Raises:
            UserError: the file has become shorter.
        """
        first, last, _ = rows.indices(len(self))
        found = np.empty((max(last - first, 0), *self.shape[1:]), self.dtype)
        left, at = found.data.cast("B") if found.size else memoryview(b""), self.start + first * self.row_bytes
        while left:
            count = os.preadv(self.file.fileno(), [left], at)
            if count == 0:
                raise UserError(f"cannot read {self.name}[{first}]: the file ends before it; was it replaced?")
            left, at = left[count:], at + count
        return found

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


def open_npy(path: Path) -> ArrayFile:
    """The array in ``path``.

    Raises:
        UserError: it is damaged, or holds Python objects.
    """
    try:
        return _array(path.open("rb"), str(path))
    except Exception as error:  # numpy raises several on damaged files.
        raise UserError(f"cannot read {path}: {error}") from None


def open_npz(path: Path, name: str) -> ArrayFile:
    """The array called ``name`` in ``path``, after its checksum was found right.

    Arrays that are compressed are unpacked into a temporary file, which goes with the array.

    Raises:
        UserError: it is damaged, holds Python objects, or there is none of that name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.removesuffix(".npy") for member in archive.namelist()]
            if name not in names:
                raise UserError(f"{path} holds {', '.join(names) or 'nothing'}; expected {name}")
            info = archive.infolist()[names.index(name)]
            if info.compress_type != zipfile.ZIP_STORED:
                return _array(_unpacked(archive, info), str(path))
            with archive.open(info) as member:  # At the end of which zipfile compares the checksum.
                while member.read(1 << 20):
                    pass
        file = path.open("rb")
        file.seek(info.header_offset)
        lengths = struct.unpack("<HH", file.read(_LOCAL_HEADER)[-4:])
        file.seek(sum(lengths), os.SEEK_CUR)
        return _array(file, str(path))
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own on damaged files.
        raise UserError(f"cannot read {path}: {error}") from None


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with archive.open(info) as member:
            shutil.copyfileobj(member, file, 1 << 20)
        file.flush()
    except OSError as error:
        raise UserError(
            f"cannot unpack {archive.filename} into {tempfile.gettempdir()}: {error.strerror or error}; point TMPDIR "
            "to a folder with room, or save it by numpy.savez, which does not compress"
        ) from None
    file.seek(0)
    return file


def _array(file: IO[bytes], name: str) -> ArrayFile:
    """The array that begins where ``file`` is at."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    found = ArrayFile(name, file, file.tell(), shape, dtype)
    if by_columns and len(shape) > 1:
        return _by_rows(found)
    if shape and os.fstat(file.fileno()).st_size < found.start + len(found) * found.row_bytes:
        raise ValueError(f"it ends before its {shape} {dtype} do")
    return found


def _by_rows(found: ArrayFile) -> ArrayFile:
    """The array of a file in Fortran's order, rewritten."""
    columns = np.memmap(found.file, found.dtype, "r", found.start, found.shape, "F")
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    for start in range(0, len(found), 256):
        file.write(columns[start : start + 256].tobytes())
    file.flush()
    return ArrayFile(found.name, file, 0, found.shape, found.dtype)
