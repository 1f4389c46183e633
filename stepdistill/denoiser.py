"""A network read as a denoiser: one call, every prediction type, under any process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .conditions import NO_COND, Cond, concatenate, repeat, select
from .process import NoiseProcess, broadcast

Target = Literal["eps", "v", "x0", "flow", "edm", "consistency"]
"""What a network outputs.

``eps``, ``v = alpha eps - sigma x0`` (Salimans & Ho 2022), ``x0``, ``flow = eps - x0`` (rectified flow), ``edm``
(the preconditioned network of Karras et al. 2022) or ``consistency`` (the same with the boundary condition of
Song et al. 2023: a map to the end of the ODE, not a posterior mean).
"""

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""How a network family is called: ``(network, x (B, ...), label (B,), cond) -> output (B, ...)``."""


@dataclass(frozen=True)
class Prediction:
    """What a network says about ``x_t``; all readings are one statement in several forms."""

    process: NoiseProcess
    x_t: Tensor
    t: Tensor
    x0: Tensor
    """Posterior mean of the clean sample, ``(B, ...)``, at least float32."""
    eps: Tensor
    """Posterior mean of the noise, ``(B, ...)``, at least float32."""

    @property
    def velocity(self) -> Tensor:
        """``dx_t/dt = alpha' x0 + sigma' eps`` along the probability-flow ODE."""
        da, ds = self.process.slopes(self.t, self.x0)
        return da * self.x0 + ds * self.eps

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x_t) = -eps / sigma``."""
        return -self.eps / self.process.coefficients(self.t, self.eps)[1]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ``uncond + scale (cond - uncond)`` (Ho & Salimans 2022; scale 1 is none)."""

    scale: float | Tensor | None
    """One number, or one per sample ``(B,)``; ``None``: the condition brings them, as ``guidance_scale (B,)``."""
    uncond: Cond
    """The null (or negative) condition, with one row or one per sample."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which the scale applies; outside it is 1 (Kynkaanniemi et al. 2024)."""
    two_passes: bool = False
    """Call the network twice, in place of once with a doubled batch: less memory, more time."""

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance interval needs 0 <= low < high <= 1, got {self.interval}")

    @property
    def only_conditional(self) -> bool:
        """One pass with the condition is all that this guidance takes."""
        return not isinstance(self.scale, Tensor) and self.scale == 1

    @property
    def only_unconditional(self) -> bool:
        """One pass with the null condition is all that this guidance takes."""
        return not isinstance(self.scale, Tensor) and self.scale == 0 and self.interval == (0.0, 1.0)


