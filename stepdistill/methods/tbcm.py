"""TBCM: trajectory-backward consistency (2025, arXiv:2511.20410), the data-free form of sCM (arXiv:2410.11081).

The student ``f(x, theta)`` sends every state of the teacher's ODE to the end of its trajectory, so it does not
change along the ODE.  States are read off the teacher's own trajectories from noise, and the velocity that moves
a trajectory on is the one that the loss needs.  All is written in TrigFlow, ``x = cos x0 + sin sigma_d eps`` at the
angle ``theta``, where ``dx/dtheta = sigma_d F`` and ``f = cos x - sin sigma_d F`` is the x0 reading of any network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..conditions import Cond, concatenate
from ..denoiser import Denoiser, Prediction, without_autocast
from ..process import InputScale, NoiseProcess, Trig, broadcast
from ..samplers import StudentSampler
from ._shared import few_step_times, forward_mode, pixel_mean, pixel_sum
from .base import Batch, Loss, Method, Nets, Turn


class Points(NamedTuple):
    """``P`` states of each of ``B`` teacher trajectories, ``P B`` rows, under TrigFlow at ``theta = pi t / 2``."""

    x: Tensor
    t: Tensor
    slope: Tensor
    """The teacher's ``dx/dtheta``."""
    cond: Cond


def slope(prediction: Prediction) -> Tensor:
    """``dx/dtheta = sigma_d F`` of a prediction under TrigFlow, ``(B, ...)``."""
    return prediction.velocity / (math.pi / 2)


def rotated(x: Tensor, dx: Tensor, angle: Tensor) -> Tensor:
    """The state ``angle (B,)`` further along the ODE for constant ``x0`` and ``eps``: a DDIM step in TrigFlow."""
    return broadcast(angle.cos(), x) * x + broadcast(angle.sin(), x) * dx


def pace(t: Tensor) -> Tensor:
    """``sin(theta) cos(theta) = dtheta/dlambda`` for ``lambda = ln(sigma / alpha)``, ``(B,)``."""
    return torch.sin(math.pi * t) / 2


def exact_change(student: Denoiser, points: Points) -> Tensor:
    """``d(sigma_d F)/dlambda`` of the student along the teacher's ODE, bounded at both ends; ``(P B, ...)``."""
    speed = pace(points.t)
    along = (broadcast(speed, points.x) * points.slope, speed / (math.pi / 2))
    return forward_mode(lambda x, t: slope(student(x, t, points.cond)), (points.x, points.t), along)


def finite_change(student: Denoiser, points: Points, step: float) -> Tensor:
    """The same by a central difference of ``step`` in ``lambda``, within the levels that the network knows."""
    ends = student.process.time_at_log_snr(student.native.log_snr(points.t.new_tensor([0.0, 1.0])))
    reach = step * pace(points.t) / (math.pi / 2)
    before, after = (points.t - reach).clamp(min=ends[0]), (points.t + reach).clamp(max=ends[1])

    def at(t: Tensor) -> Tensor:
        return slope(student(rotated(points.x, points.slope, (t - points.t) * math.pi / 2), t, points.cond))

    rate = pace(points.t) / ((after - before) * math.pi / 2)
    return broadcast(rate, points.x) * (at(after) - at(before))


def tangent(found: Tensor, change: Tensor, points: Points, ramp: float) -> Tensor:
    """``g = -cos^2 (sigma_d F - dx/dtheta) - r [sin cos x + d(sigma_d F)/dlambda]`` for the student's ``sigma_d F``.

    At ``r = 1`` it is ``cos(theta) df/dtheta`` along the teacher's ODE; at 0 the student learns the teacher's velocity.
    """
    cos = broadcast(torch.cos(points.t * math.pi / 2), found)
    return -cos.square() * (found - points.slope) - ramp * (broadcast(pace(points.t), found) * points.x + change)


