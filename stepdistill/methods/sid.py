"""SiD: score identity distillation (Zhou et al., ICML 2024, arXiv:2404.04057).

A one-step generator ``x_g = G(z)`` is trained so that its noised samples have the teacher's score.  Two
networks alternate.  ``fake`` learns to denoise the generator's samples; the generator descends the Fisher
divergence between the two denoisers, in which the unknown part is replaced by ``x_g`` itself through the
score identities of the paper.  Gradients flow *through* both denoisers into ``x_g``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..conditions import Cond
from ..denoiser import Denoiser
from ..process import InputScale, NoiseProcess
from ..samplers import StudentSampler
from ._shared import TimeLaw, UniformTimes, denoising_loss, pixel_mean, pixel_sum, time_at_ratio
from .base import Batch, Loss, Method, Nets, Turn


def identity_loss(x_g: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """``(D_phi - D_psi)^T [(D_phi - x_g) - alpha (D_phi - D_psi)]``, summed over pixels, ``(B, ...) -> (B,)``.

    Args:
        x_g: generated samples.
        real: the teacher's x0-prediction at ``x_t``.
        fake: the fake network's x0-prediction at ``x_t``.
        alpha: weight of the subtracted squared difference (eq. 23 of the paper, in the x0 form of its code).
    """
    delta = real - fake
    return pixel_sum(delta * ((real - x_g) - alpha * delta))


@dataclass(frozen=True, kw_only=True)
class SiD(Method):
    """Score identity distillation into one step."""

    paper: ClassVar = "Zhou et al. 2024, arXiv:2404.04057"
    roles: ClassVar = ("fake",)

    name: Literal["sid"] = "sid"
    alpha: float = 1.0
    """Weight of the subtracted squared error; 0.5 is the exact min-max game, 1.0 is stable, 1.2 the paper's best."""
    init_ratio: float = 2.5
    """``sigma / alpha`` at which noise enters the generator: EDM's sigma 2.5, Stable Diffusion's step 625."""
    input: InputScale = "sigma"
    """What the generator is fed: ``sigma_t`` times the noise (the paper) or the unit-variance noise itself."""
    fake_times: TimeLaw = UniformTimes(low=0.02, high=0.98)
    """Times at which the fake network learns."""
    student_times: TimeLaw = UniformTimes(low=0.02, high=0.98)
    """Times at which the generator is compared with the teacher."""
    weight: Literal["adaptive", "snr", "one"] = "adaptive"
    """``adaptive``: 1 / mean|x_g - D_phi| per sample (the paper's code), which depends on ``x_g``, so that the score
    identities hold only roughly; ``snr``: ``sqrt(alpha^2 / sigma^2 + 1 / sigma_data^2)``, of the same size for Gaussian
    data but a function of ``t``, so that they hold; ``one``: none, for analysis."""
    fake_updates: int = 1
    """Updates of the fake network per generator update (1 in the paper)."""
    low_memory: bool = True
    """Hold one network's activations at a time, for one more pass forward of student and teacher (13, not 11)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.5:
            raise ValueError(f"alpha must lie in [0, 1.5] (the paper uses 0.5 to 1.2), got {self.alpha}")
        if self.fake_updates < 1:
            raise ValueError(f"fake_updates must be at least 1, got {self.fake_updates}")
        if not 0 < self.init_ratio < float("inf"):
            raise ValueError(f"init_ratio must be positive, got {self.init_ratio}")

    def turns(self, step: int) -> Iterator[Turn]:
        for _ in range(self.fake_updates):
            yield Turn("fake", self.fake_loss)
        yield Turn("student", self.student_loss)

    def sampler(self, process: NoiseProcess) -> StudentSampler:
        return StudentSampler(times=(time_at_ratio(process, self.init_ratio),), input=self.input)

    def fake_loss(self, nets: Nets, batch: Batch) -> Loss:
        """Denoising score matching on the generator's samples (eq. 9)."""
        fake = nets["fake"]
        with torch.no_grad():
            x_g = self.sampler(fake.process)(nets["student"], batch.noise, batch.cond)
        loss = denoising_loss(fake, x_g, self.fake_times.draw(fake.process, x_g), batch.cond)
        return Loss(loss, {"loss": loss.detach()})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """The identity loss in two phases: its gradient with respect to ``x_g`` first, then through the generator.

        The value returned is the loss itself; its gradient reaches the generator through ``x_g`` alone.
        """
        generate = self.sampler(nets["teacher"].process)
        with torch.set_grad_enabled(not self.low_memory):
            x_g = generate(nets["student"], batch.noise, batch.cond)
        gradient, log = self.gradient(nets, x_g.detach(), batch.cond)
        if self.low_memory:
            x_g = generate(nets["student"], batch.noise, batch.cond)
        return Loss(log["loss"] + ((x_g - x_g.detach()) * gradient).sum(), log)

    def gradient(self, nets: Nets, x_g: Tensor, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        """``d loss / d x_g`` of the batch mean, ``(B, ...)``, and the scalars to log."""
        process, leaf = nets["teacher"].process, x_g.clone().requires_grad_()
        t, eps = self.student_times.draw(process, leaf), torch.randn_like(leaf)

        def real_x0(x_t: Tensor) -> Tensor:
            return nets["teacher"](x_t, t, cond).x0

        with torch.enable_grad():
            x_t = process.add_noise(leaf, eps, t)
            if self.low_memory:
                real = checkpoint(real_x0, x_t, use_reentrant=False, preserve_rng_state=False)
            else:
                real = real_x0(x_t)
            fake = nets["fake"](x_t, t, cond).x0
            error = pixel_mean((x_g - real.detach()).abs())
            losses = self._weight(nets["teacher"], t, error) * identity_loss(leaf, real, fake, self.alpha)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        gap = pixel_mean((real - fake).detach().square()).mean()
        log = {"loss": losses.detach().mean(), "score_gap": gap, "x0_error": error.mean(), "std": x_g.std()}
        return gradient / len(x_g), log

    def _weight(self, teacher: Denoiser, t: Tensor, error: Tensor) -> Tensor:
        """Weight of each sample, ``(B,)``; ``error`` is its mean|x_g - D_phi|."""
        if self.weight == "adaptive":
            return error.clamp_min(1e-5).reciprocal()
        if self.weight == "snr":
            snr = (teacher.process.alpha(t) / teacher.process.sigma(t)).square()
            return (snr + teacher.sigma_data**-2).sqrt().to(error.dtype)
        return torch.ones_like(error)
