"""Files of statistics, one form per tool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import ArrayFile, open_npz
from ..errors import UserError, first_line
from .feature_sets import Rows, check_features
from .frechet import Moments, moments_of
from .pickled import read_pickle, read_torch

KINDS = {"fid": "fid", "fd-dinov2": "fd_dinov2", "sfid": None}
"""What statistics are for, and EDM2's name of it."""
PICKLES, TORCH = (".pkl", ".pickle"), (".pt", ".pth")
"""Suffixes of files of statistics, beside ``.npz``; capitals count as small letters."""


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fit of features, and what is known of how it was made."""

    mean: Tensor
    """``(d,)`` float64."""
    covariance: Tensor
    """``(d, d)`` float64, the sum of squares divided by ``n - ddof``."""
    n: int | None
    """Images; most files do not say."""
    ddof: int = 1
    extractor: str | None = None
    """As in ``protocols.EXTRACTORS``; most files do not say."""
    features: Rows | None = None
    """``(n, d)``, where the file holds them, which it goes on doing."""
    weights: str | None = None
    """sha256 of the extractor's; most files do not say."""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def brief(self) -> dict[str, Any]:
        """What they are of, ready for JSON."""
        return {"n": self.n, "dimension": len(self.mean), "extractor": self.extractor}

    def with_ddof(self, ddof: int) -> Statistics:
        """The same sums divided by ``n - ddof``.

        Raises:
            UserError: the number of images is not known, or too small.
        """
        if ddof == self.ddof:
            return self
        if self.n is None or self.n <= ddof:
            raise UserError(
                f"a covariance over n - {ddof} needs a known n above {ddof}, got n = {self.n or 'not known'}"
            )
        return replace(self, covariance=self.covariance * ((self.n - self.ddof) / (self.n - ddof)), ddof=ddof)

    def moments(self) -> Moments:
        """As ``frechet.Reference`` takes them, ddof as it is."""
        return Moments(self.n, self.mean, self.covariance)


@dataclass(frozen=True, eq=False)
class _Stored:
    """Features that are read from their file when they are asked for."""

    array: ArrayFile

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.array.shape)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return torch.from_numpy(self.array[rows].astype(self.array.dtype.newbyteorder("="), copy=False))


def content_of(path: Path) -> dict[str, Any]:
    """What is in the file at ``path``, by name; image arrays are named, features of an ``.npz`` opened.

    Raises:
        UserError: not there, of another kind, damaged, or with more than numbers in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; statistics are .npz, .pkl or .pt, downloaded where they are on the web")
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return read_pickle(path)
    if suffix in TORCH:
        return read_torch(path)
    if suffix != ".npz":
        raise UserError(f"statistics are .npz, .pkl or .pt, got {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            small = {key: None if key in ("arr_0", "feats") else file[key] for key in file}
            return small | ({"feats": open_npz(path, "feats")} if "feats" in small else {})
    except UserError:
        raise
    except Exception as error:  # Damage shows as BadZipFile, zlib.error, EOFError, ValueError, TypeError and more.
        if "allow_pickle" in str(error):
            raise UserError(f"{path} holds Python objects, not plain arrays; save mu and sigma as float64") from error
        raise UserError(f"{path} is truncated or not an .npz: {first_line(error)}") from error


def array_names(kind: str, *, beside: bool = False) -> tuple[str, str]:
    """Mean and covariance in an ``.npz``, ``beside`` those of a kind that has the usual names."""
    if kind == "sfid":
        return "mu_s", "sigma_s"
    return (f"{KINDS[kind]}_mu", f"{KINDS[kind]}_sigma") if beside else ("mu", "sigma")


def kinds_in(content: dict[str, Any]) -> list[str]:
    """The kinds that the file says it holds; ``fid`` where it says nothing."""
    if _is_own(content):
        meta = json.loads(content["meta"].item())
        return [meta["kind"], *meta.get("others", {})]
    sections = [kind for kind, section in KINDS.items() if section in content]
    spatial = set(array_names("sfid")) <= content.keys()
    usual = ["fid"] if not spatial or "mu" in content else []
    return sections or [*usual, *(["sfid"] if spatial else [])]


def statistics_in(content: dict[str, Any], kind: str) -> Statistics:
    """The statistics of ``kind`` in what any of the tools wrote, not yet checked against each other.

    Raises:
        UserError: there are none, or their arrays are not finite floats of the right number of dimensions.
    """
    section = KINDS[kind]
    mean, covariance = array_names(kind)
    if section in content:
        extractor = "inception" if kind == "fid" else None
        return _fit(content[section], "mu", "sigma", "EDM2", n=content.get("num_images"), extractor=extractor)
    if _is_own(content):
        return _own(content, kind)
    if mean in content and covariance in content:
        return _fit(content, mean, covariance, "mu and sigma")
    if "raw_mean" in content and kind != "sfid":
        return _stylegan(content)
    if "feats" in content and kind != "sfid":
        return _of_features(content["feats"], "feats")
    if set(content) == {"arr_0"}:
        raise UserError("it holds images (arr_0), not statistics; give it as images")
    raise UserError(f"it holds no statistics for {kind}; it holds {', '.join(sorted(map(str, content))) or 'nothing'}")


def _is_own(content: dict[str, Any]) -> bool:
    return {"meta", "ddof"} <= content.keys()


def _own(content: dict[str, Any], kind: str) -> Statistics:
    """Of this package's own file."""
    meta = json.loads(content["meta"].item())
    if told := meta.get("others", {}).get(kind):
        fit, ddof, features = _fit(content, *array_names(kind, beside=True), "", n=told["n"]), told["ddof"], None
    elif meta["kind"] == kind:
        fit = _fit(content, *array_names(kind), "", n=int(content["n"]) if "n" in content else None)
        told, ddof = meta, int(content["ddof"])
        features = _rows("feats", content["feats"]) if "feats" in content else None
    else:
        raise UserError(f"it holds statistics for {' and '.join(kinds_in(content))}, expected {kind}")
    weights, meta = told.get("weights_sha256"), {} if told is not meta else meta
    return replace(
        fit, ddof=ddof, extractor=told["extractor"], features=features, weights=weights, meta=meta or fit.meta
    )


