"""DMD: distribution matching distillation without images (Yin et al. 2024, DMD2, arXiv:2405.14867).

The generator descends the reverse Kullback-Leibler divergence between its noised samples and the teacher's:
the gradient with respect to a sample is the difference of the two denoisers, used as it is, so that no
gradient passes through a network but the generator's.  This is DMD2 without its adversarial term, hence
without data, and with its two time scales: the fake network learns several times per generator update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..conditions import Cond
from ..denoiser import Denoiser
from ._score import ScoreDistillation, matching_gradient
from .base import Nets


@dataclass(frozen=True, kw_only=True)
class DMD(ScoreDistillation):
    """Distribution matching distillation into one step or a few."""

    paper: ClassVar = "Yin et al. 2024, arXiv:2405.14867"

    name: Literal["dmd"] = "dmd"
    fake_updates: int = 5
    """Updates of the fake network per generator update (5 for ImageNet and SDXL, 10 for Stable Diffusion 1.5)."""
    weight: Literal["adaptive", "kl", "one"] = "adaptive"
    """``adaptive``: 1 / mean|x_g - D_phi| per sample; ``kl``: ``alpha^2 / sigma^2``, the exact gradient, which never
    leaves a mode; ``one``: none, for analysis."""
    eval_guidance: float = 1.0
    """Guidance scale of the fake network beside the teacher's, which is data.guidance_scale."""

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor, ...]:
        return (self.fake_guidance, self.eval_guidance)

    def gradient(self, nets: Nets, x_g: Tensor, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        return matching_gradient(self, nets, x_g, cond, fake_scale=self.eval_guidance, weight=self.weight)
