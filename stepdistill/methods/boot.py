"""BOOT: data-free distillation by bootstrapping (Gu et al. 2023, arXiv:2306.05544).

The student ``y(z, t)`` sees only the noise ``z`` and a target time ``t``, and predicts the *signal*
``y_t = (x_t - sigma_t z) / alpha_t`` of the teacher's ODE started at ``z``.  In half log-SNR the signal
obeys ``dy/dlambda = y - D(alpha_t y + sigma_t z, t)`` (the Signal-ODE), so one teacher step from the student's
own prediction at ``t`` is its target at the slightly earlier ``s``.  One step of generation is ``y(z, t_min)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..conditions import Cond, concatenate, select
from ..denoiser import Denoiser
from ..process import InputScale, NoiseProcess, broadcast
from ..samplers import StudentSampler
from ._shared import check_start, snapped
from .base import Batch, Loss, Method, Nets, Turn


def remaining(process: NoiseProcess, t: Tensor, s: Tensor) -> Tensor:
    """``rho = (sigma_s / alpha_s) / (sigma_t / alpha_t)``, the share of the old signal a step keeps; ``(B,)``."""
    return process.sigma(s) * process.alpha(t) / (process.sigma(t) * process.alpha(s))


def signal_step(
    teacher: Denoiser, y: Tensor, noise: Tensor, t: Tensor, s: Tensor, cond: Cond, solver: Literal["ddim", "heun"]
) -> Tensor:
    """One teacher step of the Signal-ODE from ``y_t`` to ``y_s``, ``(B, ...)``.

    ``ddim`` holds the denoised sample constant over the step and is exactly one DDIM step of ``x_t``; ``heun``
    averages it over both ends (local error of third order, one more teacher call).
    """
    process = teacher.process
    rho = broadcast(remaining(process, t, s), y)
    denoised = teacher(process.add_noise(y, noise, t), t, cond).x0
    y_s = (1 - rho) * denoised + rho * y
    if solver == "ddim":
        return y_s
    ahead = teacher(process.add_noise(y_s, noise, s), s, cond).x0
    return (1 - rho) * 0.5 * (denoised + ahead) + rho * y


@dataclass(frozen=True, kw_only=True)
class BOOT(Method):
    """Bootstrapped distillation of the Signal-ODE into one step."""

    paper: ClassVar = "Gu et al. 2023, arXiv:2306.05544"
    two_times: ClassVar = True

    name: Literal["boot"] = "boot"
    teacher_steps: int = 32
    """Teacher steps from ``t_max`` to ``t_min``; one of them is ``delta = (t_max - t_min) / teacher_steps``."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Step of the target: first order, or second order for one more teacher call."""
    boundary_weight: float = 1.0
    """Weight of the boundary loss against the mean squared bootstrap residual (the paper's ``beta delta^2``)."""
    boundary_fraction: float = 0.25
    """Share of the batch that the boundary loss is computed on."""
    t_min: float = 0.0
    """Target time of the finished sample."""
    t_max: float = 1.0
    """Time at which the noise enters."""
    clip_sample: bool = False
    """Compare pictures: what lies beyond [-1, 1] is clipped, as the pipeline will do, and has no gradient; no signal
    lies there, as it is a mean of denoised samples."""
    input: InputScale = "unit"
    """What the student and the first teacher call are fed: the noise itself, or ``sigma`` times it (VE)."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"times need 0 <= t_min < t_max <= 1, got t_min={self.t_min}, t_max={self.t_max}")
        if not self.boundary_weight > 0:
            raise ValueError(f"boundary_weight must be positive, got {self.boundary_weight}")
        if self.teacher_steps < 1:
            raise ValueError(f"teacher_steps must be at least 1, got {self.teacher_steps}")
        if not 0 < self.boundary_fraction <= 1:
            raise ValueError(f"boundary_fraction must lie in (0, 1], got {self.boundary_fraction}")

    @property
    def delta(self) -> float:
        """Length of one teacher step in time."""
        return (self.t_max - self.t_min) / self.teacher_steps

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        largest = teacher.process.time_at_log_snr(torch.tensor([2 * math.log(0.05)])).item()
        check_start("BOOT", teacher, self.t_max, self.input, f"method.t_max={math.floor(100 * largest) / 100}")

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("student", self.student_loss)

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        start = snapped(process, self.t_max)
        return StudentSampler((start,), self.input, self.t_min, clip_sample=self.clip_sample)

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """``|y(z, s) - sg[step of y(z, t)]|^2 + beta |y(z, t') - sg[step of D(z, t_max)]|^2``.

        Both terms go through one student call.  The boundary time ``t'`` is drawn from the whole last interval:
        anchoring ``t_max`` alone would leave the chains that do not meet it exactly without a start.
        """
        noise, cond = batch.noise, batch.cond
        teacher, student = nets["teacher"], nets["student"]
        show = self.sampler(teacher.process).shown
        start = noise.new_full((len(noise),), snapped(teacher.process, self.t_max), dtype=torch.float64)
        x_start = teacher.process.student_input(noise, start, self.input)

        def signal(at: Tensor, selected: slice = slice(None)) -> tuple[Tensor, Tensor, Cond]:
            label = {"target_label": student.process.label(at)}
            return x_start[selected], start[selected], {**select(cond, selected), **label}

        t = self.t_min + self.delta + (start - self.t_min - self.delta) * torch.rand_like(start)
        s = t - self.delta
        edge = slice(0, max(1, round(self.boundary_fraction * len(noise))))
        t_edge = (start - self.delta * torch.rand_like(start))[edge]
        with torch.no_grad():
            y_t = show(student(*signal(t))).x0
            target = signal_step(teacher, y_t, noise, t, s, cond, self.solver)
            first = teacher(x_start[edge], start[edge], select(cond, edge)).x0
            edge_target = signal_step(teacher, first, noise[edge], start[edge], t_edge, select(cond, edge), self.solver)

        (x, label, told), (x_edge, label_edge, told_edge) = signal(s), signal(t_edge, edge)
        both = torch.cat([x, x_edge]), torch.cat([label, label_edge]), concatenate(told, told_edge)
        y = show(student(*both)).x0
        bootstrap = (y[: len(noise)] - target).square().mean()
        boundary = (y[len(noise) :] - edge_target).square().mean()
        loss = bootstrap + self.boundary_weight * boundary
        log = {"loss": loss, "bootstrap": bootstrap, "boundary": boundary, "std": y[: len(noise)].std()}
        return Loss(loss, {key: value.detach() for key, value in log.items()})
