"""Generated images kept in a folder, of one run alone, each whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from .errors import UserError
from .images import EXTENSIONS, to_picture

MADE_BY = "made_by.json"


class ImageFolder:
    """A folder of PNG files by sample id, which other processes may write too.

    Args:
        folder: made if it is not there.
        made_by: a checksum of what determines the images; a folder is continued with the same, or not at all.

    Raises:
        UserError: it holds other images, or cannot be written.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = self._found()
            if found not in (None, made_by):
                raise UserError(f"{folder} holds images of another run; name another folder, or delete that one")
            temporary = folder / f"{os.getpid()}.tmp"
            temporary.write_text(json.dumps({"made_by": made_by}) + "\n")
            temporary.replace(folder / MADE_BY)
        except OSError as error:
            raise self._refused(error) from None

    def _found(self) -> str | None:
        """What made the images that are there; ``None`` without any."""
        try:
            return str(json.loads((self.folder / MADE_BY).read_text())["made_by"])
        except FileNotFoundError:
            return "not known" if any(each.suffix.lower() in EXTENSIONS for each in self.folder.iterdir()) else None
        except (KeyError, TypeError, ValueError):
            return "not known"

    def save(self, ids: Sequence[int], pixels: Iterable[Tensor]) -> None:
        """Write uint8 ``(C, H, W)`` images.

        Raises:
            UserError: one cannot be written; those before are kept.
        """
        temporary = self.folder / f"{os.getpid()}.tmp"
        try:
            for k, image in zip(ids, pixels, strict=True):
                to_picture(image).save(temporary, "PNG", compress_level=1)
                temporary.replace(self._file(k))
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise self._refused(error) from None

    def lacking(self, ids: Sequence[int]) -> list[int]:
        """Those of ``ids`` that are not there."""
        return [k for k in ids if not self._file(k).is_file()]

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.png"

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"cannot write images to {self.folder}: {error.strerror or error}")
