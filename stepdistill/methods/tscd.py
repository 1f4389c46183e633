"""TSCD: trajectory-segmented consistency distillation (Hyper-SD, Ren et al. 2024, arXiv:2404.13686), without images.

The teacher's K DDIM steps from noise to data are cut into M segments of equal length.  From any state ``x_k`` of a
segment the student jumps to the segment's end, ``J(x_k, k -> n) = alpha_n x0 + sigma_n eps``, and the jumps from
``x_k`` and from the teacher's next state ``x_{k+1}`` shall arrive at the same place.  M falls from stage to stage.
At last M deterministic jumps generate, one per segment (PCM, Wang et al. 2024, arXiv:2405.18407).

The papers take ``x_k`` from noised images.  Here the states are the teacher's own: a batch of its trajectories is
always on the way, one step further in every training step, so that a pair of neighbours costs one teacher call.

A score distillation may join the last stage, as it does for Hyper-SD's one-step student.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..process import VP, InputScale, NoiseProcess
from ..samplers import StudentSampler
from ._grid import Grid, Pairs, column, solver_grid
from ._score import steered
from ._shared import check_start, few_step_times, pixel_mean
from .base import Batch, Loss, Method, Nets, Snapshots, Turn
from .dmd import DMD
from .sid import SiD
from .swiftbrush import SwiftBrush

_FOREIGN = ("steps", "init_ratio", "levels", "input", "renoising", "clip_sample", "matched", "adversarial")
_X, _K, _COND = "tscd_x", "tscd_k", "tscd_cond_"
"""The trajectories on the way, in ``Batch.memory``: states ``(B, ...)``, indices ``(B,)`` and conditions."""


@dataclass(frozen=True, kw_only=True)
class TSCD(Method):
    """Trajectory-segmented consistency distillation into a few deterministic steps, or one."""

    paper: ClassVar = "Ren et al. 2024, arXiv:2404.13686"
    every_level: ClassVar = True

    name: Literal["tscd"] = "tscd"
    segments: tuple[int, ...] = (8, 4, 2, 1)
    """Segments of each stage; the last number is the student's steps."""
    stage_steps: tuple[int, ...] = (1000, 1000, 1000)
    """Training steps of each stage but the last, which takes the rest of the run."""
    teacher_steps: int = 40
    """DDIM steps K of a teacher trajectory; on a table of N entries every ``round(N / K)``-th is visited."""
    init_ratio: float = float("inf")
    """``sigma / alpha`` at which trajectories start, about 10 for eps-teachers; ``inf`` is pure noise."""
    input: InputScale = "unit"
    """What trajectories start with: the noise itself, or ``sigma`` times it (VE)."""
    clip_sample: bool = False
    """Compare pictures: every ``x0`` of the student is clipped to [-1, 1], as the pipeline will do; what lies beyond
    has no gradient."""
    distance: Literal["huber", "l2"] = "huber"
    """How far two jumps are apart, per element: ``sqrt(r^2 + c^2) - c`` or ``r^2``."""
    huber_c: float = 0.001
    """Residual below which the pseudo-Huber distance is quadratic."""
    score: DMD | SiD | SwiftBrush | None = None
    """A score distillation of the last stage's samples, whose gradient is added there; null is none."""
    score_weight: float = 1.0
    """What its gradient is multiplied by, per pixel as the distance is."""

    def __post_init__(self) -> None:
        if not self.segments or self.segments[-1] < 1 or any(m <= n for m, n in pairwise(self.segments)):
            raise ValueError(f"segments must be decreasing positive numbers, got {self.segments}")
        if self.teacher_steps < 1 or any(self.teacher_steps % count for count in self.segments):
            raise ValueError(
                f"teacher_steps must be a positive multiple of all segments {self.segments}, got {self.teacher_steps}"
            )
        if len(self.stage_steps) != len(self.segments) - 1 or any(steps < 1 for steps in self.stage_steps):
            raise ValueError(
                f"stage_steps must be {len(self.segments) - 1} positive numbers, one for each of the segments "
                f"{self.segments} but the last, got {self.stage_steps}"
            )
        for name in ("init_ratio", "huber_c", "score_weight"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}")
        told, usual = (vars(score) for score in (self.score or DMD(), type(self.score or DMD())()))
        if foreign := [name for name in _FOREIGN if told[name] != usual[name]]:
            raise ValueError(f"score follows the student of tscd; remove {foreign[0]} from it, got {told[foreign[0]]}")

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        if self.score:
            self.score.check(teacher)
        process = teacher.process
        if isinstance(process, VP) and len(process.alphas_cumprod) < self.teacher_steps:
            entries = len(process.alphas_cumprod)
            raise ValueError(
                f"teacher_steps must be at most the {entries} entries of the teacher's table, got {self.teacher_steps}"
            )
        check_start("TSCD", teacher, self.sampler(process).times[0], self.input, "method.init_ratio=20")

    @property
    def roles(self) -> tuple[str, ...]:
        return self.score.roles if self.score else ()

    @property
    def least_steps(self) -> int:
        return sum(self.stage_steps) + 1

    def stage(self, step: int) -> int:
        """Index into ``segments`` of the stage that ``step`` belongs to."""
        return bisect_right(list(accumulate(self.stage_steps)), step)

    def prepare(self, step: int, nets: Nets, snapshots: Snapshots) -> None:
        """Publish the student of every stage that ends here; the last one is what the run exports."""
        if step and self.stage(step) != self.stage(step - 1):
            ended = self.segments[self.stage(step) - 1]
            sampler = replace(self, segments=(ended,), stage_steps=()).sampler(nets["teacher"].process)
            snapshots.publish(f"segments_{ended}", nets["student"], sampler)

    def turns(self, step: int) -> Iterator[Turn]:
        segments = self.segments[self.stage(step)]
        scored = self.score is not None and segments == self.segments[-1]
        for _ in range(self.score.fake_updates if self.score and scored else 0):
            yield Turn("fake", self.fake_loss)
        yield Turn("student", partial(self.student_loss, segments=segments, scored=scored))

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        grid = few_step_times(process, self.init_ratio, self.teacher_steps)
        times = grid[:: self.teacher_steps // self.segments[-1]]
        return StudentSampler(times, self.input, None, "ddim", self.clip_sample)

    def fake_loss(self, nets: Nets, batch: Batch) -> Loss:
        """Denoising score matching on the student's samples."""
        assert self.score
        with torch.no_grad():
            x_g = self.sampler(nets["teacher"].process)(nets["student"], batch.noise, batch.cond)
        return self.score.following_loss(nets, batch, x_g)

    def student_loss(self, nets: Nets, batch: Batch, segments: int, *, scored: bool = False) -> Loss:
        """The distance of jumps and, where the student is ``scored``, the gradient of ``score`` at its samples."""
        loss = self.jump_loss(nets, batch, segments)
        if self.score is None or not scored:
            return loss
        x_g = self.sampler(nets["teacher"].process)(nets["student"], batch.noise, batch.cond)
        gradient, log = self.score.gradient(nets, x_g.detach(), batch.cond)
        value = loss.value + self.score_weight * steered(x_g, gradient / x_g[0].numel(), log["loss"])
        return Loss(value, {**loss.log, **{f"score_{key}": scalar for key, scalar in log.items()}})

    def jump_loss(self, nets: Nets, batch: Batch, segments: int) -> Loss:
        """``d(J(x_k, k -> n), sg J(x_{k+1}, k+1 -> n))``, with ``x_{k+1}`` itself as target where ``k + 1 = n``."""
        grid, length = self._grid(nets["teacher"].process, batch.noise), self.teacher_steps // segments
        show = self.sampler(nets["teacher"].process).shown
        x, k, ahead, cond = self.pairs(nets["teacher"], batch)
        end = (k // length + 1) * length
        with torch.no_grad():
            jumped = grid.arrive(show(nets["still"](ahead, grid.times[k + 1], cond)), end)
            target = torch.where(column(k + 1 == end, ahead), ahead, jumped)
        prediction = show(nets["student"](x, grid.times[k], cond))
        squared = (grid.arrive(prediction, end) - target).square()
        c = self.huber_c
        loss = pixel_mean(squared if self.distance == "l2" else (squared + c * c).sqrt() - c).mean()
        log = {"loss": loss, "residual": squared.mean(), "std": prediction.x0.std()}
        return Loss(loss, {key: value.detach() for key, value in log.items()})

    @torch.no_grad()
    def pairs(self, teacher: Denoiser, batch: Batch) -> Pairs:
        """Take every trajectory one DDIM step further; those that reach the data begin again with the batch's noise."""
        grid, memory = self._grid(teacher.process, batch.noise), batch.memory
        start = teacher.process.student_input(batch.noise, grid.times[0].expand(len(batch.noise)), self.input)
        if _X not in memory:
            self._begin(teacher, batch, start)
        x, k, cond = memory[_X], memory[_K], {key: memory[_COND + key] for key in batch.cond}
        ahead = grid.arrive(teacher(x, grid.times[k], cond), k + 1)
        done = k + 1 == self.teacher_steps
        memory[_X] = torch.where(column(done, x), start, ahead)
        memory[_K] = torch.where(done, 0, k + 1)
        for key, fresh in batch.cond.items():
            memory[_COND + key] = torch.where(column(done, fresh), fresh, cond[key])
        return Pairs(x, k, ahead, cond)

    def _begin(self, teacher: Denoiser, batch: Batch, start: Tensor) -> None:
        """Fill the memory with trajectories that are evenly spread over the grid: row ``j`` is at ``j K // B``."""
        grid, size = self._grid(teacher.process, start), len(start)
        k = torch.arange(size, device=start.device) * self.teacher_steps // size
        x = start.clone()
        for done in range(self.teacher_steps - 1):
            rest = slice(-(-size * (done + 1) // self.teacher_steps), size)
            if rest.start == size:
                break
            now = torch.full_like(k[rest], done)
            told = {key: value[rest] for key, value in batch.cond.items()}
            x[rest] = grid.arrive(teacher(x[rest], grid.times[now], told), now + 1)
        batch.memory.update({_X: x, _K: k, **{_COND + key: value.clone() for key, value in batch.cond.items()}})

    def _grid(self, process: NoiseProcess, like: Tensor) -> Grid:
        return solver_grid(process, self.init_ratio, self.teacher_steps, like.device)
