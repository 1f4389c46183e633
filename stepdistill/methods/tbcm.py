"""TBCM: trajectory-backward consistency (2025, arXiv:2511.20410), the data-free form of sCM (arXiv:2410.11081).

The student ``f(x, theta)`` sends every state of the teacher's ODE to the end of its trajectory, so it does not
change along the ODE.  States are read off the teacher's own trajectories from noise, and the velocity that moves
a trajectory on is the one that the loss needs.  All is written in TrigFlow, ``x = cos x0 + sin sigma_d eps`` at the
angle ``theta``, where ``dx/dtheta = sigma_d F`` and ``f = cos x - sin sigma_d F`` is the x0 reading of any network.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..conditions import Cond, concatenate
from ..denoiser import Denoiser, without_autocast
from ..process import InputScale, NoiseProcess, Trig, broadcast
from ..samplers import StudentSampler
from ._shared import check_levels, check_start, few_step_times, pixel_mean, pixel_sum
from ._trigflow import Points, exact_change, finite_change, rotated, slope, tangent
from .base import Batch, Loss, Method, Nets, Turn

_LOG_VARIANCE = "tbcm_log_variance"
"""In ``Batch.memory``: ``l`` of every interval of the route, ``(R - 1,)``."""


@dataclass(frozen=True, kw_only=True)
class TBCM(Method):
    """Continuous-time consistency on the teacher's own trajectories, for one step or a few."""

    paper: ClassVar = "2025, arXiv:2511.20410"
    targets: ClassVar = ("eps", "v", "flow", "edm")
    every_level: ClassVar = True

    name: Literal["tbcm"] = "tbcm"
    steps: int = 1
    """Network calls of the student: each takes its input to the clean end, later ones from fresh noise."""
    start_ratio: float = math.inf
    """``sigma / alpha`` at which trajectories and the student start; ``inf`` is the noisiest level, as in the paper."""
    levels: tuple[float, ...] = ()
    """``sigma / alpha`` of every call, falling, in place of ``steps`` even ones from ``start_ratio``."""
    input: InputScale = "sigma"
    """What a trajectory starts from, and the student's first call is fed: ``sigma_t`` times the noise, or itself."""
    clip_sample: bool = False
    """Compare pictures: what lies beyond [-1, 1] is clipped, as the pipeline will do, and has no tangent."""
    t_min: float = 0.0025
    """End of the route, in the teacher's own time; below it the student is nearly the identity by construction."""
    route_points: int = 16
    """Teacher calls of a trajectory, evenly spread in the teacher's own time."""
    trained_points: int = 15
    """At most so many of them, drawn at random, are trained on in a step; the first never is."""
    sigma_data: float = 0.5
    """``sigma_d`` of TrigFlow, the standard deviation of the data."""
    points_at_once: int | None = None
    """Points whose activations are kept at a time, their gradients summed before the update; null is all of them."""
    log_variance_rate: float = 0.0
    """Step size of the learned ``l`` in ``e^-l loss + l``, a number for each interval of the route.  0 leaves it out:
    normalised tangents make the losses that it divides by alike already (within 1.6 times on digits)."""
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
        counts = {"steps": 1, "route_points": 2, "trained_points": 1, "points_at_once": 1, "warmup_steps": 0}
        for name, least in {**counts, "log_variance_rate": 0}.items():
            if vars(self)[name] is not None and vars(self)[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {vars(self)[name]}")
        if self.levels:
            check_levels(self.levels, self.steps)
        if self.calm_down and not (self.calm_down[1] > 0 and 0 <= self.calm_down[2] <= 1):
            raise ValueError(f"calm_down needs steps > 0 and an end in [0, 1], got {self.calm_down}")

    def check(self, teacher: Denoiser) -> None:
        if teacher.target == "x0":
            raise ValueError("TBCM needs f(x, 0) = x, which a network that predicts x0 itself does not have by design")
        super().check(teacher)
        start = self.sampler(teacher.process).times[0]
        if not start > self.t_min:
            raise ValueError(f"start_ratio={self.start_ratio} is time {start:.3g}, not above t_min={self.t_min}")
        check_start("TBCM", teacher, start, self.input, "method.start_ratio=20")

    @property
    def avoids_forward_mode(self) -> str | None:
        return "method.jvp=finite" if self.jvp == "exact" else None

    def turns(self, step: int) -> Iterator[Turn]:
        count, kept = min(self.trained_points, self.route_points - 1), deque[Points]()
        size = self.points_at_once or count
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            loss = partial(self.part_loss, ramp=self.ramp(step), part=part, kept=kept)
            yield Turn("student", loss, update=part.stop == count)

    def ramp(self, step: int) -> float:
        """``r = min(1, step / warmup_steps)``, later times the calm-down."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        first, steps, end = self.calm_down or (step, 1, 1.0)
        return rise * (1 - min(1.0, max(0.0, (step - first) / steps)) * (1 - end))

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        times = few_step_times(process, self.start_ratio, self.steps, self.levels)
        return StudentSampler(times, self.input, clip_sample=self.clip_sample)

    def student_loss(self, nets: Nets, batch: Batch, ramp: float = 1.0) -> Loss:
        """The mean of ``loss_at`` over trajectories and their points."""
        return self.loss_at(self.trajectory(nets["teacher"], batch.noise, batch.cond), nets, batch.memory, ramp)

    def part_loss(self, nets: Nets, batch: Batch, *, ramp: float, part: slice, kept: deque[Points]) -> Loss:
        """The share of the points ``part`` in ``student_loss``; each micro-batch's are ``kept`` for the later parts."""
        points = kept.popleft() if part.start else self.trajectory(nets["teacher"], batch.noise, batch.cond)
        kept.append(points)
        size = len(batch.noise)
        some = points.part(slice(part.start * size, part.stop * size))
        loss = self.loss_at(some, nets, batch.memory, ramp)
        return Loss(loss.value * (len(some.x) / len(points.x)), loss.log)

    def loss_at(self, points: Points, nets: Nets, memory: dict[str, Tensor], ramp: float) -> Loss:
        """``e^-l |F - sg(F) - sg(g / (|g| + c))|^2``, whose gradient moves ``sigma_d F`` along ``g``."""
        view, total = Trig(noise_std=self.sigma_data), pixel_sum if self.tangent_norm == "l2" else pixel_mean
        derivative = exact_change if self.jvp == "exact" else partial(finite_change, step=self.finite_step)
        with torch.no_grad(), without_autocast(points.x):
            change = derivative(nets["still"].under(view), points)
        prediction = nets["student"].under(view)(points.x, points.t, points.cond)
        found = slope(prediction)
        g = tangent(found.detach(), change, points, ramp)
        if self.clip_sample:
            g = g * (prediction.x0.detach().abs() < 1)
        size = total(g.square()).sqrt()
        each = total((found - found.detach() - g / broadcast(size + self.tangent_constant, g)).square())
        if self.log_variance_rate:
            each = each / self.variance(each.detach(), points.interval, memory)
        loss = each.mean()
        return Loss(loss, {"loss": loss.detach(), "tangent": size.mean()})

    def variance(self, losses: Tensor, interval: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """``e^l`` of every loss ``(N,)``, after a step of ``l`` down the gradient of ``e^-l loss + l``."""
        before = memory.setdefault(_LOG_VARIANCE, losses.new_zeros(self.route_points - 1))
        rows = torch.zeros_like(before).index_add(0, interval, torch.ones_like(losses)).clamp(min=1)
        slopes = (1 - losses / before[interval].exp()) / rows[interval]
        memory[_LOG_VARIANCE] = before.index_add(0, interval, slopes, alpha=-self.log_variance_rate)
        return memory[_LOG_VARIANCE][interval].exp()

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
        interval = torch.tensor(chosen, device=x.device).repeat_interleave(len(noise))
        return Points(x, t, dx, interval, concatenate(*[cond] * len(chosen)))