@dataclass(frozen=True)
class Denoiser:
    """``(x_t, t, cond) -> Prediction`` for a network that was trained to output ``target``.

    Not a module: the network inside may be the bare one or the one that accelerate wrapped.
    """

    network: nn.Module
    native: NoiseProcess
    """The process that the network was trained under."""
    target: Target
    call: Call
    negated: bool = False
    """The network outputs minus the target (SiT predicts ``x0 - eps``)."""
    sigma_data: float = 0.5
    """Data standard deviation of the EDM preconditioning."""
    sigma_boundary: float = 0.0
    """Noise level at which a consistency network is the identity."""
    told_scale: bool = False
    """The network is told the ``guidance_scale`` of a condition; others never see it."""
    guidance: Guidance | None = None
    view: NoiseProcess | None = None
    bottleneck: Callable[[nn.Module], nn.Module] | None = None
    """Finds the layer that ``judged`` looks at, where there is one."""
    at_once: int | None = None
    """Rows that the network takes in one call, of those that it is given; ``None`` is all."""
    device: str | None = None
    """Where the network is, if not where the states are."""

    @property
    def process(self) -> NoiseProcess:
        """The process in which ``x_t`` and ``t`` are given."""
        return self.view or self.native

    def under(self, process: NoiseProcess) -> Denoiser:
        """The same denoiser for states of another process, exact: only the coordinates change.

        ``x0`` and ``eps`` depend on the state through ``x_t / alpha_t`` and ``sigma_t / alpha_t`` alone.
        Levels that the network's own process does not reach are clamped to its ends.
        """
        return replace(self, view=process)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = NO_COND) -> Prediction:
        """Denoise ``x_t (B, ...)`` at times ``t (B,)`` in [0, 1]."""
        x, time = x_t, t
        if self.view is not None:
            time = self.native.time_at_log_snr(self.view.log_snr(t)).clamp(0, 1)
            x = x_t * broadcast(_norm(self.native, time) / _norm(self.view, t), x_t)
        a, s = self.native.coefficients(time, x)
        output = self._output(x * self._input_scale(s), time, cond)
        x0, eps = self._read(output, x.to(output.dtype), a, s)
        return Prediction(self.process, x_t, t, x0, eps)

    def judged(self, x_t: Tensor, t: Tensor, cond: Cond = NO_COND) -> tuple[Prediction, Tensor]:
        """The prediction, and the mean ``(B, 1, ...)`` over the second axis of what ``bottleneck`` says on the way."""
        assert self.bottleneck is not None
        seen: list[Tensor] = []

        def note(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(output)

        hook = self.bottleneck(self.network).register_forward_hook(note)
        try:
            prediction = self(x_t, t, cond)
        finally:
            hook.remove()
        return prediction, torch.cat(seen).mean(1, keepdim=True)

    def _output(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The (guided) network output in at least float32."""
        label = self.native.label(time)
        guidance = self.guidance
        if guidance is not None and guidance.scale is None:
            guidance = replace(guidance, scale=cond["guidance_scale"])
        if not self.told_scale:
            cond = {key: value for key, value in cond.items() if key != "guidance_scale"}
        if guidance is None or guidance.only_conditional:
            output = self._called(x, label, cond)
        elif guidance.only_unconditional:
            output = self._called(x, label, {**cond, **repeat(guidance.uncond, len(x))})
        else:
            output = self._guided(guidance, x, time, label, cond)
        return -output if self.negated else output

    def _guided(self, guidance: Guidance, x: Tensor, time: Tensor, label: Tensor, cond: Cond) -> Tensor:
        low, high = guidance.interval
        inside = (time >= low) & (time <= high)
        assert guidance.scale is not None
        scale = broadcast(torch.where(inside, guidance.scale, 1.0), x)
        null = {**cond, **repeat(guidance.uncond, len(x))}
        if guidance.two_passes:
            uncond, conditional = self._called(x, label, null), self._called(x, label, cond)
        else:
            both = torch.cat([x, x]), torch.cat([label, label]), concatenate(null, cond)
            uncond, conditional = self._called(*both).chunk(2)
        return uncond + scale * (conditional - uncond)

    def _called(self, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        """The network's output in at least float32; it is told in its own precision, on its own device.

        But for numbers ``(B,)``, times and guidance scales: networks embed these in float32, 999 is 1000 in bfloat16.
        """
        if self.at_once is not None and len(x) > self.at_once:
            parts = [slice(start, start + self.at_once) for start in range(0, len(x), self.at_once)]
            return torch.cat([self._called(x[part], label[part], select(cond, part)) for part in parts])
        weight = next(filter(Tensor.is_floating_point, self.network.parameters()), x)
        half = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None
        told = {
            key: value.to(self.device, half if value.is_floating_point() and value.dim() > 1 else None)
            for key, value in cond.items()
        }
        output = self.call(self.network, x.to(self.device, half), label.to(self.device), told)
        return _full_precision(output.to(x.device))

    def _input_scale(self, s: Tensor) -> Tensor | float:
        """``c_in`` of the EDM preconditioning, 1 elsewhere."""
        preconditioned = self.target in ("edm", "consistency")
        return (s.square() + self.sigma_data**2).rsqrt() if preconditioned else 1.0

    def _read(self, out: Tensor, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """``(x0, eps)`` of an output: the two unknowns of ``x = a x0 + s eps`` and the target's definition."""
        if self.target == "eps":
            return (x - s * out) / a, out
        if self.target == "x0":
            return out, (x - a * out) / s
        if self.target == "v":
            return (a * x - s * out) / (a * a + s * s), (s * x + a * out) / (a * a + s * s)
        if self.target == "flow":
            return (x - s * out) / (a + s), (x + a * out) / (a + s)
        level, variance = s - self.sigma_boundary, self.sigma_data**2
        skip = variance / (level.square() + variance)
        x0 = skip * x + level * self.sigma_data * (s.square() + variance).rsqrt() * out
        return x0, (x - a * x0) / s


def _norm(process: NoiseProcess, t: Tensor) -> Tensor:
    return (process.alpha(t).square() + process.sigma(t).square()).sqrt()


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Full precision for what follows from ``x``; the meta device knows no other."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
