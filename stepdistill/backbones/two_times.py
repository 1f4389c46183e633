"""A second time for any network: what BOOT and FreeFlow tell their students beside the time of the state."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

_NAMES = ("time_embedding", "timestep_embedder")
"""What diffusers' networks call the embedding of the time; a DiT has one in every block."""


class _Shifted(nn.Module):
    """A time embedding plus a vector that the wrapper sets for the call in progress."""

    def __init__(self, inner: TimestepEmbedding) -> None:
        super().__init__()
        self.inner = inner
        self.shift: Tensor | None = None

    def forward(self, *told: Any) -> Tensor:  # noqa: ANN401
        embedding = self.inner(*told)
        return embedding if self.shift is None else embedding + self.shift


class TargetTime(nn.Module):
    """A diffusers network that is also told a target time, as a second embedding added to that of the first.

    The last layer of the new embedding starts at zero, so the network starts as ``network``, which is taken over;
    ``folded`` gives a stock network back.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        places = time_embeddings(network)
        if not places:
            raise ValueError(f"{type(network).__name__} has no time embedding to add a target time to")
        self._parts = [_Shifted(cast(TimestepEmbedding, network.get_submodule(place))) for place in places]
        for place, part in zip(places, self._parts, strict=True):
            network.set_submodule(place, part)
        inner = self._parts[0].inner
        self.time_proj = Timesteps(inner.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.target_embedding = TimestepEmbedding(inner.linear_1.in_features, inner.linear_2.out_features)
        nn.init.zeros_(self.target_embedding.linear_2.weight)
        nn.init.zeros_(self.target_embedding.linear_2.bias)
        self.network = network

    def forward(self, *args: Any, target_label: Tensor, **kwargs: Any) -> Any:  # noqa: ANN401
        """What ``network`` says, told also the target labels ``target_label (B,)``."""
        embedding = self._embedding(target_label)
        for part in self._parts:
            part.shift = embedding
        try:
            return self.network(*args, **kwargs)
        finally:
            for part in self._parts:
                part.shift = None

    def _embedding(self, target_label: Tensor) -> Tensor:
        weight = self.target_embedding.linear_1.weight
        return self.target_embedding(self.time_proj(target_label.to(weight.device).float()).to(weight.dtype))

    @torch.no_grad()
    def folded(self, target_label: float) -> nn.Module:
        """A stock copy with the target time fixed: its embedding is a constant, hence part of a bias."""
        stock, shift = copy.deepcopy(self.network), self._embedding(torch.tensor([target_label]))[0]
        for place, part in list(stock.named_modules()):
            if isinstance(part, _Shifted):
                part.inner.linear_2.bias.add_(shift)
                stock.set_submodule(place, part.inner)
        return stock.eval()


def time_embeddings(network: nn.Module) -> list[str]:
    """Names of the layers that embed the time."""
    return [
        name
        for name, part in network.named_modules()
        if isinstance(part, TimestepEmbedding) and name.rpartition(".")[2] in _NAMES
    ]
