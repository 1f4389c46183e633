"""Features of single samples, kept on disk and read in blocks: what lies in memory does not grow with the samples."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..arrays import ArrayFile
from ..errors import UserError
from .feature_sets import BLOCK
from .ranks import gathered, rank_and_world, together


class FeatureFile:
    """Features ``(N, d)`` by sample id, in a temporary file that goes with this object.

    They are written in any order, then ``join``, then read in the order of their ids.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        """Of the samples that are there, sorted by ``join``."""
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._width, self._dtype = 0, np.dtype(np.float32)

    def write(self, ids: Sequence[int], features: Tensor) -> None:
        """Keep ``(n, d)`` features of the samples ``ids``.

        Raises:
            UserError: the disk is full.
        """
        rows = features.cpu().contiguous().numpy()
        self._width, self._dtype = rows.shape[1], rows.dtype
        try:
            for k, row in zip(ids, rows, strict=True):
                if os.pwrite(self._file.fileno(), row.data, k * row.nbytes) < row.nbytes:
                    raise OSError(None, "no space left")
        except OSError as error:
            raise UserError(
                f"cannot keep features in {tempfile.gettempdir()}: {error.strerror}; point TMPDIR to a folder with room"
            ) from None
        self.ids += ids

    def join(self) -> None:
        """Take the features of the other processes too, some of each at a time.

        Raises:
            UserError: the disk of one of them is full.
        """
        rank, world = rank_and_world()
        mine, rounds = list(self.ids), max(gathered(-(-len(self.ids) // BLOCK))) if world > 1 else 0
        for start in range(0, rounds * BLOCK, BLOCK):
            part = mine[start : start + BLOCK]
            found = gathered((part, torch.cat([self._rows(k, k + 1) for k in part]) if part else None))
            others = [(ids, rows) for number, (ids, rows) in enumerate(found) if rows is not None and number != rank]
            together(lambda others=others: [self.write(ids, rows) for ids, rows in others])
        self.ids.sort()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> torch.Size:
        """``(N, d)``."""
        return torch.Size((len(self.ids), self._width))

    def __getitem__(self, rows: slice) -> Tensor:
        """Consecutive features, in the order of their ids."""
        ids = self.ids[rows]
        if not ids:
            return self._rows(0, 0)
        # Broken images, which were left out, leave holes.
        return self._rows(ids[0], ids[-1] + 1)[torch.tensor(ids) - ids[0]]

    def _rows(self, first: int, last: int) -> Tensor:
        file = ArrayFile("features", self._file, 0, (last, self._width), self._dtype)
        return torch.from_numpy(file[first:last])
