"""SiD: score identity distillation (Zhou et al., ICML 2024, arXiv:2404.04057), of one step or several.

A generator ``x_g = G(z)`` is trained so that its noised samples have the teacher's score.  Two networks
alternate.  ``fake`` learns to denoise the generator's samples; the generator descends the Fisher divergence
between the two denoisers, in which the unknown part is replaced by ``x_g`` itself through the score
identities of the paper.  Gradients flow *through* both denoisers into ``x_g``.

With guidance it is SiD-LSG (Zhou et al. 2025, arXiv:2406.01561), with several steps few-step SiD
(arXiv:2505.12674); the loop they share with other methods is in ``_score``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..conditions import Cond
from ..denoiser import Denoiser
from ._score import ScoreDistillation, fake_guided, steered
from ._shared import pixel_mean, pixel_sum
from .base import Batch, Loss, Nets


def identity_loss(x_g: Tensor, real: Tensor, fake: Tensor, alpha: float, fake_again: Tensor | None = None) -> Tensor:
    """``(D_phi - D_psi)^T [(D_phi - x_g) - alpha (D_phi - D_psi)]``, summed over pixels, ``(B, ...) -> (B,)``.

    Args:
        x_g: generated samples.
        real: the teacher's x0-prediction at ``x_t``.
        fake: the fake network's x0-prediction at ``x_t``.
        alpha: weight of the subtracted squared difference (eq. 23 of the paper, in the x0 form of its code).
        fake_again: ``D_psi`` of the bracket, where its guidance differs.
    """
    bracket = (real - x_g) - alpha * (real - (fake if fake_again is None else fake_again))
    return pixel_sum((real - fake) * bracket)


@dataclass(frozen=True, kw_only=True)
class SiD(ScoreDistillation):
    """Score identity distillation into one step or a few."""

    paper: ClassVar = "Zhou et al. 2024, arXiv:2404.04057"

    name: Literal["sid"] = "sid"
    alpha: float = 1.0
    """Weight of the subtracted squared error; 0.5 is the exact min-max game, 1.0 is stable, 1.2 the paper's best."""
    weight: Literal["adaptive", "snr", "eps", "clean", "one"] = "adaptive"
    """``adaptive``: 1 / mean|x_g - D_phi| per sample (the paper's code), which depends on ``x_g``, so that the score
    identities hold only roughly; ``snr``: ``sqrt(alpha^2 / sigma^2 + 1 / sigma_data^2)``, of the same size for Gaussian
    data but a function of ``t``, so that they hold; ``eps``: its square, so that errors count as errors of the noise
    prediction and fine detail most; ``clean``: ``alpha / (alpha + sigma)``, 1 - t of a rectified flow (SiD-DiT,
    arXiv:2509.25127); ``one``: none, for analysis."""
    delta_guidance: float = 1.0
    """Guidance scale of the fake network in ``D_phi - D_psi`` (kappa 2 of SiD-LSG)."""
    bracket_guidance: float = 1.0
    """Guidance scale of the fake network in the bracket (kappa 3); the teacher's, kappa 4, is data.guidance_scale."""
    low_memory: bool = True
    """Hold one network's activations at a time, for one more pass forward of student and teacher (13, not 11)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.5:
            raise ValueError(f"alpha must lie in [0, 1.5] (the paper uses 0.5 to 1.2), got {self.alpha}")

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor, ...]:
        return (self.fake_guidance, self.delta_guidance, self.bracket_guidance)

    def student_loss(self, nets: Nets, batch: Batch, call: int = 0, *, judged: bool = False) -> Loss:
        """The identity loss in two phases: its gradient with respect to ``x_g`` first, then through the generator.

        The value returned is the loss itself; its gradient reaches the generator through ``x_g`` alone.
        """
        with torch.set_grad_enabled(not self.low_memory):
            made = self.generate(nets, batch, call)
        gradient, log = self.total_gradient(nets, made.x0.detach(), batch.cond, judged=judged)
        if self.low_memory:
            made = self.sampler(nets["teacher"].process).shown(nets["student"](made.x_t, made.t, batch.cond))
        return Loss(steered(made.x0, gradient, log["loss"]), log)

    def gradient(self, nets: Nets, x_g: Tensor, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
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
            fake = again = fake_guided(nets, self.delta_guidance)(x_t, t, cond).x0
            if self.bracket_guidance != self.delta_guidance:
                again = fake_guided(nets, self.bracket_guidance)(x_t, t, cond).x0
            error = pixel_mean((x_g - real.detach()).abs())
            losses = self._weight(nets["teacher"], t, error) * identity_loss(leaf, real, fake, self.alpha, again)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        gap = pixel_mean((real - fake).detach().square()).mean()
        log = {"loss": losses.detach().mean(), "score_gap": gap, "x0_error": error.mean(), "std": x_g.std()}
        return gradient / len(x_g), log

    def _weight(self, teacher: Denoiser, t: Tensor, error: Tensor) -> Tensor:
        """Weight of each sample, ``(B,)``; ``error`` is its mean|x_g - D_phi|."""
        alpha, sigma = teacher.process.alpha(t), teacher.process.sigma(t)
        snr = (alpha / sigma).square() + teacher.sigma_data**-2
        match self.weight:
            case "adaptive":
                return error.clamp_min(1e-5).reciprocal()
            case "snr":
                return snr.sqrt().to(error.dtype)
            case "eps":
                return snr.to(error.dtype)
            case "clean":
                return (alpha / (alpha + sigma)).to(error.dtype)
            case "one":
                return torch.ones_like(error)
