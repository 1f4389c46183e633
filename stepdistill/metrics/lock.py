"""One run at a time in a folder: the lock ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .ranks import rank_and_world, together


@contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """Keep other runs out of ``folder``, for all processes of this one.

    Processes may outlive the launcher that was killed, and go on writing.

    Raises:
        UserError: another run is in it, or it cannot be made.
    """
    if folder is None:
        yield
        return
    opened = together(lambda: [_locked(folder)] if rank_and_world()[0] == 0 else [])
    try:
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _locked(folder: Path) -> int:
    """The open folder, which holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run keeps its features in {folder}, perhaps one whose launcher was killed; end its processes, "
            "or wait for them"
        ) from None
    except OSError:
        pass  # Some file systems of networks know no locks.
    return descriptor
