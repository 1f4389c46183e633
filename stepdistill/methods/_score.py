"""What the score-distillation methods share: a student of one to K calls, and a fake network that follows it.

A method of this family says only which way a sample should move (``gradient``).  The student's law is the
uniform mixture of its K outputs (few-step SiD, Zhou et al. 2025, arXiv:2505.12674): one call is drawn per
step, the same for every network and process, and only that call learns.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from ..conditions import Cond, repeat
from ..denoiser import Denoiser, Prediction
from ..process import InputScale, NoiseProcess
from ..samplers import Renoising, StudentSampler
from ._adversarial import Adversarial, adversarial_gradient, judging_loss
from ._shared import TimeLaw, UniformTimes, check_levels, check_start, denoising_loss, few_step_times, pixel_mean
from .base import Batch, Loss, Method, Nets, Turn

Weight = Literal["adaptive", "kl", "vsd", "one"]
"""How much a difference of denoisers counts, see ``matching_gradient``."""


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation(Method):
    """A student that descends a difference of two denoisers: the teacher's and the fake network's."""

    steps: int = 1
    """Network calls of the student."""
    init_ratio: float = 2.5
    """``sigma / alpha`` at which noise enters: EDM's sigma 2.5, Stable Diffusion's step 625; ``inf`` is pure noise."""
    levels: tuple[float, ...] = ()
    """``sigma / alpha`` of every call, falling, in place of ``steps`` even ones from ``init_ratio``."""
    input: InputScale = "sigma"
    """What the first call is fed: ``sigma_t`` times the noise, or the unit-variance noise itself."""
    renoising: Renoising = "fresh"
    """How a student of several steps returns to the next level."""
    clip_sample: bool = False
    """Compare pictures: what lies beyond [-1, 1] is clipped, as the pipeline will do, and has no gradient.  For pixels
    that crowd at the ends, as in drawings: the student overshoots there instead of cancelling its last noise."""
    matched: Literal["uniform", "final"] = "uniform"
    """Call that a training step compares with the teacher: any of them, equally often, or the last one always."""
    fake_times: TimeLaw = UniformTimes(low=0.02, high=0.98)
    """Times at which the fake network learns."""
    student_times: TimeLaw = UniformTimes(low=0.02, high=0.98)
    """Times at which the student is compared with the teacher."""
    fake_updates: int = 1
    """Updates of the fake network per student update."""
    fake_guidance: float = 1.0
    """Guidance scale under which the fake network learns (kappa 1 of SiD-LSG); 0 is without condition (Zero-CFG), a
    negative one away from it (Anti-CFG; ``2 D(0) - D(c)`` at -1)."""
    uncond_share: float = 0.1
    """Share of conditions replaced by the null one while the fake network learns, where it is guided."""
    adversarial: Adversarial | None = None
    """Optional term on real images, which come from ``real_data``; null is data-free."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.fake_updates < 1:
            raise ValueError(f"fake_updates must be at least 1, got {self.fake_updates}")
        if not self.init_ratio > 0:
            raise ValueError(f"init_ratio must be positive, got {self.init_ratio}")
        if self.levels:
            check_levels(self.levels, self.steps)
        if not 0 <= self.uncond_share <= 1:
            raise ValueError(f"uncond_share must lie in [0, 1], got {self.uncond_share}")

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor | None, ...]:
        return (self.fake_guidance,)

    @property
    def roles(self) -> tuple[str, ...]:
        return ("fake",)

    @property
    def takes_images(self) -> bool:
        return self.adversarial is not None

    @property
    def judges_conditions(self) -> bool:
        return self.adversarial is not None and self.fake_guidance != 0

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        start, remedy = self.sampler(teacher.process).times[0], "method.levels" if self.levels else "method.init_ratio"
        check_start(type(self).__name__, teacher, start, self.input, f"{remedy}=20")
        if self.adversarial and self.fake_guidance not in (0, 1):
            raise ValueError(f"adversarial needs fake_guidance 0 or 1, one pass to judge by, got {self.fake_guidance}")
        if self.adversarial and teacher.bottleneck is None:
            raise ValueError("adversarial needs to know by which layer of the network to judge; this family names none")
        scales = self.fake_scales(teacher)
        if teacher.guidance is None and any(scale != 1 for scale in scales):
            raise ValueError(
                f"guidance {scales} of the fake network needs to know what no condition is: set data.negative_prompt "
                'to "", or data.null_label'
            )

    def call_of(self, step: int) -> int:
        """Which call of the student learns at ``step``; those before it are made without a graph."""
        return self.steps - 1 if self.matched == "final" else random.Random(step).randrange(self.steps)

    def typical(self, step: int) -> tuple[int, ...]:
        """With the last call and the first: every further one costs the same."""
        ends = {self.steps - 1} if self.matched == "final" else {0, self.steps - 1}
        return tuple(next(at for at in count(step) if self.call_of(at) == call) for call in sorted(ends))

    def turns(self, step: int) -> Iterator[Turn]:
        call = self.call_of(step)
        for _ in range(self.fake_updates):
            yield Turn("fake", partial(self.fake_loss, call=call))
        judged = self.adversarial is not None and step >= self.adversarial.start
        yield Turn("student", partial(self.student_loss, call=call, judged=judged))

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        times = few_step_times(process, self.init_ratio, self.steps, self.levels)
        return StudentSampler(times, self.input, None, self.renoising, self.clip_sample)

    def generate(self, nets: Nets, batch: Batch, call: int) -> Prediction:
        """What call number ``call`` of the student says; the calls before it are made without a graph."""
        predictions = self.sampler(nets["teacher"].process).trace(nets["student"], batch.noise, batch.cond)
        with torch.no_grad():
            for _ in range(call):
                next(predictions)
        return next(predictions)

    def fake_loss(self, nets: Nets, batch: Batch, call: int = 0) -> Loss:
        """Denoising score matching on the student's samples."""
        with torch.no_grad():
            x_g = self.generate(nets, batch, call).x0
        return self.following_loss(nets, batch, x_g)

    def following_loss(self, nets: Nets, batch: Batch, x_g: Tensor) -> Loss:
        """Denoising score matching on samples ``x_g (B, ...)``."""
        fake, cond, guidance = fake_guided(nets, self.fake_guidance), batch.cond, nets["teacher"].guidance
        scales = self.fake_scales(nets["teacher"])
        if guidance is not None and not all(replace(guidance, scale=scale).only_conditional for scale in scales):
            cond = dropped(cond, guidance.uncond, self.uncond_share, len(x_g))
        t = self.fake_times.draw(fake.process, x_g)
        if self.adversarial is None or batch.real is None:
            loss = denoising_loss(fake, x_g, t, cond)
            return Loss(loss, {"loss": loss.detach()})
        loss, entropy = judging_loss(fake, x_g, batch.real, t, cond)
        log = {"loss": loss.detach(), "judging": entropy.detach()}
        return Loss(loss + self.adversarial.fake_weight * entropy, log)

    def student_loss(self, nets: Nets, batch: Batch, call: int = 0, *, judged: bool = False) -> Loss:
        """The value is the method's loss, where it has one; the gradient is ``gradient``, through the student."""
        x_g = self.generate(nets, batch, call).x0
        gradient, log = self.total_gradient(nets, x_g.detach(), batch.cond, judged=judged)
        return Loss(steered(x_g, gradient, log["loss"]), log)

    def total_gradient(self, nets: Nets, x_g: Tensor, cond: Cond, *, judged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """``gradient`` and, where the student is ``judged``, that of looking real."""
        gradient, log = self.gradient(nets, x_g, cond)
        if not judged or self.adversarial is None:
            return gradient, log
        fake = fake_guided(nets, self.fake_guidance)
        towards, loss = adversarial_gradient(fake, x_g, self.fake_times.draw(fake.process, x_g), cond)
        return gradient + self.adversarial.student_weight * towards, {**log, "looks_real": loss}

    @abstractmethod
    def gradient(self, nets: Nets, x_g: Tensor, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction that samples ``x_g (B, ...)`` descend, of the batch mean, and the scalars to log."""


@torch.no_grad()
def matching_gradient(
    method: ScoreDistillation, nets: Nets, x_g: Tensor, cond: Cond, *, fake_scale: float | Tensor | None, weight: Weight
) -> tuple[Tensor, dict[str, Tensor]]:
    """``w (D_psi - D_phi)`` at a random level of every sample, over the batch size, and the scalars to log.

    ``w`` is ``1 / mean|x_g - D_phi|`` (``adaptive``, eq. 8 of DMD), ``alpha^2 / sigma^2`` (``kl``, the exact gradient),
    ``alpha sigma`` (``vsd``, that of SwiftBrush) or 1.
    """
    process = nets["teacher"].process
    t = method.student_times.draw(process, x_g)
    x_t = process.add_noise(x_g, torch.randn_like(x_g), t)
    real = nets["teacher"](x_t, t, cond).x0
    delta = fake_guided(nets, fake_scale)(x_t, t, cond).x0 - real
    error = pixel_mean((x_g - real).abs())
    a, s = process.coefficients(t, x_g)
    match weight:
        case "adaptive":
            scale = error.clamp_min(1e-5).reciprocal().view_as(a)
        case "kl":
            scale = (a / s).square()
        case "vsd":
            scale = a * s
        case "one":
            scale = torch.ones_like(a)
    gradient = scale * delta
    gap = pixel_mean(delta.square()).mean()
    log = {"loss": 0.5 * pixel_mean(gradient.square()).mean(), "score_gap": gap, "x0_error": error.mean()}
    return gradient / len(x_g), {**log, "std": x_g.std()}


def steered(x_g: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar that is ``value`` and whose gradient with respect to ``x_g`` is ``gradient``."""
    return value + ((x_g - x_g.detach()) * gradient).sum()


def fake_guided(nets: Nets, scale: float | Tensor | None) -> Denoiser:
    """The fake network under the teacher's kind of guidance with its own ``scale``."""
    guidance = nets["teacher"].guidance
    return replace(nets["fake"], guidance=None if guidance is None else replace(guidance, scale=scale))


def dropped(cond: Cond, uncond: Cond, share: float, size: int) -> Cond:
    """``cond`` with a random ``share`` of its ``size`` rows replaced by the null condition; scales stay."""
    null = {**cond, **repeat(uncond, size)}
    drop = {key: torch.rand(size, device=value.device) < share for key, value in list(cond.items())[:1]}
    (lost,) = drop.values()
    return {key: torch.where(lost.view(-1, *[1] * (value.ndim - 1)), null[key], value) for key, value in cond.items()}
