"""Memory of a run on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one.

    By default it maps every large tensor anew, has the system zero it page by page and unmaps it again, which takes
    about a tenth of a step of a small convolution net.  What is kept is at most 1 GiB.  Other C libraries have no
    such setting, and nothing is done there.  See mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 64 << 20)
