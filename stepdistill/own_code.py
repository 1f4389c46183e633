"""The pipeline file that a student travels with where it is asked to: its own defaults, any grid of levels."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bundled import bundled
from .conditions import Cond
from .denoiser import Denoiser
from .samplers import StudentSampler

_TEMPLATE = "student_v1"
_BLANK = "STUDENT: dict[str, Any] = {}\n"
_CLASS = "StudentPipeline"


def grid(denoiser: Denoiser, sampler: StudentSampler) -> dict[str, Any]:
    """The settings of the file's ``StudentScheduler``: what every call of the sampler does, read off the denoiser."""
    process, calls = denoiser.process, []
    for time in sampler.times:
        t, seen = torch.tensor([time], dtype=torch.float64), []
        skip, output = (_answer(denoiser, t, state, value, seen) for state, value in ((1.0, 0.0), (0.0, 1.0)))
        fed, label = seen[0]
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        calls.append({"label": label, "alpha": alpha, "sigma": sigma, "input": fed, "skip": skip, "output": output})
    first = torch.tensor([sampler.times[0]], dtype=torch.float64)
    start = process.student_input(torch.ones(1, 1, dtype=torch.float64), first, sampler.input).item()
    return {"calls": calls, "start": start, "renoising": sampler.renoising, "clip_sample": sampler.clip_sample}


def _answer(denoiser: Denoiser, t: Tensor, state: float, value: float, seen: list[tuple[float, float]]) -> float:
    """``x0`` at ``state`` for a network that returns ``value``; notes what it was fed and told."""

    def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        seen.append((x.item(), label.item()))
        return torch.full_like(x, value)

    # The numbers are before the sign of networks that output minus their target.
    return replace(denoiser, call=call, guidance=None)(torch.full((1, 1), state, dtype=torch.float64), t).x0.item()


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
