"""Networks of a user's own, as the functions that a recipe names."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from stepdistill import Plain
from stepdistill.process import VE, VP, Flow, Trig

TABLE = VP(torch.linspace(0.999, 0.02, 100).double())


class Conv(nn.Module):
    """Two convolutions that see the label, and the class where there are some."""

    def __init__(self, channels: int = 1, classes: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels + 1, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, channels, 3, padding=1)
        self.classes = nn.Embedding(classes, 8) if classes else None
        self.scale = scale

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        told = (self.scale * label).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        hidden = self.enter(torch.cat([x, told], 1))
        if self.classes is not None:
            hidden = hidden + self.classes(class_labels)[:, :, None, None]
        return self.leave(torch.nn.functional.silu(hidden))


class Timed(nn.Module):
    """An MLP whose time embedding is diffusers' own, under its name."""

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        self.classes = nn.Embedding(classes, 16) if classes else None
        self.time_proj = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(8, 16)
        self.enter, self.leave = nn.Linear(64, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        told = self.time_embedding(self.time_proj(label).to(x.dtype))
        if self.classes is not None:
            told = told + self.classes(class_labels)
        return self.leave(torch.nn.functional.silu(self.enter(x.flatten(1)) + told)).view_as(x)


def vp_eps() -> Plain:
    torch.manual_seed(1)
    return Plain(Conv(scale=0.01), process=TABLE, target="eps", shape=(1, 8, 8))


def flow_velocity() -> Plain:
    torch.manual_seed(2)
    return Plain(Conv(3), process=Flow(label_scale=1.0), target="flow", shape=(3, 8, 8))


def ve_x0() -> Plain:
    torch.manual_seed(3)
    return Plain(Conv(), process=VE(0.01, 20.0), target="x0", shape=(1, 8, 8))


def ve_edm() -> Plain:
    torch.manual_seed(4)
    return Plain(Conv(), process=VE(0.01, 20.0), target="edm", shape=(1, 8, 8), sigma_data=0.7)


def trig_v() -> Plain:
    torch.manual_seed(5)
    return Plain(Conv(), process=Trig(), target="v", shape=(1, 8, 8))


def timed() -> Plain:
    torch.manual_seed(6)
    return Plain(Timed(), process=TABLE, target="eps", shape=(1, 8, 8))


def with_classes() -> Plain:
    torch.manual_seed(7)
    return Plain(Conv(classes=4, scale=0.01), process=TABLE, target="eps", shape=(1, 8, 8), classes=4)


def timed_with_classes() -> Plain:
    torch.manual_seed(10)
    return Plain(Timed(4), process=TABLE, target="eps", shape=(1, 8, 8), classes=4)


def latents() -> Plain:
    """Four channels, of which three are shown at twice the size."""
    torch.manual_seed(8)

    def decode(samples: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(samples[:, :3], scale_factor=2)

    return Plain(Conv(4, scale=0.01), process=TABLE, target="eps", shape=(4, 8, 8), decode=decode)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.leave.weight = self.enter.weight

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x)))


def tied() -> Plain:
    torch.manual_seed(9)
    return Plain(Tied(), process=TABLE, target="eps", shape=(1, 8, 8))


def another() -> str:
    return "a network"


def not_an_image_network() -> Plain:
    return Plain(nn.Bilinear(1, 1, 1), process=TABLE, target="eps", shape=(1, 8, 8))


def half_the_size() -> Plain:
    class Half(Conv):
        def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x, label)[..., ::2]

    return Plain(Half(), process=TABLE, target="eps", shape=(1, 8, 8))


def pair() -> Plain:
    class Pair(Conv):
        def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return (super().forward(x, label),)  # type: ignore[return-value]

    return Plain(Pair(), process=TABLE, target="eps", shape=(1, 8, 8))


def undecodable() -> Plain:
    return Plain(Conv(4), process=TABLE, target="eps", shape=(4, 8, 8), decode=lambda samples: samples)
