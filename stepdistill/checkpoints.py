"""Checkpoints that are either whole or not there: written to a temporary name, listed, renamed, limited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError

from .errors import UserError, first_line

_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        folder: where they live, one sub-folder per step.
        identity: what must not change between the run that wrote one and the run that continues it.
        kept: how many to keep.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, kept: int) -> None:
        self.folder, self.identity, self.kept = folder, identity, kept

    def all(self) -> list[Path]:
        """Finished checkpoints by step."""
        return sorted(path for path in self.folder.glob("step_*") if path.is_dir() and path.suffix != ".tmp")

    def save(self, step: int, accelerator: Accelerator, write: Callable[[Path], object]) -> Path:
        """Let ``write`` fill a folder on every process; a failure on any leaves nothing behind.

        Raises:
            UserError: the checkpoint could not be written (a full disk, say); older ones are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        if final.is_dir():
            return final
        temporary = final.with_suffix(".tmp")

        def fill() -> None:
            temporary.mkdir(parents=True, exist_ok=True)
            write(temporary)

        def finish() -> None:
            if accelerator.is_main_process:
                self._finish(temporary, final, step)

        for phase in (fill, finish):
            reason = _failure(phase)
            if _any(accelerator, bool(reason)):
                if accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)
                kept = f"the newest checkpoint is {self.all()[-1]}" if self.all() else "there is no earlier checkpoint"
                raise UserError(
                    f"cannot write the checkpoint of step {step}: {reason or 'another process failed'}; {kept}. "
                    "Make room, then continue with resume=true"
                )
        return final

    def _finish(self, temporary: Path, final: Path, step: int) -> None:
        """List the files, give the folder its name, and let old checkpoints go."""
        files = {f.relative_to(temporary).as_posix(): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        manifest = {"step": step, "identity": self.identity, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        temporary.rename(final)
        for old in self.all()[: -self.kept]:
            shutil.rmtree(old)

    def newest(self, free: tuple[str, ...] = ()) -> tuple[Path, int]:
        """The newest checkpoint and its step; its identity may differ in what is named in ``free``.

        Raises:
            UserError: there is none, it is truncated, or it belongs to another run.
        """
        found = self.all()
        if not found:
            raise UserError(
                f"nothing to resume: {self.folder} holds no checkpoint; remove the folder or choose another output_dir"
            )
        path = found[-1]
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            step, identity, files = manifest["step"], manifest["identity"], manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"cannot resume: {path} has no readable {_MANIFEST}; delete that folder") from None
        for name, size in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise UserError(
                    f"cannot resume: {path / name} is missing or truncated; delete {path} to use an older one"
                )
        compared = {*identity, *self.identity} - {*free}
        changed = sorted(key for key in compared if identity.get(key) != self.identity.get(key))
        if changed:
            differences = "; ".join(
                f"{key} was {identity.get(key)!r}, is {self.identity.get(key)!r}" for key in changed
            )
            raise UserError(f"cannot resume: {path} was written by another run: {differences}")
        return path, step


def _failure(action: Callable[[], object]) -> str:
    """Why ``action`` could not write, or nothing."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:
        return first_line(error)
    return ""


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` holds on any process."""
    if accelerator.distributed_type == DistributedType.NO:
        return flag
    from accelerate.utils import gather_object

    return any(gather_object([flag]))
