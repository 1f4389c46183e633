"""Noise processes ``x_t = alpha_t x_0 + sigma_t eps``: coefficients, slopes, log-SNR and network labels.

Time ``t`` runs from 0 (data) to 1 (noise) in every process and is the family's own coordinate: the table index of a
DDPM, Karras' ramp of an EDM model, the (shifted) time of a rectified flow, the angle of TrigFlow.  Times have shape
``(B,)``, samples ``(B, ...)``.  Coefficients are float64; a half-precision sample is promoted to float32 by them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

InputScale = Literal["unit", "sigma"]
"""What a one-step student is fed: ``unit``, the standard normal noise itself; ``sigma``, ``sigma_t`` times it."""


def broadcast(coefficient: Tensor, like: Tensor) -> Tensor:
    """View a per-sample ``(B,)`` coefficient as ``(B, 1, ..., 1)``, in at least float32, to scale ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return coefficient.reshape(-1, *[1] * (like.ndim - 1)).to(like.device, dtype)


class NoiseProcess(ABC):
    """A Gaussian process from data to noise.  All methods map ``(B,)`` to ``(B,)`` in float64."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient; falls with ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient; rises with ``t``."""

    @abstractmethod
    def alpha_slope(self, t: Tensor) -> Tensor:
        """``d alpha / dt``."""

    @abstractmethod
    def sigma_slope(self, t: Tensor) -> Tensor:
        """``d sigma / dt``."""

    def log_snr(self, t: Tensor) -> Tensor:
        """``ln(alpha^2 / sigma^2)``; falls with ``t``."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    @abstractmethod
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of ``log_snr``, clamped to [0, 1]."""

    @abstractmethod
    def label(self, t: Tensor) -> Tensor:
        """The number that the network is told for time ``t``."""

    @abstractmethod
    def time_of_label(self, label: Tensor) -> Tensor:
        """Inverse of ``label``."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time that a stock scheduler can name: a table entry, a whole label of a flow that counts them."""
        return t.double()

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the noise at which sampling starts (``sigma_max`` for VE, 1 elsewhere)."""
        return 1.0

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)``, each broadcast against ``like``."""
        return broadcast(self.alpha(t), like), broadcast(self.sigma(t), like)

    def slopes(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(d alpha/dt, d sigma/dt)``, each broadcast against ``like``."""
        return broadcast(self.alpha_slope(t), like), broadcast(self.sigma_slope(t), like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of clean ``x0`` and standard normal ``eps``, both ``(B, ...)``."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * eps

    def student_input(self, noise: Tensor, t: Tensor, scale: InputScale) -> Tensor:
        """What a student fed at level ``t`` receives for standard normal ``noise``, see ``InputScale``."""
        return noise if scale == "unit" else self.coefficients(t, noise)[1] * noise


@dataclass(frozen=True, eq=False)
class VP(NoiseProcess):
    """The variance-preserving process of a DDPM table (Ho et al. 2020), linear in log-SNR between entries.

    Args:
        alphas_cumprod: ``(N,)`` table of ``alpha^2``, strictly decreasing, N >= 2; entry ``i`` is label ``i``
            and time ``i / (N - 1)``.  A zero terminal entry (zero-SNR tables) is read as ``alpha = 9e-14``.
    """

    alphas_cumprod: Tensor
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 2 or not bool((table.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod must be a strictly decreasing (N >= 2,) table, got shape {tuple(table.shape)}: {table}"
            )
        if not (table[0] < 1 and table[-1] >= 0):
            raise ValueError(f"alphas_cumprod must lie in [0, 1), got {table[-1].item()} to {table[0].item()}")

    def _table(self, device: torch.device) -> Tensor:
        """The log-SNR of every entry on ``device``; copied there once, so that a step never waits for it."""
        if device not in self._tables:
            table = self.alphas_cumprod.double()
            self._tables[device] = (table.log() - (-table).log1p()).clamp(min=-60.0).to(device)
        return self._tables[device]

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Position within the table interval of ``t``, log-SNR at its left end, and its slope over the interval."""
        table = self._table(t.device)
        position = t.double() * (len(table) - 1)
        left = position.floor().clamp(0, len(table) - 2).long()
        return position - left, table[left], table[left + 1] - table[left]

    def log_snr(self, t: Tensor) -> Tensor:
        inside, start, rise = self._interval(t)
        return start + inside * rise

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def _log_snr_slope(self, t: Tensor) -> Tensor:
        return self._interval(t)[2] * (len(self.alphas_cumprod) - 1)

    def alpha_slope(self, t: Tensor) -> Tensor:
        return 0.5 * self.alpha(t) * self.sigma(t).square() * self._log_snr_slope(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -0.5 * self.sigma(t) * self.alpha(t).square() * self._log_snr_slope(t)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        wanted = log_snr.double().clamp(table[-1], table[0])
        left = (torch.searchsorted(-table, -wanted) - 1).clamp(0, len(table) - 2)
        inside = (wanted - table[left]) / (table[left + 1] - table[left])
        return (left + inside) / (len(table) - 1)

    def label(self, t: Tensor) -> Tensor:
        return t.double() * (len(self.alphas_cumprod) - 1)

    def time_of_label(self, label: Tensor) -> Tensor:
        return label.double() / (len(self.alphas_cumprod) - 1)

    def snap(self, t: Tensor) -> Tensor:
        return self.time_of_label(self.label(t).round())


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """The straight line ``x_t = (1 - sigma) x_0 + sigma eps`` of rectified flow (Liu et al. 2023).

    Args:
        shift: SD3's resolution shift, ``sigma = shift t / (1 + (shift - 1) t)``; uniform steps in ``t`` are
            then the shifted grid.
        label_scale: the network is told ``label_scale * sigma`` (1000 in diffusers, 1 in REPA).
        reversed_label: the network is told ``label_scale * (1 - sigma)`` instead (SiT's own time).
    """

    shift: float = 1.0
    label_scale: float = 1000.0
    reversed_label: bool = False

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) / (1 + (self.shift - 1) * t.double())

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t.double() / (1 + (self.shift - 1) * t.double())

    def sigma_slope(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * t.double()).square()

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -self.sigma_slope(t)

    def _time_at_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_at_sigma(torch.sigmoid(-0.5 * log_snr.double()))

    def label(self, t: Tensor) -> Tensor:
        return self.label_scale * (self.alpha(t) if self.reversed_label else self.sigma(t))

    def time_of_label(self, label: Tensor) -> Tensor:
        level = label.double() / self.label_scale
        return self._time_at_sigma(1 - level if self.reversed_label else level)

    def snap(self, t: Tensor) -> Tensor:
        return self.time_of_label(self.label(t).round()) if self.label_scale > 1 else t.double()


@dataclass(frozen=True)
class VE(NoiseProcess):
    """``x_t = x_0 + sigma eps`` with ``sigma`` on Karras' ramp (EDM, Karras et al. 2022, eq. 5).

    Args:
        sigma_min: noise level at ``t = 0``.
        sigma_max: noise level at ``t = 1``.
        rho: curvature of the ramp.
        label_scale: the network is told ``label_scale * ln(sigma)`` (0.25 in EDM, 250 in consistency models).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    label_scale: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must lie in (0, sigma_max = {self.sigma_max}), got {self.sigma_min}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    @property
    def prior_scale(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return (low + t.double() * (high - low)) ** self.rho

    def alpha_slope(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma_slope(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return self.rho * (high - low) * (low + t.double() * (high - low)) ** (self.rho - 1)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        return (((-0.5 * log_snr.double() / self.rho).exp() - low) / (high - low)).clamp(0, 1)

    def label(self, t: Tensor) -> Tensor:
        return self.label_scale * self.sigma(t).log()

    def time_of_label(self, label: Tensor) -> Tensor:
        return self.time_at_log_snr(-2 * label.double() / self.label_scale)


@dataclass(frozen=True)
class Trig(NoiseProcess):
    """TrigFlow, ``x_t = cos(theta) x_0 + sin(theta) noise_std eps``, ``theta = pi t / 2`` (Lu & Song 2025, sec. 3).

    Args:
        noise_std: ``sigma_d`` of the paper, the standard deviation of the data that the noise is matched to.
    """

    noise_std: float = 1.0

    def __post_init__(self) -> None:
        if self.noise_std <= 0:
            raise ValueError(f"noise_std must be positive, got {self.noise_std}")

    @property
    def prior_scale(self) -> float:
        return self.noise_std

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.label(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.noise_std * torch.sin(self.label(t))

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(self.label(t))

    def sigma_slope(self, t: Tensor) -> Tensor:
        return self.noise_std * math.pi / 2 * torch.cos(self.label(t))

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        ratio = (-0.5 * log_snr.double()).exp() / self.noise_std
        return torch.atan(ratio) / (math.pi / 2)

    def label(self, t: Tensor) -> Tensor:
        return t.double() * math.pi / 2

    def time_of_label(self, label: Tensor) -> Tensor:
        return label.double() / (math.pi / 2)
