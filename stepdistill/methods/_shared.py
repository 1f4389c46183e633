"""Equations that several methods use, as free functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..conditions import Cond
from ..denoiser import Denoiser, Prediction
from ..process import VP, Flow, InputScale, NoiseProcess, broadcast


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """``t ~ U[low, high]`` in the teacher's own time: its table index, Karras' ramp or flow time."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times need 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def draw(self, process: NoiseProcess, like: Tensor) -> Tensor:
        """``(B,)`` times in float64."""
        return self.low + (self.high - self.low) * _uniform(like)


@dataclass(frozen=True, kw_only=True)
class LogNormalTimes:
    """``ln(sigma / alpha) ~ N(mean, std^2)``: EDM's training law (-1.2, 1.2); SiD-DiT's flow law (0.693, 1.6)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def draw(self, process: NoiseProcess, like: Tensor) -> Tensor:
        """``(B,)`` times in float64, clamped to [0, 1]."""
        normal = torch.special.ndtri(_uniform(like).clamp(1e-9, 1 - 1e-9))
        return process.time_at_log_snr(-2 * (self.mean + self.std * normal)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class RampTimes:
    """``sigma / alpha`` uniform on Karras' ramp, that is uniform in its seventh root, between two ratios.

    SiD's generator law (0.002 to 24.4, the paper's ``t_max = 800``), on any process: both the finest and the
    coarsest levels are visited often.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    low_ratio: float
    high_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.low_ratio < self.high_ratio:
            raise ValueError(f"ratios need 0 < low_ratio < high_ratio, got {self.low_ratio} and {self.high_ratio}")

    def draw(self, process: NoiseProcess, like: Tensor) -> Tensor:
        """``(B,)`` times in float64, clamped to [0, 1]."""
        low, high = self.low_ratio ** (1 / 7), self.high_ratio ** (1 / 7)
        log_ratio = 7 * (low + (high - low) * _uniform(like)).log()
        return process.time_at_log_snr(-2 * log_ratio).clamp(0, 1)


TimeLaw = UniformTimes | LogNormalTimes | RampTimes


def _uniform(like: Tensor) -> Tensor:
    """``(B,)`` numbers, each uniform on [0, 1), together spread evenly over it (Kingma et al. 2021, app. I.1)."""
    ranks = torch.arange(len(like), dtype=torch.float64, device=like.device)
    return (ranks / len(like) + torch.rand((), dtype=torch.float64, device=like.device)) % 1


@lru_cache
def snapped(process: NoiseProcess, t: float) -> float:
    """The nearest time to ``t`` that a stock scheduler can name; remembered, so that no step computes it again."""
    return process.snap(torch.tensor([t], dtype=torch.float64)).item()


@lru_cache
def time_at_ratio(process: NoiseProcess, ratio: float) -> float:
    """The snapped time at which ``sigma / alpha`` is ``ratio``."""
    log_snr = -2 * torch.tensor([ratio], dtype=torch.float64).log()
    return snapped(process, process.time_at_log_snr(log_snr).item())


@lru_cache
def flow_time(process: NoiseProcess, t: float) -> float:
    """``sigma / (alpha + sigma)``, the rectified-flow time of the teacher's time ``t``."""
    alpha, sigma = (f(torch.tensor([t], dtype=torch.float64)).item() for f in (process.alpha, process.sigma))
    return sigma / (alpha + sigma)


def check_start(name: str, teacher: Denoiser, t: float, fed: InputScale, remedy: str) -> None:
    """Raise ``ValueError`` where method ``name`` cannot begin at time ``t`` with ``teacher`` and noise ``fed`` so.

    ``remedy`` is what to set where the level is too noisy for an eps-teacher.
    """
    process = teacher.process
    alpha, sigma = (f(torch.tensor([t], dtype=torch.float64)).item() for f in (process.alpha, process.sigma))
    if teacher.target == "eps" and alpha < 0.05 * sigma:
        raise ValueError(
            f"{name} reads x0 = (x - sigma eps) / alpha where noise enters, and alpha = {alpha:.2g} there multiplies "
            f"every error of this eps-teacher over 20-fold; set {remedy} or less"
        )
    if sigma > 1.01 and fed == "unit":
        raise ValueError(f"sigma = {sigma:.3g} where noise enters is not 1; set method.input=sigma")


def check_levels(levels: tuple[float, ...], steps: int) -> None:
    """Raise ``ValueError`` where they are not ``steps`` falling numbers."""
    if len(levels) != steps or levels[-1] <= 0 or any(m <= n for m, n in pairwise(levels)):
        raise ValueError(f"levels must be {steps} falling positive numbers, one for each of the steps, got {levels}")


