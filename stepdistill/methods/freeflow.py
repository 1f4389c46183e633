"""FreeFlow: flow map distillation without data (Tong et al. 2025, arXiv:2511.19428).

In rectified-flow coordinates, ``x_t = (1 - t) x_0 + t eps``, the teacher generates with the velocity
``u = E[x_0 - eps | x_t] = -dx/dt``.  The student ``F(z, delta)`` is its mean over the first ``delta`` of a
trajectory: ``f(z, delta) = z + delta F`` is the state at ``1 - delta``, ``f(z, 1)`` a sample.  From noise ``z`` alone,

- *prediction*: the student moves with the teacher's velocity at its own state,
  ``D_G = F + delta dF/ddelta - u(f, 1 - delta) = 0``;
- *correction*: its samples, noised to ``r``, have the teacher's marginal velocity, ``D_N = v(x_r, r) - u(x_r, r) = 0``,
  where ``v`` is that of the student's law, learned by ``fake``.

Any teacher will do: its states only change coordinates.  Where noise enters below pure noise, at
``t_0 = sigma / (alpha + sigma)`` < 1, ``z_0 = input / (alpha + sigma)`` takes the place of ``z``:

    f(z_0, delta) = z_0 + delta F,  D_G = F + delta dF/ddelta - u(f, t_0 - delta),  0 <= delta <= t_0.

The sample ``z_0 + t_0 F`` is the ``x0`` that the network states about ``z_0 = (1 - t_0) x0 + t_0 eps``, for
``F = x0 - eps``; at ``delta = 0`` it is the teacher's own prediction.  With ``start_share`` (not in the paper) some of
the predictions start at a ``t < t_0``, where the student's own map has led: then any number of jumps make a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..conditions import Cond, concatenate, select
from ..denoiser import Denoiser, Prediction, without_autocast
from ..process import InputScale, NoiseProcess, broadcast
from ..samplers import StudentSampler
from ._shared import (
    FLOW,
    LogNormalTimes,
    TimeLaw,
    UniformTimes,
    check_start,
    denoising_loss,
    descent,
    flow_time,
    forward_mode,
    norm,
    pixel_mean,
    time_at_ratio,
    velocity,
)
from .base import Batch, Loss, Method, Nets, Turn


@torch.no_grad()
def correction(nets: Nets, x0: Tensor, r: Tensor, cond: Cond) -> Tensor:
    """``D_N = v - u`` at samples ``x0 (B, ...)`` noised to ``r (B,)``, which equals ``(E[x0] - E_teacher[x0]) / r``."""
    x_r = FLOW.add_noise(x0, torch.randn_like(x0), r)
    fake, real = (velocity(nets[role].under(FLOW)(x_r, r, cond)) for role in ("fake", "teacher"))
    return fake - real


@dataclass(frozen=True, kw_only=True)
class FreeFlow(Method):
    """Prediction and correction of the teacher's flow map, into one step."""

    paper: ClassVar = "Tong et al. 2025, arXiv:2511.19428"
    two_times: ClassVar = True
    least_batch: ClassVar = 2

    name: Literal["freeflow"] = "freeflow"
    prediction_share: float = 0.75
    """Share of the batch that learns the prediction; the others learn the correction."""
    correction_ratio: float = 1.0
    """Mean norm of the correction's gradient over that of the prediction (``a`` of the paper, 0.3 to 3)."""
    decay: float = 1.0
    """``k`` of the weight ``1 / (||D_G||^2 / d + eps)^k``, which keeps large residuals from ruling; 0 is none."""
    eps: float = 0.01
    """Floor of that weight, and of the norm that the correction is divided by."""
    derivative: Literal["finite", "exact"] = "finite"
    """``dF/ddelta``: a central difference (two passes), or forward mode (exact, without fused attention)."""
    start_share: float = 0.0
    """Share of the prediction that starts on the way; 0 is the paper's, for one step alone."""
    difference: float = 0.05
    """Half the width of the central difference in ``delta``.  A network told labels up to a thousand wiggles between
    them, and a finer difference reads the wiggles, like the exact derivative: ten times too much at 0.01 on digits."""
    times: TimeLaw = LogNormalTimes(mean=0.8, std=1.0)
    """Rectified-flow times ``r / t_0`` of the correction and of the fake network; high noise decides about modes."""
    fake_updates: int = 1
    """Updates of the fake network per student update."""
    init_ratio: float = math.inf
    """``sigma / alpha`` at which noise enters; ``inf`` is pure noise, which eps-teachers cannot start at."""
    clip_sample: bool = False
    """Correct pictures: what of a sample lies beyond [-1, 1] is clipped, as the pipeline will do, and not corrected."""
    input: InputScale = "unit"
    """What the student is fed: the noise itself, or ``sigma`` times it (VE)."""

    def __post_init__(self) -> None:
        if not (0 < self.prediction_share < 1 and 0 <= self.start_share < 1):
            shares = f"prediction_share = {self.prediction_share}, start_share = {self.start_share}"
            raise ValueError(f"shares must lie in (0, 1), that of starts may be 0; got {shares}")
        if not (self.correction_ratio >= 0 and self.decay >= 0):
            raise ValueError(f"correction_ratio = {self.correction_ratio}, decay = {self.decay} must not be negative")
        for name in ("eps", "difference", "init_ratio", "fake_updates"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}")

    @property
    def roles(self) -> tuple[str, ...]:
        return ("fake",)

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        start = time_at_ratio(teacher.process, self.init_ratio)
        check_start("FreeFlow", teacher, start, self.input, "method.init_ratio=20")

    @property
    def avoids_forward_mode(self) -> str | None:
        return "method.derivative=finite" if self.derivative == "exact" else None

    def turns(self, step: int) -> Iterator[Turn]:
        for _ in range(self.fake_updates):
            yield Turn("fake", self.fake_loss)
        yield Turn("student", self.student_loss)

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        start = time_at_ratio(process, self.init_ratio)
        any_steps = self.start_share > 0
        return StudentSampler((start,), self.input, 0.0, "ddim", clip_sample=self.clip_sample, any_steps=any_steps)

    def fake_loss(self, nets: Nets, batch: Batch) -> Loss:
        """Denoising score matching on the student's samples, in rectified-flow coordinates."""
        process = nets["teacher"].process
        with torch.no_grad():
            x0 = self.sampler(process)(nets["student"], batch.noise, batch.cond)
        r = self.ends(process)[0] * self.times.draw(FLOW, x0)
        loss = denoising_loss(nets["fake"].under(FLOW), x0, r, batch.cond)
        return Loss(loss, {"loss": loss.detach()})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """``sg[D_G / (||D_G||^2 / d + eps)^k]`` moves ``F(z, delta)``, ``sg[lambda D_N]`` moves ``F(z, t_0)``."""
        noise, cond, process = batch.noise, batch.cond, nets["teacher"].process
        count = min(max(round(self.prediction_share * len(noise)), 1), len(noise) - 1)
        start, end = self.ends(process)
        z, t = self.starts(nets["still"], noise, round(self.start_share * count), cond)
        s = t[:count] - (t[:count] - end) * UniformTimes(low=0.0, high=1.0).draw(FLOW, noise[:count])
        told = self.told(nets["student"], z, t, torch.cat([s, s.new_full((len(noise) - count,), end)]), cond)
        mean_velocity = velocity(told)
        first, second = slice(count), slice(count, None)
        residual = self.residual(nets, z[first], t[first], told.x0[first], told.eps[first], s, select(cond, first))
        size = pixel_mean(residual.square())
        prediction = residual * broadcast((size + self.eps) ** -self.decay, residual)
        x0 = told.x0[second]
        shown = self.sampler(process).picture(x0)
        gap = correction(nets, shown, start * self.times.draw(FLOW, x0), select(cond, second)) * (shown == x0)
        scale = self.correction_ratio * norm(prediction) / (norm(gap) + self.eps)
        loss = descent(mean_velocity[first], prediction) + descent(mean_velocity[second], scale * gap)
        log = {"loss": loss, "residual": size.mean(), "correction": norm(gap), "balance": scale, "std": x0.std()}
        return Loss(loss, {key: value.detach() for key, value in log.items()})

    def ends(self, process: NoiseProcess) -> tuple[float, float]:
        """Rectified-flow times between which the map runs: ``t_0``, and where the teacher's own time ends."""
        return flow_time(process, time_at_ratio(process, self.init_ratio)), flow_time(process, 0.0)

    @torch.no_grad()
    def starts(self, still: Denoiser, noise: Tensor, on_the_way: int, cond: Cond) -> tuple[Tensor, Tensor]:
        """States ``z (B, ...)`` and times ``t (B,)`` of rectified flow: all at ``t_0`` but the first ``on_the_way``."""
        process, (start, end) = still.process, self.ends(still.process)
        first = noise.new_full((len(noise),), time_at_ratio(process, self.init_ratio), dtype=torch.float64)
        norm = broadcast(process.alpha(first) + process.sigma(first), noise)
        z, t = process.student_input(noise, first, self.input) / norm, torch.full_like(first, start)
        if on_the_way:
            some = slice(on_the_way)
            t[some] -= (start - end) * torch.rand_like(t[some])
            there = self.told(still, z[some], torch.full_like(t[some], start), t[some], select(cond, some))
            z = torch.cat([FLOW.add_noise(there.x0, there.eps, t[some]), z[on_the_way:]])
        return z, t

    def told(self, student: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Prediction:
        """What the student says of ``z`` at ``t (B,)`` when told to go to ``s (B,)``; ``F`` is its ``x0 - eps``."""
        process = student.process
        label = process.label(process.time_at_log_snr(FLOW.log_snr(s)))
        return student.under(FLOW)(z, t, {**cond, "target_label": label})

    @torch.no_grad()
    def residual(self, nets: Nets, z: Tensor, t: Tensor, x0: Tensor, eps: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """``D_G = F + delta dF/ddelta - u(f, s)`` where the student, told ``s``, says ``(x0, eps)``."""
        f = FLOW.add_noise(x0, eps, s)  # (1 - s) x0 + s eps = z + (t - s) (x0 - eps)
        with without_autocast(z):  # a difference of nearly the same
            moves = x0 - eps - broadcast(t - s, f) * self.slope(nets["still"], z, t, s, cond)
        return moves - velocity(nets["teacher"].under(FLOW)(f, s, cond))

    def slope(self, still: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """``dF/ds = -dF/ddelta`` of the student at fixed ``z``, ``(B, ...)``."""
        if self.derivative == "exact":
            return forward_mode(lambda at: velocity(self.told(still, z, t, at, cond)), (s,), (torch.ones_like(s),))
        end = self.ends(still.process)[1]
        below, above = (s - self.difference).clamp_min(end), torch.minimum(s + self.difference, t)
        both = torch.cat([z, z]), torch.cat([t, t]), torch.cat([below, above]), concatenate(cond, cond)
        low, high = velocity(self.told(still, *both)).chunk(2)
        return (high - low) / broadcast(above - below, high)
