"""Copies of a network that never hold a weight twice on its device."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


def sharing(network: N) -> N:
    """A copy whose parameters are the same memory and never require a gradient."""
    return _copy(network, {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()})


def on_cpu(network: N) -> N:
    """A copy on the CPU in float32, whose parameters require no gradient."""

    def moved(weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True), requires_grad=False)

    return _copy(network, {id(p): moved(p) for p in network.parameters()}).cpu().float()


def _copy(network: N, parameters: dict[int, nn.Parameter]) -> N:
    """``network`` with other parameters; all else, buffers among it, is copied."""
    return copy.deepcopy(network, dict(parameters))
