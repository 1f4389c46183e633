"""DisBack: distribution backtracking (Zhang et al., ICLR 2025, arXiv:2408.15991), round any score distillation.

A teacher is at its worst on the samples of a student that has just begun.  So a path between the two is
recorded first: the fake network learns the untrained student's samples and is kept on the way
(*degradation*).  The student is then led back along that path, each recorded network its teacher for a
while (*backtracking*), and ends with the teacher itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from ..denoiser import Denoiser
from ..process import NoiseProcess
from ..samplers import StudentSampler
from ._score import fake_guided
from .base import Batch, Loss, Method, Nets, Snapshots, Turn
from .dmd import DMD
from .sid import SiD
from .swiftbrush import SwiftBrush


@dataclass(frozen=True, kw_only=True)
class DisBack(Method):
    """Degradation recording, then backtracking by ``method``."""

    paper: ClassVar = "Zhang et al. 2025, arXiv:2408.15991"
    frozen_roles: ClassVar = ("target",)

    name: Literal["disback"] = "disback"
    method: DMD | SiD | SwiftBrush = DMD()
    """The score distillation that follows the path."""
    record_steps: int = 100
    """Steps of degradation: the student stands still, the fake network learns its samples."""
    points: int = 5
    """Points of the path, the teacher among them; ``points - 1`` networks are recorded, evenly spaced."""
    switch_every: int = 100
    """Steps with each recorded network as the teacher."""

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points must be at least 2 (one recorded network and the teacher), got {self.points}")
        if self.record_steps < self.points or self.record_steps % self.points:
            raise ValueError(
                f"record_steps must be a positive multiple of points = {self.points}, got {self.record_steps}"
            )
        if self.switch_every < 1:
            raise ValueError(f"switch_every must be at least 1, got {self.switch_every}")

    @property
    def roles(self) -> tuple[str, ...]:
        return ("fake",)

    def check(self, teacher: Denoiser) -> None:
        self.method.check(teacher)

    @property
    def least_steps(self) -> int:
        return self.record_steps + (self.points - 1) * self.switch_every + 1

    @property
    def takes_images(self) -> bool:
        return self.method.takes_images

    @property
    def judges_conditions(self) -> bool:
        return self.method.judges_conditions

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor | None, ...]:
        return self.method.fake_scales(teacher)

    def typical(self, step: int) -> tuple[int, ...]:
        return self.method.typical(step)

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        return self.method.sampler(process)

    def target(self, step: int) -> int:
        """Which point of the path teaches at ``step``: ``points - 1`` is the nearest to the student, 0 the teacher."""
        switches = max(0, step - self.record_steps) // self.switch_every
        return max(0, self.points - 1 - switches)

    def prepare(self, step: int, nets: Nets, snapshots: Snapshots) -> None:
        every = self.record_steps // self.points
        if 0 < step < self.record_steps and step % every == 0:
            snapshots.keep(_name(step // every), nets["fake"])
        if step >= self.record_steps and self.target(step) > 0:
            snapshots.put(_name(self.target(step)), nets["target"])

    def turns(self, step: int) -> Iterator[Turn]:
        for role, loss, _ in self.method.turns(step):
            if role == "fake":
                yield Turn(role, loss)
            elif step >= self.record_steps:
                yield Turn(role, partial(_led, loss, self.method.fake_guidance) if self.target(step) > 0 else loss)


def _led(loss: Callable[[Nets, Batch], Loss], scale: float, nets: Nets, batch: Batch) -> Loss:
    """``loss`` with a recorded network in the teacher's place, under the guidance ``scale`` it was recorded with.

    Under another scale it is not the denoiser of the samples that it learned.
    """
    return loss({**nets, "teacher": replace(nets["target"], guidance=fake_guided(nets, scale).guidance)}, batch)


def _name(point: int) -> str:
    return f"target_{point}"
