"""Mean and covariance of reference features: reading every common file, writing what every tool can read."""

from __future__ import annotations

import json
import os
import platform
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError, first_line
from .feature_sets import BLOCK, Rows
from .forms import KINDS, Statistics, content_of, statistics_in
from .pickled import pickled
from .protocols import Protocol

_ROUNDING = 1e-5
"""What a sum in float32 may leave, relative to the largest entry: across the diagonal, and below zero on it."""


def read_statistics(
    path: str | Path,
    *,
    kind: str = "fid",
    extractor: str | None = None,
    dimension: int | None = None,
    sees: str | None = None,
) -> Statistics:
    """Statistics in a file of this package, EDM, EDM2, pytorch-fid, clean-fid, ADM, StyleGAN, SiD or torch-fidelity.

    Files without a divisor of their own hold covariances over ``n - 1``, StyleGAN's and SiD's over ``n``.

    Args:
        path: ``.npz``, ``.pkl`` or ``.pt``.
        kind: which of several, of ``KINDS``.
        extractor: refuse statistics that are known to be of another one.
        dimension: refuse statistics of another number of features.
        sees: refuse statistics of images that are known to have reached the extractor on another way, see
            ``Protocol.sees``.

    Raises:
        UserError: not there, damaged, without statistics of that kind, or not as asked.
    """
    path = Path(path)
    _known(kind)
    content = content_of(path)
    try:
        statistics = statistics_in(content, kind)
        _check(statistics, extractor, dimension)
        _check_way(statistics, sees)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds statistics in a form that is not known: {first_line(error)}") from error
    return statistics


def write_statistics(
    path: str | Path,
    statistics: Statistics,
    *,
    kind: str = "fid",
    others: Mapping[str, Statistics] | None = None,
    protocol: Protocol | None = None,
    weights: str | None = None,
) -> None:
    """Write ``.npz`` that other tools read as theirs, or EDM2's ``.pkl``; a failure leaves the old file, if any.

    Args:
        path: the file; its folder exists.
        statistics: what to write, with its ddof; other tools take it as 1.
        kind: what they are for.
        others: of other kinds, which only this package reads and whose features are not kept.
        protocol: how they were made, kept as text and digest.
        weights: sha256 of the extractor's weights.

    Raises:
        UserError: the file cannot be written, or its format has no place for this.
    """
    path = Path(path)
    _known(kind)
    if path.suffix == ".npz":
        told = _told(statistics, kind, protocol, weights or statistics.weights)
        _write_whole(path, lambda file: _npz(file, statistics, kind, others or {}, told))
    elif path.suffix == ".pkl" and not (protocol or weights or others):
        data = _edm2(statistics, kind)
        _write_whole(path, lambda file: file.write(data))
    elif path.suffix == ".pkl":
        raise UserError(f"EDM2's file keeps neither a protocol nor weights; write .npz, got {path}")
    else:
        raise UserError(f"statistics are written as .npz or .pkl (EDM2), got {path}")


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that is then at ``path``, whole; a failure leaves the old one, if any.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w+b") as file:
                write(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def convert(source: str | Path, target: str | Path, *, kind: str = "fid") -> Statistics:
    """Write the statistics in ``source`` to ``target`` (``.npz`` or ``.pkl``), over ``n - 1`` as its readers expect.

    Raises:
        UserError: as for reading and writing, or a covariance over ``n`` of unknown ``n``.
    """
    statistics = read_statistics(source, kind=kind).with_ddof(1)
    write_statistics(target, statistics, kind=kind)
    return statistics


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"statistics are for {', '.join(KINDS)}, got {kind!r}")


def _check(statistics: Statistics, extractor: str | None, dimension: int | None) -> None:
    mean, covariance = statistics.mean, statistics.covariance
    size = len(mean)
    if covariance.shape != (size, size):
        raise UserError(
            f"mu has {size} features and sigma is {tuple(covariance.shape)}; they belong to different files"
        )
    if dimension not in (None, size):
        raise UserError(f"statistics of {size} features, expected {dimension}; they are of another extractor")
    if None not in (extractor, statistics.extractor) and extractor != statistics.extractor:
        raise UserError(f"statistics of extractor {statistics.extractor}, expected {extractor}")
    scale = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > _ROUNDING * scale:
        raise UserError("sigma is not symmetric, so it is not a covariance")
    if covariance.diagonal().min() < -_ROUNDING * scale:
        raise UserError("sigma has negative variances, so it is not a covariance")


def _told(statistics: Statistics, kind: str, protocol: Protocol | None, weights: str | None) -> dict[str, Any]:
    packages = ("stepdistill", "torch", "numpy", "pillow")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    told = {"versions": versions, **statistics.meta, "kind": kind, "extractor": statistics.extractor}
    if protocol:
        told["protocol"] = {"name": protocol.name, "digest": protocol.digest(), "text": protocol.text()}
    if weights:
        told["weights_sha256"] = weights
    return told


def _check_way(statistics: Statistics, sees: str | None) -> None:
    text = statistics.meta.get("protocol", {}).get("text", "")
    ways = dict.fromkeys(line.partition(" sees: ")[2] for line in text.splitlines() if " sees: " in line)
    if sees is not None and ways and sees not in ways:
        raise UserError(f"statistics of {' and '.join(ways)}, expected {sees}; make them anew with `ref`")


def _npz(
    file: IO[bytes], statistics: Statistics, kind: str, others: Mapping[str, Statistics], meta: dict[str, Any]
) -> None:
    mean, covariance = ("mu_s", "sigma_s") if kind == "sfid" else ("mu", "sigma")
    arrays: dict[str, Any] = {
        mean: statistics.mean.cpu().numpy(),
        covariance: statistics.covariance.cpu().numpy(),
        "ddof": np.array(statistics.ddof),
        "meta": np.array(json.dumps(meta | ({"others": _brief(others)} if others else {}))),
    }
    if statistics.n is not None:
        arrays["n"] = np.array(statistics.n)
    for other, found in others.items():
        arrays[f"{KINDS[other]}_mu"] = found.mean.cpu().numpy()
        arrays[f"{KINDS[other]}_sigma"] = found.covariance.cpu().numpy()
    np.savez(file, **arrays)
    if statistics.features is not None:
        _append_features(file, statistics.features)


def _brief(others: Mapping[str, Statistics]) -> dict[str, Any]:
    """What ``_fit`` does not find in the arrays."""
    return {
        kind: {"n": found.n, "ddof": found.ddof, "extractor": found.extractor, "weights_sha256": found.weights}
        for kind, found in others.items()
    }


def _append_features(file: IO[bytes], features: Rows) -> None:
    """Add ``feats`` to the ``.npz`` in ``file``, some rows at a time."""
    dtype = features[:1].cpu().numpy().dtype
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(features.shape)}
    with zipfile.ZipFile(file, "a") as archive, archive.open("feats.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, len(features), BLOCK):
            member.write(features[start : start + BLOCK].cpu().numpy().tobytes())


def _edm2(statistics: Statistics, kind: str) -> bytes:
    section = KINDS[kind]
    if section is None or statistics.ddof != 1:
        raise UserError(f"EDM2's file holds fid and fd-dinov2 over n - 1, got {kind} over n - {statistics.ddof}")
    fit = {"mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy()}
    return pickled({section: fit} if statistics.n is None else {"num_images": statistics.n, section: fit})
