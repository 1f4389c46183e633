"""TrigFlow, ``x = cos x0 + sin sigma_d eps`` at the angle ``theta = pi t / 2``: states, slopes and derivatives there.

A prediction of any network has a slope ``dx/dtheta = sigma_d F`` under this process (sCM, arXiv:2410.11081).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..conditions import Cond
from ..denoiser import Denoiser, Prediction
from ..process import broadcast
from ._shared import forward_mode


class Points(NamedTuple):
    """``P`` states of each of ``B`` teacher trajectories, ``P B`` rows, under TrigFlow at ``theta = pi t / 2``."""

    x: Tensor
    t: Tensor
    slope: Tensor
    """The teacher's ``dx/dtheta``."""
    interval: Tensor
    """Number of the route's interval that a state was drawn from."""
    cond: Cond

    def part(self, rows: slice) -> Points:
        """Some of them."""
        cond = {key: value[rows] for key, value in self.cond.items()}
        return Points(self.x[rows], self.t[rows], self.slope[rows], self.interval[rows], cond)


def slope(prediction: Prediction) -> Tensor:
    """``dx/dtheta = sigma_d F`` of a prediction under TrigFlow, ``(B, ...)``."""
    return prediction.velocity / (math.pi / 2)


def rotated(x: Tensor, dx: Tensor, angle: Tensor) -> Tensor:
    """The state ``angle (B,)`` further along the ODE for constant ``x0`` and ``eps``: a DDIM step in TrigFlow."""
    return broadcast(angle.cos(), x) * x + broadcast(angle.sin(), x) * dx


def pace(t: Tensor) -> Tensor:
    """``sin(theta) cos(theta) = dtheta/dlambda`` for ``lambda = ln(sigma / alpha)``, ``(B,)``."""
    return torch.sin(math.pi * t) / 2


def exact_change(student: Denoiser, points: Points) -> Tensor:
    """``d(sigma_d F)/dlambda`` of the student along the teacher's ODE, bounded at both ends; ``(P B, ...)``."""
    speed = pace(points.t)
    along = (broadcast(speed, points.x) * points.slope, speed / (math.pi / 2))
    return forward_mode(lambda x, t: slope(student(x, t, points.cond)), (points.x, points.t), along)


def finite_change(student: Denoiser, points: Points, step: float) -> Tensor:
    """The same by a central difference of ``step`` in ``lambda``, within the levels that the network knows."""
    ends = student.process.time_at_log_snr(student.native.log_snr(points.t.new_tensor([0.0, 1.0])))
    reach = step * pace(points.t) / (math.pi / 2)
    before, after = (points.t - reach).clamp(min=ends[0]), (points.t + reach).clamp(max=ends[1])

    def at(t: Tensor) -> Tensor:
        return slope(student(rotated(points.x, points.slope, (t - points.t) * math.pi / 2), t, points.cond))

    rate = pace(points.t) / ((after - before) * math.pi / 2)
    return broadcast(rate, points.x) * (at(after) - at(before))


def tangent(found: Tensor, change: Tensor, points: Points, ramp: float) -> Tensor:
    """``g = -cos^2 (sigma_d F - dx/dtheta) - r [sin cos x + d(sigma_d F)/dlambda]`` for the student's ``sigma_d F``.

    At ``r = 1`` it is ``cos(theta) df/dtheta`` along the teacher's ODE; at 0 the student learns the teacher's velocity.
    """
    cos = broadcast(torch.cos(points.t * math.pi / 2), found)
    return -cos.square() * (found - points.slope) - ramp * (broadcast(pace(points.t), found) * points.x + change)
