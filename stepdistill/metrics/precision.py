"""Float32 that is float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 means float32 inside: no TF32, no bfloat16 kernels, no autocast; afterwards all is as before.

    cuDNN uses TF32 by default; a Frechet distance moves visibly by it.
    """
    with torch.autocast(device.type, enabled=False), _ieee_backends():
        yield


def tf32(device: torch.device) -> bool:
    """Whether products of float32 matrices or convolutions on ``device`` may be rounded to TF32 now."""
    backends: Any = torch.backends
    if device.type != "cuda":
        return False
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        return backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32
    return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)


@contextmanager
def _ieee_backends() -> Iterator[None]:
    backends: Any = torch.backends
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            backends.cudnn.allow_tf32 = before[1]
        return
    # These switches can be read and restored whether the caller uses them or the older ones; not so the reverse.
    switches = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    values = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, values, strict=True):
            switch.fp32_precision = value
