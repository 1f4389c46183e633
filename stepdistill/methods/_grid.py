"""The grid of a teacher's deterministic solver, jumps to its points and neighbouring states on it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..conditions import Cond
from ..denoiser import Prediction
from ..process import NoiseProcess, broadcast
from ._shared import few_step_times


class Grid(NamedTuple):
    """The teacher's solver grid on the device: index 0 is the noise, index K the clean sample; ``(K + 1,)`` each."""

    times: Tensor
    """No network is asked at index K, which repeats the time before."""
    alpha: Tensor
    sigma: Tensor

    def arrive(self, prediction: Prediction, k: Tensor) -> Tensor:
        """``alpha_k x0 + sigma_k eps`` at the indices ``k (B,)``: a DDIM step or a student's jump, ``(B, ...)``."""
        alpha, sigma = (broadcast(level[k], prediction.x0) for level in (self.alpha, self.sigma))
        return alpha * prediction.x0 + sigma * prediction.eps


@lru_cache
def solver_grid(process: NoiseProcess, ratio: float, steps: int, device: torch.device) -> Grid:
    """The grid of ``few_step_times``, down to the clean sample; remembered, so that no step waits for the device."""
    times = torch.tensor(few_step_times(process, ratio, steps), dtype=torch.float64)
    alpha = torch.cat([process.alpha(times), times.new_ones(1)])
    sigma = torch.cat([process.sigma(times), times.new_zeros(1)])
    return Grid(torch.cat([times, times[-1:]]).to(device), alpha.to(device), sigma.to(device))


class Pairs(NamedTuple):
    """Neighbouring states of teacher trajectories."""

    x: Tensor
    """``x_k``, ``(B, ...)``."""
    k: Tensor
    """``(B,)``, from 0 to K - 1."""
    ahead: Tensor
    """``x_{k+1}``, ``(B, ...)``."""
    cond: Cond
    """What each trajectory was started with."""


def column(mask: Tensor, like: Tensor) -> Tensor:
    """A ``(B,)`` mask as ``(B, 1, ..., 1)``, to choose between rows of ``like``."""
    return mask.view(-1, *[1] * (like.ndim - 1))
