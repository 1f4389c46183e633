"""One run at a time in a folder: the lock ends with its process, however that ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import UserError
from .ranks import rank_and_world, together

NAME = ".lock"


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
    files = together(lambda: [_locked(folder)] if rank_and_world()[0] == 0 else [])
    try:
        yield
    finally:
        for file in files:
            file.close()


def _locked(folder: Path) -> IO[str]:
    """The open file that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another run keeps its features in {folder}, perhaps one whose launcher was killed; end its processes, "
            "or wait for them"
        ) from None
    except OSError:
        pass  # Some file systems of networks know no locks.
    return file
