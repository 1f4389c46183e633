"""Roles that are low-rank adapters on the teacher's own weights (Hu et al. 2022, arXiv:2106.09685), through peft."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import Lora
from .copies import on_cpu, sharing
from .errors import UserError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of diffusers' attention; those of the text are of transformers that treat it as they do the image."""


def add_lora(teacher: nn.Module, lora: Lora, role: str) -> nn.Module:
    """A network with trainable adapters whose other weights are the teacher's, in the same memory.

    The teacher itself stays a network of its own without adapters, so there is nothing to switch on and off.
    The adapters start at zero: the new network starts as the teacher.

    Raises:
        UserError: no layer has one of the wanted names; the message lists those that could be adapted.
    """
    check_lora(teacher, lora, role)
    network = sharing(teacher)
    alpha, targets = lora.alpha or lora.rank, _targets(lora, _layers(teacher))
    config = LoraConfig(r=lora.rank, lora_alpha=cast(int, alpha), target_modules=list(targets))
    network = inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def check_lora(teacher: nn.Module, lora: Lora, role: str) -> None:
    """Refuse targets that name no layer.

    Raises:
        UserError: as said.
    """
    layers = _layers(teacher)
    lost = [end for end in _targets(lora, layers) if not _matches(end, layers)]
    if lost:
        ends = sorted({_end(name) for name in layers})
        raise UserError(
            f"training.lora.{role}.targets: {', '.join(lost)} matches no layer; the network has {', '.join(ends)}"
        )


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _targets(lora: Lora, layers: list[str]) -> tuple[str, ...]:
    """Those asked for, or the projections that are there."""
    found = tuple(end for end in _ATTENTION if _matches(end, layers)) or _ATTENTION
    return found if lora.targets is None else lora.targets


def _matches(end: str, layers: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for name in layers)


def _end(name: str) -> str:
    """The last part of a layer's name that is not a number, with the number behind it: ``to_out.0``."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 without adapters that computes the same."""
    network = on_cpu(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    return network


def is_adapted(network: nn.Module) -> bool:
    """Whether ``network`` has adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network as those of one without adapters."""
    return (merged(network) if is_adapted(network) else network).state_dict()
