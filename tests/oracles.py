"""Closed-form teachers: laws whose denoiser, flow map and quantiles are known, read through the package's Denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.conditions import Cond
from stepdistill.denoiser import Denoiser, Target
from stepdistill.process import VE, VP, Flow, NoiseProcess, Trig

SIGMA_DATA = 0.7
"""The ``sigma_data`` of oracles with an EDM head."""

PROCESSES: dict[str, NoiseProcess] = {
    "vp": VP(torch.tensor([9.0, 5.0, 2.5, 1.0, 0.0, -1.0, -2.2, -3.5, -5.3], dtype=torch.float64).sigmoid()),
    "flow": Flow(shift=1.7),
    "ve": VE(sigma_min=0.05, sigma_max=10.0),
    "trig": Trig(),
}
TARGETS: tuple[Target, ...] = ("eps", "v", "x0", "flow", "edm")


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """How the small networks of the tests are called."""
    return network(x, label, **cond)


def cubature(dim: int) -> Tensor:
    """``(2 dim, dim)`` points whose mean over the batch is 0 and whose covariance is exactly the identity.

    They are symmetric, so the batch mean of any polynomial of degree three is its expectation under ``N(0, I)``.
    """
    points = dim**0.5 * torch.eye(dim, dtype=torch.float64)
    return torch.cat([points, -points])


def scattered(mean: float, variance: float, a: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of ``N(mean, variance)``, noise, and weights of sum 1, ``(N, 1)`` each.

    The weighted sum of what is at most quadratic in ``x_g`` at given ``x_t = a x_g + s eps``, and analytic in ``x_t``,
    is its expectation: two samples stand for the normal law of ``x_g`` at ``x_t``, the trapezoid rule for ``x_t``.
    """
    z = torch.linspace(-9, 9, 301, dtype=torch.float64).repeat(2)[:, None]
    side = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(301)[:, None]
    total = a * a * variance + s * s
    x_g = mean + a * variance * total**-0.5 * z + side * s * (variance / total) ** 0.5
    weight = (-0.5 * z.square()).exp()
    return x_g, (a * mean + total**0.5 * z - a * x_g) / s, weight / weight.sum()


