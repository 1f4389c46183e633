"""Numbers that students are told beside the time of the state: BOOT's and FreeFlow's second time, a guidance scale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_NAMES = ("time_embedding", "timestep_embedder")
"""What diffusers' networks call the embedding of the time; a DiT has one in every block."""

_UNITS = {"target_label": 1.0, "guidance_scale": 100.0}
"""What each number is multiplied by for sinusoids that are made for labels up to a thousand."""


class _Shifted(nn.Module):
    """A time embedding plus a vector that the wrapper sets for the call in progress."""

    def __init__(self, inner: TimestepEmbedding) -> None:
        super().__init__()
        self.inner = inner
        self.shift: Tensor | None = None

    def forward(self, *told: Any) -> Tensor:  # noqa: ANN401
        embedding = self.inner(*told)
        return embedding if self.shift is None else embedding + self.shift


class Conditioned(nn.Module):
    """A diffusers network that is also told a target time or a guidance scale, by embeddings added to the time's.

    The last layer of a new embedding starts at zero, so the network starts as ``network``, which is taken over;
    ``folded`` gives a stock network back.

    Args:
        network: a stock network.
        target: tell it a target label.
        scale: tell it guidance scales; this one is folded in.
    """

    def __init__(self, network: nn.Module, *, target: bool = True, scale: float | None = None) -> None:
        super().__init__()
        places = time_embeddings(network)
        if not places:
            raise ValueError(f"{type(network).__name__} has no time embedding to add another to")
        self._parts = [_Shifted(cast(TimestepEmbedding, network.get_submodule(place))) for place in places]
        for place, part in zip(places, self._parts, strict=True):
            network.set_submodule(place, part)
        inner = self._parts[0].inner
        self.time_proj = Timesteps(inner.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0)
        told = ["target_label"] * target + ["guidance_scale"] * (scale is not None)
        self.embeddings = nn.ModuleDict({name: _silent(inner) for name in told})
        self.scale = scale
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What ``network`` says, told also ``target_label (B,)``, ``guidance_scale (B,)`` or both."""
        with self._shifted(self._shift({name: kwargs.pop(name) for name in self.embeddings})):
            return self.network(*args, **kwargs)

    @contextmanager
    def _shifted(self, shift: Tensor | None) -> Iterator[None]:
        before = self._parts[0].shift
        for part in self._parts:
            part.shift = shift
        try:
            yield
        finally:
            for part in self._parts:
                part.shift = before

    def checkpointed(self, block: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        """What ``block`` of ``network`` says, computed again on the way back, told what it is told now.

        A transformer that embeds its time in every block would otherwise be told nothing by then.
        """
        shift = self._parts[0].shift

        def again(*args: Any) -> Any:  # noqa: ANN401
            with self._shifted(shift):
                return block(*args)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    def _shift(self, told: dict[str, Tensor]) -> Tensor:
        """The sum of the embeddings of ``told``, ``(B, D)``."""
        shifts = []
        for name, number in told.items():
            embedding = self.embeddings[name]
            weight = cast(TimestepEmbedding, embedding).linear_1.weight
            shifts.append(embedding(self.time_proj(_UNITS[name] * number.to(weight.device).float()).to(weight.dtype)))
        return torch.stack(shifts).sum(0)

    @torch.no_grad()
    def folded(self, target_label: float | None = None) -> nn.Module:
        """A stock copy with the target time and the scale fixed: what they add is constant, hence part of a bias.

        Without a ``target_label`` the copy of a network that is told one still lacks what its embedding adds.
        """
        fixed = {"target_label": target_label, "guidance_scale": self.scale}
        told = {name: torch.tensor([fixed[name]]) for name in self.embeddings if fixed[name] is not None}
        stock, shift = copy.deepcopy(self.network), self._shift(told)[0] if told else 0
        for place, part in list(stock.named_modules()):
            if isinstance(part, _Shifted):
                part.inner.linear_2.bias.add_(shift)
                stock.set_submodule(place, part.inner)
        return stock.eval()


def _silent(inner: TimestepEmbedding) -> TimestepEmbedding:
    """An embedding of the same width that is zero; only its last layer, or nothing before it would ever learn."""
    made = TimestepEmbedding(inner.linear_1.in_features, inner.linear_2.out_features)
    nn.init.zeros_(made.linear_2.weight)
    nn.init.zeros_(made.linear_2.bias)
    return made


def time_embeddings(network: nn.Module) -> list[str]:
    """Names of the layers that embed the time."""
    return [
        name
        for name, part in network.named_modules()
        if isinstance(part, TimestepEmbedding) and name.rpartition(".")[2] in _NAMES
    ]
