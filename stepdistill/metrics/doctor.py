"""What the evaluator finds on this machine, and whether it still computes what it should."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from ..images import load_digits
from .extractors import load_extractor
from .frechet import Moments, Reference, moments_of
from .weights import KNOWN, KnownFile, locate, sha256_of

PACKAGES = ("stepdistill", "torch", "torchvision", "transformers", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    kind: Literal["weights", "version", "test"]
    name: str
    state: Literal["ok", "missing", "wrong"]
    detail: str


def report() -> list[Row]:
    """Weights with their checksums, versions, and a self-test; seconds, as every file that is found is read."""
    return [*weights(), *versions(), *self_test()]


def weights() -> list[Row]:
    """A row for every known file: where it is, and whether it is the published one."""
    return [_file(name, known) for name, known in KNOWN.items()]


def _file(name: str, known: KnownFile) -> Row:
    found = locate(known)
    if found is None:
        return Row("weights", name, "missing", f"{known.url} ({known.size / 1e6:.0f} MB, {known.licence})")
    got = sha256_of(found)
    if got != known.sha256:
        return Row("weights", name, "wrong", f"{found} has sha256 {got}, the published file {known.sha256}")
    return Row("weights", name, "ok", f"{found}, sha256 {got}")


def versions() -> list[Row]:
    """A row for every package that measured values depend on."""
    return [_package(name) for name in PACKAGES]


def _package(name: str) -> Row:
    try:
        return Row("version", name, "ok", version(name))
    except PackageNotFoundError:
        return Row("version", name, "missing", f"pip install {name}")


def self_test() -> list[Row]:
    """Two distances that are known without measuring."""
    digits = moments_of(load_extractor("digits")(load_digits()[0]).features)
    d = 64
    first, second = (torch.arange(1, d + 1, dtype=torch.float64) ** power for power in (-1.0, -0.5))
    basis = torch.linalg.qr(torch.arange(d * d, dtype=torch.float64).sin().view(d, d)).Q
    shift = torch.full((d,), 0.25, dtype=torch.float64)
    one, other = (
        Moments(10**6, mean, (basis * values) @ basis.T) for mean, values in ((0 * shift, first), (shift, second))
    )
    exact = (shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()).item()
    return [
        _compared("distance of the digits to themselves", Reference(digits).distance(digits), 0.0),
        _compared("distance of two Gaussians", Reference(one).distance(other), exact),
    ]


def _compared(name: str, got: float, expected: float) -> Row:
    state = "ok" if abs(got - expected) < 1e-9 * max(1.0, expected) else "wrong"
    return Row("test", name, state, f"{got:.12g}, expected {expected:.12g}")