@lru_cache
def few_step_times(
    process: NoiseProcess, ratio: float, steps: int, levels: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """The times of given ``levels`` of ``sigma / alpha``, or of ``steps`` even ones from that of ``ratio`` down.

    Even is what a stock scheduler spreads evenly:

    DDPM tables: LCM's grid ``t_k = (t_0 + 1) (1 - k / steps) - 1`` of table entries; rectified flow: ``sigma``;
    VE and trig: their own time.  The clean sample would be the next level.

    Raises:
        ValueError: more steps than the teacher's table has entries, or two levels at one of them.
    """
    if levels:
        times = tuple(time_at_ratio(process, level) for level in levels)
        for (level, now), (below, then) in pairwise(zip(levels, times, strict=True)):
            if now <= then:
                label = process.label(torch.tensor([now], dtype=torch.float64)).item()
                raise ValueError(
                    f"levels {level:g} and {below:g} are one level of the teacher, which is told {label:.4g} at both; "
                    "set levels further apart"
                )
        return times
    start = time_at_ratio(process, ratio)
    if steps == 1:
        return (start,)
    if isinstance(process, VP):
        entries = len(process.alphas_cumprod)
        if steps > entries:
            raise ValueError(f"steps must be at most the {entries} entries of the teacher's table, got {steps}")
        stride = min(max(round((start * (entries - 1) + 1) / steps), 1), entries // steps)
        return tuple((stride * k - 1) / (entries - 1) for k in range(steps, 0, -1))
    share = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    first = torch.tensor([start], dtype=torch.float64)
    if isinstance(process, Flow):
        level = process.sigma(first) * share
        return tuple(process.time_at_log_snr(2 * ((1 - level).log() - level.log())).tolist())
    return tuple((first * share).tolist())


def forward_mode(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """The derivative of ``function`` at ``at`` in the direction ``along``, of the shape of its output.

    Raises:
        RuntimeError: an operation in ``function`` has no forward mode; ``check_derivatives`` tries it beforehand.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have none
        return jvp(function, at, along)[1]


def pixel_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch, ``(B, ...) -> (B,)``."""
    return x.flatten(1).mean(1)


def pixel_sum(x: Tensor) -> Tensor:
    """Sum over all but the batch, ``(B, ...) -> (B,)``."""
    return x.flatten(1).sum(1)


FLOW = Flow()
"""Rectified flow, ``x_t = (1 - t) x0 + t eps``: the coordinates of FreeFlow."""


def velocity(prediction: Prediction) -> Tensor:
    """``u = x0 - eps``, from noise to data: minus the velocity of the rectified flow."""
    return prediction.x0 - prediction.eps


def norm(x: Tensor) -> Tensor:
    """``E||x||`` of ``(B, ...)``, a scalar."""
    return pixel_sum(x.square()).sqrt().mean()


def descent(x: Tensor, direction: Tensor) -> Tensor:
    """``|x - sg[x - direction]|^2 / 2`` per pixel: of gradient ``direction`` over the number of pixels; scalar."""
    return 0.5 * pixel_mean((x - (x - direction).detach()).square()).mean()


def regression_weight(denoiser: Denoiser, prediction: Prediction) -> Tensor:
    """``lambda(t)`` that turns ``|x0_hat - x0|^2`` into the loss the network was trained with, ``(B,)`` float64.

    eps: ``a^2/s^2``; v: the same (the velocity loss times ``snr / (snr + 1)``, as SiD-LSG does); flow:
    ``(a + s)^2 / s^2``, 1/t^2 for rectified flow; EDM: ``1/s^2 + 1/sigma_data^2``; x0: 1.  The minimiser does
    not depend on it.
    """
    process, t = prediction.process, prediction.t
    a, s = process.alpha(t), process.sigma(t)
    match denoiser.target:
        case "eps" | "v":
            return (a / s).square()
        case "flow":
            return ((a + s) / s).square()
        case "edm" | "consistency":
            return (a / s).square() + denoiser.sigma_data**-2
        case "x0":
            return torch.ones_like(s)


def denoising_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Denoising score matching on given samples: per-sample sums averaged over the batch, scalar."""
    return regression(denoiser, denoiser(denoiser.process.add_noise(x0, torch.randn_like(x0), t), t, cond), x0)


def regression(denoiser: Denoiser, prediction: Prediction, x0: Tensor) -> Tensor:
    """The denoising loss of a prediction of ``x0``, in the weighting of ``regression_weight``; scalar."""
    weight = broadcast(regression_weight(denoiser, prediction), x0)
    return pixel_sum(weight * (prediction.x0 - x0).square()).mean()
