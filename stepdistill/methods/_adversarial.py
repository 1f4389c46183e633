"""The optional term on real images: the fake network also tells them from generated ones.

Diffusion-GAN without a new network, as in SiDA (Zhou et al. 2025, arXiv:2410.14919): the channel mean of the
fake network's bottleneck is a map of logits at the noised sample.  Everything else in this package is
data-free; images enter here alone, through the ``real_data`` section of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..conditions import Cond, concatenate
from ..denoiser import Denoiser, Prediction
from ._shared import regression


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Weights of the two sides: 1 and 0.01 are those of SiD-DiT (1, and 1 beside 100 times the student's own loss).

    SiDA has 1 and 0.0001 (0.01 beside 100), and divides the student's by ``mean|x_g - D_phi|`` of each sample, here
    left out.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}
    fake_weight: float = 1.0
    """Weight of telling real from generated, beside the fake network's denoising loss."""
    student_weight: float = 0.01
    """Weight of being taken for real, beside the student's own loss."""
    start: int = 0
    """Step from which the student is judged; the fake network learns to judge from the first."""

    def __post_init__(self) -> None:
        if self.fake_weight <= 0 or self.student_weight < 0 or self.start < 0:
            raise ValueError(
                "adversarial needs fake_weight > 0, student_weight >= 0 and start >= 0, got "
                f"{self.fake_weight}, {self.student_weight} and {self.start}"
            )


def judging_loss(fake: Denoiser, x_g: Tensor, real: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """The denoising loss on ``x_g`` and the cross-entropy of real against generated, from one pass; scalars.

    Both kinds of samples, ``(B, ...)`` each, share their times and their noise.
    """
    eps = torch.randn_like(x_g)
    x_t = fake.process.add_noise(torch.cat([x_g, real]), torch.cat([eps, eps]), torch.cat([t, t]))
    prediction, logits = fake.judged(x_t, torch.cat([t, t]), concatenate(cond, cond))
    size = len(x_g)
    made = Prediction(fake.process, x_t[:size], t, prediction.x0[:size], prediction.eps[:size])
    of_made, of_real = (_entropy(part, goal, x_g) for part, goal in zip(logits.chunk(2), (0.0, 1.0), strict=True))
    return regression(fake, made, x_g), 0.5 * (of_made + of_real).mean()


def adversarial_gradient(fake: Denoiser, x_g: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """Direction in which samples ``x_g (B, ...)`` look more generated, over the batch size, and the loss it lowers."""
    leaf = x_g.clone().requires_grad_()
    with torch.enable_grad():
        _, logits = fake.judged(fake.process.add_noise(leaf, torch.randn_like(leaf), t), t, cond)
        loss = _entropy(logits, 1.0, x_g).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient, loss.detach()


def _entropy(logits: Tensor, goal: float, like: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over a sample's logits ``(B, ...)`` times its number of pixels; ``(B,)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-10, 10)
    loss = binary_cross_entropy_with_logits(logits, torch.full_like(logits, goal), reduction="none")
    return loss.flatten(1).mean(1) * like[0].numel()