@dataclass(frozen=True, kw_only=True)
class TBCM(Method):
    """Continuous-time consistency on the teacher's own trajectories, for one step or a few.

    The learned log-variance is left out: its optimum divides the loss at a time by the mean there, which cancels every
    weight that depends on time, and normalised tangents make that mean nearly constant (within 1.6 times on digits).
    """

    paper: ClassVar = "2025, arXiv:2511.20410"
    targets: ClassVar = ("eps", "v", "flow", "edm")
    every_level: ClassVar = True

    name: Literal["tbcm"] = "tbcm"
    steps: int = 1
    """Network calls of the student: each takes its input to the clean end, later ones from fresh noise."""
    start_ratio: float = math.inf
    """``sigma / alpha`` at which trajectories and the student start; ``inf`` is the noisiest level, as in the paper."""
    input: InputScale = "sigma"
    """What a trajectory starts from, and the student's first call is fed: ``sigma_t`` times the noise, or itself."""
    t_min: float = 0.0025
    """End of the route, in the teacher's own time; below it the student is nearly the identity by construction."""
    route_points: int = 16
    """Teacher calls of a trajectory, evenly spread in the teacher's own time."""
    trained_points: int = 15
    """At most so many of them, drawn at random, are trained on in a step; the first never is."""
    sigma_data: float = 0.5
    """``sigma_d`` of TrigFlow, the standard deviation of the data."""
    tangent_norm: Literal["l2", "rms"] = "l2"
    """Over all pixels (the paper), or their root mean square, where ``tangent_constant`` acts sqrt(pixels) stronger."""
    tangent_constant: float = 0.1
    """``c`` of ``g / (|g| + c)``: smaller tangents keep their size."""
    warmup_steps: int = 4000
    """Steps over which ``r`` rises to 1."""
    calm_down: tuple[int, int, float] | None = None
    """``(first step, steps, end)`` of a later fall of ``r``; below 1 the student leans to the posterior mean."""
    jvp: Literal["exact", "finite"] = "exact"
    """Derivative of the student: forward mode, or a central difference for networks without it, or with DDPM tables."""
    finite_step: float = 0.05
    """Half its width in ``ln(sigma / alpha)``; wider than the gaps of a table, where networks are untrained."""

    def __post_init__(self) -> None:
        for name in ("start_ratio", "t_min", "sigma_data", "tangent_constant", "finite_step"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}")
        for name, least in (("steps", 1), ("route_points", 2), ("trained_points", 1), ("warmup_steps", 0)):
            if vars(self)[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {vars(self)[name]}")
        if self.calm_down and not (self.calm_down[1] > 0 and 0 <= self.calm_down[2] <= 1):
            raise ValueError(f"calm_down needs steps > 0 and an end in [0, 1], got {self.calm_down}")

    def check(self, teacher: Denoiser) -> None:
        if teacher.target == "x0":
            raise ValueError("TBCM needs f(x, 0) = x, which a network that predicts x0 itself does not have by design")
        super().check(teacher)
        process, (start, *_) = teacher.process, self.sampler(teacher.process).times
        if not start > self.t_min:
            raise ValueError(f"start_ratio={self.start_ratio} is time {start:.3g}, not above t_min={self.t_min}")
        alpha, sigma = (f(torch.tensor([start])).item() for f in (process.alpha, process.sigma))
        if teacher.target == "eps" and alpha < 0.05 * sigma:
            raise ValueError(
                "x0 = (x - sigma eps) / alpha multiplies the errors of this eps-teacher over 20-fold at the start, "
                f"where alpha = {alpha:.2g}; set method.start_ratio=20 or less"
            )

    @property
    def avoids_forward_mode(self) -> str | None:
        return "method.jvp=finite" if self.jvp == "exact" else None

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("student", partial(self.student_loss, ramp=self.ramp(step)))

    def ramp(self, step: int) -> float:
        """``r = min(1, step / warmup_steps)``, later times the calm-down."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        first, steps, end = self.calm_down or (step, 1, 1.0)
        return rise * (1 - min(1.0, max(0.0, (step - first) / steps)) * (1 - end))

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        return StudentSampler(few_step_times(process, self.start_ratio, self.steps), self.input)

    def student_loss(self, nets: Nets, batch: Batch, ramp: float = 1.0) -> Loss:
        """``|F - sg(F) - sg(g / (|g| + c))|^2``, whose gradient moves ``sigma_d F`` along ``g``."""
        view, total = Trig(noise_std=self.sigma_data), pixel_sum if self.tangent_norm == "l2" else pixel_mean
        points = self.trajectory(nets["teacher"], batch.noise, batch.cond)
        derivative = exact_change if self.jvp == "exact" else partial(finite_change, step=self.finite_step)
        with torch.no_grad(), without_autocast(points.x):
            change = derivative(nets["still"].under(view), points)
        found = slope(nets["student"].under(view)(points.x, points.t, points.cond))
        g = tangent(found.detach(), change, points, ramp)
        size = total(g.square()).sqrt()
        loss = total((found - found.detach() - g / broadcast(size + self.tangent_constant, g)).square()).mean()
        return Loss(loss, {"loss": loss.detach(), "tangent": size.mean()})

    def route(self, process: NoiseProcess, device: torch.device | None = None) -> Tensor:
        """``(R,)`` decreasing times of the teacher before the jitter, float64."""
        first = self.sampler(process).times[0]
        return torch.linspace(first, self.t_min, self.route_points, dtype=torch.float64, device=device)

    @torch.no_grad()
    def trajectory(self, teacher: Denoiser, noise: Tensor, cond: Cond) -> Points:
        """Follow the teacher from ``noise`` along times that the batch shares: the start, then one in each interval."""
        process, view = teacher.process, Trig(noise_std=self.sigma_data)
        route = self.route(process, noise.device)
        times = torch.cat([route[:1], route[:-1] + route.diff() * torch.rand_like(route[1:])])
        t = view.time_at_log_snr(process.log_snr(times))[:, None].expand(-1, len(noise))
        start, visited = times[:1].expand(len(noise)), []
        a, s = process.coefficients(start, noise)
        x = process.student_input(noise, start, self.input) / (a.square() + (s / self.sigma_data).square()).sqrt()
        for now, then in pairwise([*t, t[-1]]):
            dx = slope(teacher.under(view)(x, now, cond))
            visited.append((x, now, dx))
            x = rotated(x, dx, (then - now) * math.pi / 2)
        chosen = sorted(torch.randperm(len(route) - 1)[: self.trained_points].tolist())
        x, t, dx = (torch.cat(part) for part in zip(*(visited[k + 1] for k in chosen), strict=True))
        return Points(x, t, dx, concatenate(*[cond] * len(chosen)))
