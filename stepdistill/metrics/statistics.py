"""Mean and covariance of reference features: reading every common file, writing what every tool can read."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from ..arrays import open_npz
from ..errors import UserError, first_line
from .forms import KINDS, PICKLES, TORCH, Statistics, content_of, kinds_in, statistics_in
from .protocols import Protocol
from .written_forms import form_of, write_npz

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
    """Write this package's ``.npz``, which EDM, pytorch-fid and clean-fid read as theirs.

    Args:
        path: the file; its folder exists.  A failure leaves the old one, if any.
        statistics: what to write, with its ddof; other tools take it as 1.
        kind: what they are for.
        others: of other kinds, whose features are not kept.
        protocol: how they were made, kept as text and digest.
        weights: sha256 of the extractor's weights.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    _known(kind)
    if path.suffix.lower() != ".npz":
        raise UserError(f"statistics are written as .npz, got {path}; `convert` rewrites them in other forms")
    if protocol:
        told = {"name": protocol.name, "digest": protocol.digest(), "text": protocol.text()}
        statistics = replace(statistics, meta={**statistics.meta, "protocol": told})
    found = {kind: replace(statistics, weights=weights or statistics.weights), **(others or {})}
    _write_whole(path, lambda file: write_npz(file, found))


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


class Converted(NamedTuple):
    """What a conversion did with a file."""

    written: dict[str, Statistics]
    left: list[str]
    """Names of what the new file has no place for."""


def convert(source: str | Path, target: str | Path, *, kind: str | None = None, form: str | None = None) -> Converted:
    """Write the statistics in ``source`` to ``target`` as another tool reads them, over the divisor that it expects.

    Args:
        source: any file of ``read_statistics``.
        target: the file to write.
        kind: of ``KINDS``; all that are there and that the form has room for, by default.
        form: of ``FORMS``; the first of the target's suffix by default.

    Raises:
        UserError: as for reading and writing; or the form needs what is not there, such as the number of images.
    """
    source, target = Path(source), Path(target)
    chosen, content = form_of(target, form), content_of(source)
    try:
        kinds = kinds_in(content) if kind is None else [kind]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} holds statistics in a form that is not known: {first_line(error)}") from error
    found = {each: read_statistics(source, kind=each) for each in kinds}
    try:
        taken = chosen.taken(found, images="arr_0" in content)
        images = open_npz(source, "arr_0") if chosen.images and "arr_0" in content else None
        _write_whole(target, lambda file: chosen.write(file, taken, images))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    left = [each for each in found if each not in taken]
    return Converted(taken, left if images or "arr_0" not in content else [*left, "images (arr_0)"])


def contents(path: str) -> tuple[bool, bool]:
    """Whether there are statistics at ``path``, and whether there are images; a reference of ADM holds both."""
    suffix = Path(path).suffix.lower()
    if suffix in PICKLES + TORCH:
        return True, False
    if suffix != ".npz" or not Path(path).is_file():
        return False, True
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated or not an .npz: {error}; restore it, or make it again") from None
    return bool({"mu", "mu_s", "feats"} & names), "arr_0" in names


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
    if statistics.n is not None and (not isinstance(statistics.n, int) or statistics.n < 1):
        raise UserError(f"statistics of {statistics.n!r} images, expected a number of them")
    scale = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > _ROUNDING * scale:
        raise UserError("sigma is not symmetric, so it is not a covariance")
    if covariance.diagonal().min() < -_ROUNDING * scale:
        raise UserError("sigma has negative variances, so it is not a covariance")


def _check_way(statistics: Statistics, sees: str | None) -> None:
    text = statistics.meta.get("protocol", {}).get("text", "")
    ways = dict.fromkeys(line.partition(" sees: ")[2] for line in text.splitlines() if " sees: " in line)
    if sees is not None and ways and sees not in ways:
        raise UserError(f"statistics of {' and '.join(ways)}, expected {sees}; make them anew with `ref`")
