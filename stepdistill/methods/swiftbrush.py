"""SwiftBrush: variational score distillation of a one-step student (Nguyen & Tran, CVPR 2024, arXiv:2312.05239).

ProlificDreamer's loss with the scene replaced by a generator: samples descend ``sigma^2 (eps_phi - eps_psi)``,
the teacher and the fake network under the same guidance, and no gradient passes through either.  In the paper
the fake network is a LoRA on the teacher's own weights (``training.lora.fake``); a full copy works the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..conditions import Cond
from ..denoiser import Denoiser
from ._score import ScoreDistillation, matching_gradient
from ._shared import TimeLaw, UniformTimes
from .base import Nets


@dataclass(frozen=True, kw_only=True)
class SwiftBrush(ScoreDistillation):
    """Variational score distillation."""

    paper: ClassVar = "Nguyen & Tran 2024, arXiv:2312.05239"

    name: Literal["swiftbrush"] = "swiftbrush"
    init_ratio: float = float("inf")
    """``sigma / alpha`` at which noise enters: pure noise, the last entry of a table."""
    input: Literal["unit", "sigma"] = "unit"
    """What the first call is fed: the unit-variance noise itself, or ``sigma_t`` times it."""
    fake_times: TimeLaw = UniformTimes(low=0.0, high=1.0)
    """Times at which the fake network learns."""

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor | None, ...]:
        return (self.fake_guidance, 1.0 if teacher.guidance is None else teacher.guidance.scale)

    def gradient(self, nets: Nets, x_g: Tensor, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        """``sigma^2 (eps_phi - eps_psi) = alpha sigma (D_psi - D_phi)`` (eq. 8), guided alike."""
        scale = self.fake_scales(nets["teacher"])[-1]
        return matching_gradient(self, nets, x_g, cond, fake_scale=scale, weight="vsd")
