"""What differs between the network families of diffusers: how each is conditioned, called, shaped and hosted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..conditions import Cond
from ..denoiser import Call

Config = Mapping[str, Any]
"""The ``config.json`` of a network."""

Encode = Callable[[Any, Sequence[str], Config, int], Cond]
"""``(pipeline without its network, prompts, network config, picture size in pixels) -> one row per prompt``."""

Null = Callable[[Any, str | None, Config, int], Cond]
"""The same for one negative prompt; ``None`` is what the stock pipeline takes when it is given none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of stock pipelines round one class of network."""

    pipelines: tuple[str, ...]
    """Names of the pipeline classes."""
    component: Literal["unet", "transformer", "network"]
    """The network's place in the pipeline."""
    network: type[Any]
    """Its class."""
    call: Call
    shape: Callable[[Config], tuple[int, int, int]]
    """``(C, H, W)`` of one sample by default: latents where there is a VAE."""
    output: str
    """Name of the last, linear layer: scaling its parameters scales the output."""
    encode: Encode | None = None
    """Reads prompts; ``None`` for a family without text."""
    told: Callable[[Config], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """Shapes of one row of what ``encode`` gives for prompts of full length."""
    null: Null | None = None
    """Reads the negative prompt where the stock pipeline does not read it as any other."""
    tokens: Callable[[Config, tuple[int, int, int]], int] = lambda config, shape: (
        shape[1] * shape[2] // config.get("patch_size", 1) ** 2
    )
    """Length of the image sequence of a sample, by which flow schedulers may shift."""
    patch: int | None = None
    """Side of the squares that a sample is cut into, where it is not the config's ``patch_size``."""
    later_noise: Callable[[torch.Tensor], torch.Tensor] = lambda noise: noise
    """Noise of a later step, ``(B, C, H, W)``, put into the order in which the stock pipeline draws it."""
    classes: Callable[[Config], int | None] = lambda config: None
    """Number of class labels."""
    null_label: Callable[[Config], int | None] = lambda config: None
    """The label that means "no class", where the family fixes it."""
    bottleneck: Callable[[nn.Module], nn.Module] | None = None
    """Finds the layer by whose output ``(B, N, ...)``, averaged over N, the network judges in an adversarial term."""
    embeds_guidance: Callable[[Config], bool] = lambda config: False
    """Whether the network is told a guidance scale, instead of being called twice."""
    refuse: Callable[[Config], str | None] = lambda config: None
    """Why a network of this class cannot be distilled; ``None`` if it can."""
    scales_input: bool = True
    """Whether its pipelines let their scheduler scale what the network is fed."""
    hosted: Callable[[Any, float | None], Any] = lambda network, guidance: network
    """The network, which may be changed, as its stock pipeline runs it whatever scale a call says: without guiding of
    its own, and always as it is when told the given scale; ``None``: it goes on being told one."""
    usual_size: int | None = None
    """Height in pixels that a stock call makes by default; ``None`` where it follows the network."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What a call of the stock pipeline must say so that it does not guide of its own."""


def square(config: Config) -> tuple[int, int, int]:
    """``(C, H, W)`` of a network whose config has ``in_channels`` and ``sample_size``."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def last_norm(network: nn.Module) -> nn.Module:
    """The layer before a transformer's output, ``(B, tokens, C)``, wrapped or not (SiD-DiT, arXiv:2509.25127)."""
    return next(module for name, module in network.named_modules() if name.split(".")[-1] == "norm_out")


def rows(**tensors: torch.Tensor) -> Cond:
    """A condition on the CPU."""
    return {key: value.detach().cpu() for key, value in tensors.items()}


def numbers(cond: Cond) -> dict[str, torch.Tensor]:
    """What ``cond`` has for a ``Conditioned`` network."""
    return {key: cond[key] for key in ("target_label", "guidance_scale") if key in cond}