class Mixture(nn.Module):
    """``sum_k weights_k N(means_k, covs_k)`` in D dimensions.

    Args:
        weights: ``(K,)``.
        means: ``(K, D)``.
        covs: ``(K, D, D)``.
    """

    weights: Tensor
    means: Tensor
    spreads: Tensor
    """Eigenvalues of the covariances, ``(K, D)``."""
    axes: Tensor
    """Their eigenvectors as columns, ``(K, D, D)``."""

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor) -> None:
        super().__init__()
        spreads, axes = torch.linalg.eigh(covs)
        for name, value in {"weights": weights, "means": means, "spreads": spreads, "axes": axes}.items():
            self.register_buffer(name, value)

    def expectations(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """``E[x0 | x]`` and ``E[eps | x]`` at ``x = a x0 + s eps``, ``(B, D)`` each; ``a`` and ``s`` are ``(B, 1)``."""
        a, s = a[:, None], s[:, None]
        variance = a.square() * self.spreads + s.square()
        offset = torch.einsum("kde,bkd->bke", self.axes, x[:, None] - a * self.means)
        log_density = self.weights.log() - 0.5 * (offset.square() / variance + variance.log()).sum(-1)
        share = log_density.softmax(1)
        x0 = self.means + torch.einsum("kde,bke->bkd", self.axes, a * self.spreads / variance * offset)
        eps = torch.einsum("kde,bke->bkd", self.axes, s / variance * offset)
        return torch.einsum("bk,bkd->bd", share, x0), torch.einsum("bk,bkd->bd", share, eps)

    def sample(self, count: int) -> Tensor:
        """``(count, D)`` independent samples."""
        k = torch.multinomial(self.weights, count, replacement=True)
        noise = self.spreads[k].clamp_min(0).sqrt() * torch.randn_like(self.means[k])
        return self.means[k] + torch.einsum("bde,be->bd", self.axes[k], noise)

    def denoiser(self, process: NoiseProcess, target: Target = "x0", *, negated: bool = False) -> Denoiser:
        """The perfect denoiser of this law, through a network that outputs ``target``."""
        return Denoiser(_Head(self, process, target, negated), process, target, call, negated, SIGMA_DATA)


class Told(nn.Module, ABC):
    """What a network says that is also told a target time."""

    @abstractmethod
    def expectations(self, x: Tensor, a: Tensor, s: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """``x0`` and ``eps`` with ``x = a x0 + s eps`` where the target time is ``then (B,)``."""

    def denoiser(self, process: NoiseProcess, target: Target = "x0") -> Denoiser:
        """It, through a network that outputs ``target``."""
        return Denoiser(_Head(self, process, target, negated=False), process, target, call, sigma_data=SIGMA_DATA)


class _Head(nn.Module):
    """A network that outputs ``target``; samples of any shape are flattened for the law."""

    def __init__(self, law: Mixture | Told, process: NoiseProcess, target: Target, negated: bool) -> None:
        super().__init__()
        self.law, self.process, self.target, self.negated = law, process, target, negated

    def forward(self, x: Tensor, label: Tensor, target_label: Tensor | None = None) -> Tensor:
        flat = x.flatten(1)
        a, s = self.process.coefficients(self.process.time_of_label(label), flat)
        total = s.square() + SIGMA_DATA**2
        state = flat * total.sqrt() if self.target == "edm" else flat
        assert isinstance(self.law, Told) == (target_label is not None), "only a two-time student is told a target"
        if isinstance(self.law, Told):
            x0, eps = self.law.expectations(state, a, s, self.process.time_of_label(cast(Tensor, target_label)))
        else:
            x0, eps = self.law.expectations(state, a, s)
        match self.target:
            case "x0":
                out = x0
            case "eps":
                out = eps
            case "v":
                out = a * eps - s * x0
            case "flow":
                out = eps - x0
            case _:
                out = (x0 - SIGMA_DATA**2 / total * state) * total.sqrt() / (s * SIGMA_DATA)
        return (-out if self.negated else out).view_as(x)


class Particles(nn.Module):
    """The perfect x0-network of the empirical measure on ``points (N, D)``: their posterior-weighted mean."""

    def __init__(self, points: Tensor, process: NoiseProcess) -> None:
        super().__init__()
        self.points, self.process = points, process

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        a, s = self.process.coefficients(self.process.time_of_label(label), x)
        log_share = (a * x @ self.points.T - 0.5 * a.square() * self.points.square().sum(1)) / s.square()
        return log_share.softmax(1) @ self.points

    def denoiser(self) -> Denoiser:
        """This network as a denoiser."""
        return Denoiser(self, self.process, "x0", call)


class Targeted:
    """A law whose denoiser is read through a network of one target."""

    def __init__(self, law: Mixture, target: Target) -> None:
        self.law = law
        self.target: Target = target

    def denoiser(self, process: NoiseProcess) -> Denoiser:
        """The perfect denoiser of the law."""
        return self.law.denoiser(process, self.target)


def gaussian(mean: Tensor, cov: Tensor) -> Mixture:
    """``N(mean, cov)`` for ``mean (D,)`` and ``cov (D, D)``."""
    return Mixture(mean.new_ones(1), mean[None], cov[None])


def flow_map(law: Mixture, process: NoiseProcess, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The state at time ``s`` of the probability-flow ODE of a *Gaussian* law that is at ``x (B, D)`` at time ``t``.

    In the eigenbasis of the covariance, ``(x_t - alpha_t m) / v_t`` with ``v^2 = alpha^2 lambda + sigma^2`` does not
    change along the ODE.
    """
    (mean,), (spread,), (axes,) = law.means, law.spreads, law.axes
    (a_t, s_t), (a_s, s_s) = process.coefficients(t, x), process.coefficients(s, x)
    growth = ((a_s.square() * spread + s_s.square()) / (a_t.square() * spread + s_t.square())).sqrt()
    return a_s * mean + ((x - a_t * mean) @ axes * growth) @ axes.T


def cdf(law: Mixture, process: NoiseProcess, x: Tensor, t: Tensor) -> Tensor:
    """``P(x_t <= x)`` of a one-dimensional law, ``(B, 1)``."""
    a, s = process.coefficients(t, x)
    variance = a.square() * law.spreads[:, 0] + s.square()
    return (law.weights * torch.special.ndtr((x - a * law.means[:, 0]) / variance.sqrt())).sum(1, keepdim=True)


def quantile(law: Mixture, process: NoiseProcess, probability: Tensor, t: Tensor, bound: float = 100.0) -> Tensor:
    """Inverse of ``cdf`` by bisection within ``[-bound, bound]``, ``(B, 1)``."""
    low, high = torch.full_like(probability, -bound), torch.full_like(probability, bound)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(law, process, middle, t) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def monotone_map(law: Mixture, process: NoiseProcess, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The flow map of any *one-dimensional* law: the ODE keeps the order of its states, hence their quantiles."""
    return quantile(law, process, cdf(law, process, x, t), s)
