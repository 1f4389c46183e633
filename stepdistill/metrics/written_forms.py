"""Files of statistics as other tools read them, one form per reader."""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..arrays import ArrayFile
from ..errors import UserError
from .feature_sets import BLOCK, Rows
from .forms import KINDS, Statistics, array_names
from .pickled import pickled

Found = Mapping[str, Statistics]
"""Statistics by kind, the first of which goes where tools look."""


@dataclass(frozen=True)
class Form:
    """What a tool reads."""

    suffix: str
    kinds: tuple[str, ...]
    """That it has room for."""
    several: bool
    """Whether it holds more than one kind."""
    ddof: int
    """Its covariances are over ``n - ddof``."""
    write: Callable[[IO[bytes], Found, ArrayFile | None], None]
    """Statistics, and images where the source has them, to a file."""
    images: bool = False
    """Whether images go on beside the statistics."""
    needed: tuple[str, ...] = ()
    """Arrays without which its reader fails."""

    def taken(self, found: Found, *, images: bool) -> dict[str, Statistics]:
        """Those of ``found`` that it holds, over its divisor.

        Raises:
            UserError: what its reader needs is missing, there is nothing to hold, or the divisor needs an unknown
                ``n``.
        """
        there = [name for kind in found for name in array_names(kind)] + ["arr_0"] * images
        if missing := [name for name in self.needed if name not in there]:
            raise UserError(
                f"readers of this form need {', '.join(self.needed)}, and there is no {', no '.join(missing)}; "
                "another --form does without"
            )
        kinds = [kind for kind in found if kind in self.kinds][: None if self.several else 1]
        if not kinds:
            raise UserError(f"this form holds {' or '.join(self.kinds)}, got {', '.join(found)}")
        return {kind: found[kind].with_ddof(self.ddof) for kind in kinds}


def form_of(path: Path, name: str | None) -> Form:
    """The form called ``name``, or the first of the suffix of ``path``.

    Raises:
        UserError: there is none of that name, or the suffix is of another.
    """
    known = ", ".join(f"{each} ({form.suffix})" for each, form in FORMS.items())
    if name is not None and name not in FORMS:
        raise UserError(f"statistics are written as {known}, got --form {name}")
    fitting = [form for each, form in FORMS.items() if name in (None, each) and form.suffix == path.suffix.lower()]
    if not fitting:
        asked = "" if name is None else f" for --form {name}"
        raise UserError(f"statistics are written as {known}, got {path}{asked}")
    return fitting[0]


def write_npz(file: IO[bytes], found: Found, images: ArrayFile | None = None) -> None:
    """This package's own, which is also that of EDM, pytorch-fid and clean-fid, and ADM's with all it needs."""
    (main, first), *rest = found.items()
    others = dict(rest)
    brief = {kind: {"n": other.n, "ddof": other.ddof, **_source(other)} for kind, other in others.items()}
    packages = ("stepdistill", "torch", "numpy", "pillow")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    meta = {"versions": versions, **first.meta, "kind": main, **_source(first), **({"others": brief} if brief else {})}
    arrays: dict[str, Any] = {"ddof": np.array(first.ddof), "meta": np.array(json.dumps(meta))}
    if first.n is not None:
        arrays["n"] = np.array(first.n)
    for kind, statistics in found.items():
        arrays |= zip(array_names(kind, beside=kind != main), _arrays(statistics), strict=True)
    np.savez(file, **arrays)
    for name, rows in (("feats", first.features), ("arr_0", images)):
        if rows is not None:
            _append(file, name, rows)


def _source(statistics: Statistics) -> dict[str, str | None]:
    return {"extractor": statistics.extractor, "weights_sha256": statistics.weights}


def _arrays(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    return statistics.mean.cpu().numpy(), statistics.covariance.cpu().numpy()


def _append(file: IO[bytes], name: str, rows: Rows | ArrayFile) -> None:
    """Add an array to the ``.npz`` in ``file``, some rows at a time."""

    def part(start: int) -> np.ndarray:
        return torch.as_tensor(rows[start : start + BLOCK]).cpu().numpy()

    descr = np.lib.format.dtype_to_descr(part(0).dtype)
    header = {"descr": descr, "fortran_order": False, "shape": tuple(rows.shape)}
    with zipfile.ZipFile(file, "a") as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, len(rows), BLOCK):
            member.write(part(start).tobytes())


def _edm2(file: IO[bytes], found: Found, images: ArrayFile | None) -> None:
    """``calculate_metrics.py``: a section for each distance, that of FID of NVIDIA's Inception."""
    if "fid" in found and found["fid"].extractor not in (None, "inception"):
        raise UserError(f"the fid of this form is of extractor inception, got {found['fid'].extractor}")
    counts = {statistics.n for statistics in found.values() if statistics.n is not None}
    if len(counts) > 1:
        raise UserError(f"this form has one number of images, got {sorted(counts)}; choose one --kind")
    content: dict[str, Any] = {"num_images": counts.pop()} if counts else {}
    for kind, statistics in found.items():
        content[str(KINDS[kind])] = dict(zip(("mu", "sigma"), _arrays(statistics), strict=True))
    file.write(pickled(content))


def _feature_stats(file: IO[bytes], found: Found, images: ArrayFile | None) -> None:
    """The attributes of StyleGAN's and SiD's ``FeatureStats``, which its ``load`` takes from a plain dictionary."""
    [statistics] = found.values()
    if statistics.n is None:
        raise UserError("this form holds sums over the images, and their number is not known")
    mean, covariance = _arrays(statistics)
    content = {
        "capture_all": False,
        "capture_mean_cov": True,
        "max_items": statistics.n,
        "num_items": statistics.n,
        "num_features": len(mean),
        "all_features": [],
        "raw_mean": mean * statistics.n,
        "raw_cov": (covariance + np.outer(mean, mean)) * statistics.n,
    }
    file.write(pickled(content))


def _torch_fidelity(file: IO[bytes], found: Found, images: ArrayFile | None) -> None:
    """An entry of the cache, which is compared with float32 means alone."""
    [statistics] = found.values()
    mean, covariance = _arrays(statistics)
    whole = io.BytesIO()  # On a full disk torch.save raises no OSError.
    torch.save({"mu": mean.astype(np.float32), "sigma": covariance}, whole)
    file.write(whole.getbuffer())


_ONE = ("fid", "fd-dinov2")
_ADM = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")  # What guided-diffusion's evaluator.py reads of a reference.
FORMS = {
    "npz": Form(".npz", tuple(KINDS), several=True, ddof=1, write=write_npz, images=True),
    "adm": Form(".npz", tuple(KINDS), several=True, ddof=1, write=write_npz, images=True, needed=_ADM),
    "edm2": Form(".pkl", _ONE, several=True, ddof=1, write=_edm2),
    "sid": Form(".pkl", _ONE, several=False, ddof=0, write=_feature_stats),
    "torch-fidelity": Form(".pt", _ONE, several=False, ddof=1, write=_torch_fidelity),
}
"""By name; a suffix stands for its first."""
