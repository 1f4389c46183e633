"""The pipeline file that a student travels with where it is asked to: its own defaults, any grid of levels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .bundled import bundled

_TEMPLATE = "student_v1"
_BLANK = "STUDENT: dict[str, Any] = {}\n"
_CLASS = "StudentPipeline"


def write_code(folder: Path, *, stock: str, call: dict[str, Any], grid: dict[str, Any] | None) -> Path:
    """Write the student's pipeline file into its ``folder``; returns it.

    Args:
        folder: an exported pipeline.
        stock: class of the stock pipeline that the student is called through.
        call: what a plain call says.
        grid: from ``grid`` where no stock scheduler runs the student: then the folder names the file's class.
    """
    student = {"stock": stock, "call": call, "grid": grid, "sole": grid is not None}
    text = (bundled("pipelines") / f"{_TEMPLATE}.py").read_text()
    assert text.count(_BLANK) == 1
    text = text.replace(_BLANK, f"STUDENT: dict[str, Any] = {student!r}\n")
    # Two students in one process must not share a module.
    path = folder / f"{_TEMPLATE}_{hashlib.sha256(text.encode()).hexdigest()[:10]}.py"
    path.write_text(text)
    if grid is not None:
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [path.stem, _CLASS]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path


def code_of(folder: Path) -> Path | None:
    """The student's pipeline file in ``folder``, where it has one."""
    return next(iter(sorted(folder.glob(f"{_TEMPLATE}_*.py"))), None)


def runs_own_code(pipeline: Any) -> bool:  # noqa: ANN401
    """Whether a loaded pipeline is of a class that came with its folder."""
    return type(pipeline).__module__.startswith("diffusers_modules")
