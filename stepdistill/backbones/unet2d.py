"""``UNet2DModel``: unconditional and class-conditional pixel networks (DDPM, DDIM, consistency, EDM)."""

from __future__ import annotations

from typing import cast

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ..conditions import Cond


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, C, H, W)`` output for state ``x`` at float network labels ``(B,)``; ``cond`` may hold ``class_labels``."""
    return network(x, label.float(), **cond, return_dict=False)[0]


def bottleneck(network: nn.Module) -> nn.Module:
    """The middle block, also of a wrapped network."""
    return next(layer for name, layer in network.named_modules() if name.split(".")[-1] == "mid_block")


def sample_shape(network: UNet2DModel) -> tuple[int, int, int]:
    """``(C, H, W)`` of one sample."""
    size = network.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return network.config["in_channels"], height, width


class _ShiftedTimeEmbedding(nn.Module):
    """The network's time embedding plus a vector that the wrapper sets for the call in progress."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shift: Tensor | None = None

    def forward(self, sample: Tensor) -> Tensor:
        embedding = self.inner(sample)
        return embedding if self.shift is None else embedding + self.shift


class TargetTimeUNet(nn.Module):
    """A ``UNet2DModel`` that is also told a target time, as a second embedding added to the first.

    The last layer of the new embedding starts at zero, so the network starts as ``unet``.  ``unet`` is taken
    over; ``folded`` gives a stock network back.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.time_proj = unet.time_proj
        inner = cast(TimestepEmbedding, unet.time_embedding)
        self.target_embedding = TimestepEmbedding(inner.linear_1.in_features, inner.linear_1.out_features)
        nn.init.zeros_(self.target_embedding.linear_2.weight)
        nn.init.zeros_(self.target_embedding.linear_2.bias)
        self.unet = unet
        self.unet.register_module("time_embedding", _ShiftedTimeEmbedding(inner))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        *,
        target_label: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Output at state ``sample`` and label ``timestep`` for target labels ``target_label (B,)``."""
        shifted = cast(_ShiftedTimeEmbedding, self.unet.time_embedding)
        shifted.shift = self._embedding(target_label.to(sample.device), sample.dtype)
        try:
            return self.unet(sample, timestep, class_labels=class_labels, return_dict=return_dict)
        finally:
            shifted.shift = None

    def _embedding(self, target_label: Tensor, dtype: torch.dtype) -> Tensor:
        return self.target_embedding(self.time_proj(target_label.float()).to(dtype))

    @torch.no_grad()
    def folded(self, target_label: float) -> UNet2DModel:
        """A stock copy with the target time fixed: its embedding is a constant, hence part of a bias."""
        stock = cast(UNet2DModel, UNet2DModel.from_config(self.unet.config))
        weights = {k.replace("time_embedding.inner.", "time_embedding."): v for k, v in self.unet.state_dict().items()}
        stock.load_state_dict(weights)
        device = next(self.parameters()).device
        cast(nn.Module, stock).to(device)
        bias = cast(TimestepEmbedding, stock.time_embedding).linear_2.bias
        bias.add_(self._embedding(torch.tensor([target_label], device=device), bias.dtype)[0])
        return stock.eval()
