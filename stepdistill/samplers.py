"""Samplers: the same arithmetic in training, preview, evaluation and the export test.

Coefficients of a grid are Python numbers computed once in float64, so a loop only launches kernels and never
waits for the device.  Deterministic solvers work in any process: in ``x / alpha`` against ``sigma / alpha``
every probability-flow ODE is the same ODE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .conditions import NO_COND, Cond
from .denoiser import Denoiser, Prediction
from .process import VE, VP, InputScale, NoiseProcess

Solver = Literal["euler", "heun", "dpmpp_2m"]


_SEED_STRIDE = 0x9E3779B1
"""Ids between the streams of two seeds: 2**32 over the golden ratio, which spreads any run of seeds evenly over the
2**32 streams of torch's CPU generator (it reads no more bits of a seed)."""


class SampleNoise:
    """Standard normal noise that belongs to sample ids: sample ``k`` is the same in any batch and on any rank.

    Sample ``k`` draws from its own CPU generator, seeded with ``k`` for seed 0, so that
    ``pipe(generator=torch.Generator().manual_seed(k))`` of an exported student repeats sample ``k``.

    Args:
        ids: ids of the samples of this batch.
        shape: shape of one sample, ``(C, H, W)``.
        device: where the noise goes.
        seed: shifts every id's stream.
    """

    def __init__(
        self, ids: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        start = seed * _SEED_STRIDE
        self.generators = [torch.Generator().manual_seed((start + index) % 2**32) for index in ids]
        self.shape, self.device = tuple(shape), torch.device(device)

    def __call__(self) -> Tensor:
        """The next ``(B, *shape)`` float32 noise of every sample."""
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.to(self.device)


def teacher_grid(process: NoiseProcess, steps: int) -> list[float]:
    """``steps`` decreasing times from pure noise; the step after the last ends at the clean sample.

    DDPM tables use diffusers' ``trailing`` spacing, VE Karras' ramp down to ``sigma_min``, the others a uniform
    grid in their own time.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(process, VP):
        size = len(process.alphas_cumprod)
        if steps > size:
            raise ValueError(f"steps must be at most the {size} entries of the teacher's table, got {steps}")
        return [(round(size - k * size / steps) - 1) / (size - 1) for k in range(steps)]
    if isinstance(process, VE):
        return [1 - k / max(steps - 1, 1) for k in range(steps)]
    return [1 - k / steps for k in range(steps)]


class OdeStep(NamedTuple):
    """One step of a solver: what the network said, and the state the step arrives at."""

    prediction: Prediction
    x: Tensor


class _Level(NamedTuple):
    alpha: float
    sigma: float


_CLEAN = _Level(1.0, 0.0)
_PURE_NOISE = 1e-6
"""Below this ``alpha / sigma`` a level is pure noise: ``sigma / alpha`` is no coordinate, and heun steps as euler."""


def ode_steps(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    cond: Cond = NO_COND,
    *,
    solver: Solver = "euler",
    end: float | None = None,
) -> Iterator[OdeStep]:
    """Integrate the probability-flow ODE from ``x`` along ``times``; ``list(...)`` captures the trajectory.

    Args:
        denoiser: the network to follow; gradients flow, wrap the loop in ``torch.no_grad()`` to sample.
        x: state at ``times[0]``, ``(B, ...)``.
        times: ``K`` decreasing times at which the network is called.
        cond: condition of the batch.
        solver: ``euler`` (DDIM, Song et al. 2021), ``heun`` (EDM's algorithm 1 in ``sigma / alpha``, two calls a
            step but the last) or ``dpmpp_2m`` (DPM-Solver++ 2M, Lu et al. 2022, midpoint form).
        end: time of the state returned last; ``None`` is the clean sample.
    """
    process = denoiser.process
    levels = [*_levels(process, times), _CLEAN if end is None else _levels(process, [end])[0]]
    grid = torch.tensor([*times, end or 0.0], dtype=torch.float64, device=x.device)
    earlier: tuple[Tensor, float] | None = None
    for k in range(len(times)):
        now, then = levels[k], levels[k + 1]
        prediction = denoiser(x, grid[k].expand(len(x)), cond)
        if solver == "dpmpp_2m":
            final = k == len(times) - 1 and (end is None or len(times) < 15)
            x, earlier = _dpmpp_2m(prediction.x0, x, now, then, None if final else earlier)
        else:
            x = then.alpha * prediction.x0 + then.sigma * prediction.eps
            if solver == "heun" and then.sigma > 0 and now.alpha > _PURE_NOISE * now.sigma:
                ahead = denoiser(x, grid[k + 1].expand(len(x)), cond).eps
                span = then.sigma - then.alpha * now.sigma / now.alpha
                x = x + 0.5 * span * (ahead - prediction.eps)
        yield OdeStep(prediction, x)


def sample_ode(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    cond: Cond = NO_COND,
    *,
    solver: Solver = "euler",
) -> Tensor:
    """``(B, ...)`` samples of a teacher from standard normal ``noise`` in ``steps`` steps of ``solver``."""
    x = denoiser.process.prior_scale * noise
    for step in ode_steps(denoiser, x, teacher_grid(denoiser.process, steps), cond, solver=solver):
        x = step.x
    return x


def _levels(process: NoiseProcess, times: Sequence[float]) -> list[_Level]:
    t = torch.tensor(times, dtype=torch.float64)
    return [_Level(a, s) for a, s in zip(process.alpha(t).tolist(), process.sigma(t).tolist(), strict=True)]


def _dpmpp_2m(
    x0: Tensor, x: Tensor, now: _Level, then: _Level, earlier: tuple[Tensor, float] | None
) -> tuple[Tensor, tuple[Tensor, float]]:
    """One step in half log-SNR ``l = ln(alpha / sigma)``: the state at ``then``, and what the next step needs."""
    if then.sigma == 0:
        return x0, (x0, math.inf)
    h = math.log(then.alpha / then.sigma) - math.log(max(now.alpha, 1e-30) / now.sigma)
    direction = x0
    if earlier is not None:
        before, h_before = earlier
        direction = x0 + 0.5 * (h / h_before) * (x0 - before)
    return (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * direction, (x0, h)


Renoising = Literal["fresh", "fixed", "ddim"]
"""Noise that a few-step student's ``x0`` is taken back to the next level with: new noise (few-step SiD, DMD2, LCM),
the noise it started from, or the noise it has itself predicted (DDIM, deterministic)."""


MOST_JUMPS = 120
"""Of a flow map: a number that many others divide; an exported one keeps as many levels."""


@dataclass(frozen=True)
class StudentSampler:
    """How a student turns noise into samples: ``x0`` at the first level, then re-noise and predict again.

    One level is a one-step generator.  Stored beside every student, and what its exported pipeline must equal.
    """

    times: tuple[float, ...]
    """Decreasing times of the network calls."""
    input: InputScale = "sigma"
    """What the first call is fed."""
    target_time: float | None = None
    """Told to a network with two times: of the last call; earlier ones are told the next level."""
    renoising: Renoising = "fresh"
    """What later calls are fed."""
    clip_sample: bool = False
    """Keep every ``x0`` in [-1, 1], the range of pictures; no gradient comes from beyond it."""
    any_steps: bool = False
    """The network with two times has learned to go on from any level: ``in_steps`` are samplers of it too."""

    def __post_init__(self) -> None:
        if any(now <= then for now, then in pairwise(self.times)):
            raise ValueError(f"the times of a few-step student must decrease, got {self.times}")

    def in_steps(self, steps: int) -> StudentSampler:
        """So many jumps of a flow map, in steps of the process' time that are even but for rounding to its 120th."""
        if not 1 <= steps <= MOST_JUMPS:
            raise ValueError(f"steps must be 1 to {MOST_JUMPS}, got {steps}")
        shares = [1 - round(k * MOST_JUMPS / steps) / MOST_JUMPS for k in range(steps)]
        return replace(self, times=tuple(self.times[0] * share for share in shares))

    def cond(self, process: NoiseProcess, cond: Cond, like: Tensor, call: int = -1) -> Cond:
        """``cond`` and, for a network with two times, the label of where ``call`` leads."""
        if self.target_time is None:
            return cond
        target = (*self.times[1:], self.target_time)[call]
        return {**cond, "target_label": process.label(like.new_full((len(like),), target, dtype=torch.float64))}

    def trace(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond = NO_COND, *, renoise: Callable[[], Tensor] | None = None
    ) -> Iterator[Prediction]:
        """What every call says, in order; ``renoise`` gives the fresh noise of later calls, torch's by default.

        A call's gradient ends at its input: few-step students learn one call at a time (few-step SiD, DMD2).
        """
        process = denoiser.process
        t, *levels = (noise.new_full((len(noise),), time, dtype=torch.float64) for time in self.times)
        # Of a network with two times, what leads to another level is no picture.
        on_the_way = self.target_time is not None and len(levels) > 0
        prediction = denoiser(process.student_input(noise, t, self.input), t, self.cond(process, cond, noise, 0))
        prediction = prediction if on_the_way else self.shown(prediction)
        yield prediction
        for call, t in enumerate(levels, 1):
            if self.renoising == "fresh":
                eps = torch.randn_like(noise) if renoise is None else renoise()
            else:
                eps = noise if self.renoising == "fixed" else prediction.eps
            x_t = process.add_noise(prediction.x0.detach(), eps.detach(), t)
            prediction = denoiser(x_t, t, self.cond(process, cond, noise, call))
            on_the_way = self.target_time is not None and call < len(levels)
            prediction = prediction if on_the_way else self.shown(prediction)
            yield prediction

    def shown(self, prediction: Prediction) -> Prediction:
        """``prediction`` with its ``x0`` as a picture shows it; ``eps`` stays, as in diffusers' schedulers."""
        return replace(prediction, x0=self.picture(prediction.x0))

    def picture(self, x0: Tensor) -> Tensor:
        """``x0`` itself or, with ``clip_sample``, what a picture shows of it."""
        return x0.clamp(-1, 1) if self.clip_sample else x0

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond = NO_COND, *, renoise: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """``(B, ...)`` samples from standard normal ``noise``."""
        *_, last = self.trace(denoiser, noise, cond, renoise=renoise)
        return last.x0