def _stylegan(content: dict[str, Any]) -> Statistics:
    """Of ``FeatureStats``: sums over ``num_items`` features, or the features where it was told to keep those alone."""
    if content.get("capture_mean_cov", True):
        n = int(content["num_items"])
        mean = _numbers("raw_mean", content["raw_mean"], 1) / max(n, 1)
        covariance = _numbers("raw_cov", content["raw_cov"], 2) / max(n, 1) - np.outer(mean, mean)
        return replace(_fit({"mu": mean, "sigma": covariance}, "mu", "sigma", "FeatureStats", n=n), ddof=0)
    if content.get("all_features"):
        return _of_features(np.concatenate(content["all_features"]), "FeatureStats")
    raise UserError("its FeatureStats hold neither sums nor features")


def _of_features(features: object, form: str) -> Statistics:
    values = _rows("feats", features)
    if len(values) < 2:
        raise UserError(f"a covariance needs two features or more, got {len(values)}")
    moments = moments_of(values)
    return Statistics(moments.mean, moments.covariance, moments.n, features=values, meta={"form": form})


def _rows(name: str, value: object) -> Rows:
    if not isinstance(value, ArrayFile):
        return torch.from_numpy(_numbers(name, value, 2))
    _check_form(name, value, 2)
    check_features(_Stored(value), name)
    return _Stored(value)


def _fit(
    content: object, mean: str, covariance: str, form: str, *, n: int | None = None, extractor: str | None = None
) -> Statistics:
    if not (isinstance(content, dict) and mean in content and covariance in content):
        raise UserError(f"{mean} and {covariance} are missing where {form} keeps them")
    arrays = _numbers(mean, content[mean], 1), _numbers(covariance, content[covariance], 2)
    meta = {"form": form, "stored": str(arrays[1].dtype)}
    return Statistics(*(torch.from_numpy(array).double() for array in arrays), n=n, extractor=extractor, meta=meta)


def _numbers(name: str, value: object, dimensions: int) -> np.ndarray:
    """``value`` as finite float32 or float64 in native, contiguous order."""
    array = np.asarray(value)
    _check_form(name, array, dimensions)
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds infinite or undefined values")
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _check_form(name: str, array: np.ndarray | ArrayFile, dimensions: int) -> None:
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        raise UserError(f"{name} is of dtype {array.dtype}, expected float64 or float32")
    if len(array.shape) != dimensions:
        raise UserError(f"{name} is of shape {array.shape}, expected {dimensions} dimension{'s' * (dimensions > 1)}")
    if 0 in array.shape:
        raise UserError(f"{name} is empty")
