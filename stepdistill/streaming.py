"""A safetensors file that is written a few rows at a time, so that it may be larger than the memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .conditions import Cond

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""What the format calls the types that conditions have."""


def write_rows(path: Path, parts: Iterable[Cond], count: int, whole: Cond) -> None:
    """Write ``count`` rows, which ``parts`` gives in order and a few at a time, and the tensors of ``whole``.

    ``safetensors.torch.load_file`` maps the file into memory: what is not looked at is not read.
    """
    parts = iter(parts)
    first = next(parts)
    shapes = {name: (value.dtype, (count, *value.shape[1:])) for name, value in first.items()}
    shapes |= {name: (value.dtype, tuple(value.shape)) for name, value in whole.items()}
    header, start = _header(shapes)
    with path.open("wb") as file:
        file.write(header)

        def put(name: str, value: Tensor, row: int = 0) -> None:
            dtype, shape = shapes[name]
            assert (value.dtype, value.shape[1:]) == (dtype, shape[1:])
            file.seek(start[name] + row * math.prod(shape[1:]) * dtype.itemsize)
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

        for name, value in whole.items():
            put(name, value)
        done, part = 0, first
        while part is not None:
            for name, value in part.items():
                put(name, value, done)
            done, part = done + len(next(iter(part.values()))), next(parts, None)
    assert done == count


def _header(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where in it every tensor starts: wide types first, so that all are aligned."""
    told, end = {}, 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        size = math.prod(shape) * dtype.itemsize
        told[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + place["data_offsets"][0] for name, place in told.items()}
