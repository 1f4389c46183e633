"""What every call of a student computes of its state and its network's output, read off the sampler itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .conditions import Cond
from .denoiser import Denoiser
from .process import VP
from .samplers import MOST_JUMPS, StudentSampler

_ONE = torch.ones(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class OneStepMap:
    """``x0 = direct noise + output network(input noise, label)``, float64."""

    direct: float
    output: float
    input: float
    label: float


def one_step_map(denoiser: Denoiser, sampler: StudentSampler) -> OneStepMap:
    """The linear map of a one-step student, read off the sampler itself with a network that returns a constant."""
    seen, sampler = [], replace(sampler, clip_sample=False)
    direct = sampler(_constant(denoiser, 0.0, seen), _ONE).item()
    output = sampler(_constant(denoiser, 1.0, seen), 0 * _ONE).item()
    return OneStepMap(direct=direct, output=output, input=seen[0][0], label=seen[0][1])


def stock_output(direct: float) -> float:
    """``B'`` of the stock one-step scheduler whose ``A`` is ``direct``: a flow's, that of an eps- or of a v-network."""
    return -1.0 if abs(direct - 1) < 1e-6 else -math.sqrt(abs(direct**2 - 1))


def _constant(denoiser: Denoiser, value: float, seen: list[tuple[float, float]]) -> Denoiser:
    """``denoiser`` with a network that returns ``value``, and notes in ``seen`` the state and label it is given."""

    def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        seen.append((x.item(), label.item()))
        return torch.full_like(x, value)

    return replace(denoiser, call=call)


def betas(denoiser: Denoiser, label: int, alpha: float) -> list[float]:
    """``label + 1`` betas that end at ``alpha``: the teacher's own table where it does, else one last step."""
    if isinstance(denoiser.native, VP):
        table = denoiser.native.alphas_cumprod.double()[: label + 1]
        if len(table) == label + 1 and math.isclose(table[-1].sqrt().item(), alpha, rel_tol=1e-6, abs_tol=1e-9):
            return (1 - table / torch.cat([table.new_ones(1), table[:-1]])).tolist()
    return [0.0] * label + [1 - alpha**2]


def grid_settings(denoiser: Denoiser, sampler: StudentSampler) -> dict[str, Any]:
    """The settings of ``pipelines/student_v1.py``'s scheduler: what every call does, read off the denoiser."""
    process, calls = denoiser.process, []
    for time in sampler.times:
        t, seen = torch.tensor([time], dtype=torch.float64), []
        skip = _constant(denoiser, 0.0, seen)(_ONE, t).x0.item()
        output = _constant(denoiser, 1.0, seen)(0 * _ONE, t).x0.item()
        fed, label = seen[0]
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        calls.append({"label": label, "alpha": alpha, "sigma": sigma, "input": fed, "skip": skip, "output": output})
    start = process.student_input(_ONE, torch.tensor(sampler.times[:1], dtype=torch.float64), sampler.input).item()
    return {"calls": calls, "start": start, "renoising": sampler.renoising, "clip_sample": sampler.clip_sample}


def map_settings(denoiser: Denoiser, sampler: StudentSampler) -> dict[str, Any]:
    """The settings of ``pipelines/flow_map_v1.py``'s scheduler: what a call does at every level of any grid."""
    assert sampler.target_time is not None
    fine = grid_settings(denoiser, sampler.in_steps(MOST_JUMPS))
    end = denoiser.process.label(torch.tensor([sampler.target_time], dtype=torch.float64)).item()
    return {"levels": fine["calls"], "end": end, "start": fine["start"], "clip_sample": sampler.clip_sample}
