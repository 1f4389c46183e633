"""Features kept on disk in shards by sample id, each whole or not there, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import UserError, first_line
from .base import Features
from .feature_sets import check_features

MANIFEST = "manifest.json"
_SHARD = re.compile(r"(\d{9,})-(\d{9,})\.safetensors")
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_TAGS = {"float16": "F16", "float32": "F32", "float64": "F64"}
"""What safetensors calls them."""


@dataclass(frozen=True)
class Manifest:
    """What all shards of a store have in common; a store is reopened with the same, or not at all."""

    protocol: str
    """Hash of the protocol that the features follow."""
    made_by: str
    """What made the images: weights, steps, seeds; features of two makers do not mix."""
    dimension: int
    """``d`` of the features."""
    seen_by: str = ""
    """The network and what is done to an image before it: weights, resizing."""
    classes: int = 0
    """Logits kept beside them, 0 for none."""
    dtype: Literal["float16", "float32", "float64"] = "float16"
    """On disk; float16 moves a Frechet distance by 1e-6 of it."""
    shard_size: int = 1000
    """Shard ``k`` holds samples ``[k shard_size, (k + 1) shard_size)``, or several hold parts of it."""


class Shard(NamedTuple):
    """A file and the ids of its samples."""

    path: Path
    ids: range


class FeatureStore:
    """A folder of ``manifest.json`` and safetensors shards; ranks may write at once, each its own ids.

    Args:
        folder: made if it is not there.
        manifest: what the features are.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        if manifest.dtype not in _DTYPES or min(manifest.shard_size, manifest.dimension, manifest.classes + 1) < 1:
            raise UserError(f"a feature store needs positive sizes and dtype {' or '.join(_DTYPES)}, got {manifest}")
        self.folder, self.manifest = folder, manifest
        if not (folder / MANIFEST).exists():
            if any(folder.glob("*.safetensors")):
                raise UserError(f"{folder} holds shards and no {MANIFEST}; name an empty folder")
            # Ranks that arrive together write the same, under names of their own.
            self._write(MANIFEST, json.dumps(asdict(manifest), indent=2).encode(), f"{MANIFEST}.{uuid4().hex}.tmp")
        found = asdict(read_manifest(folder))
        for name, value in asdict(manifest).items():
            if found[name] != value:
                raise UserError(
                    f"{folder} holds features with {name} {found[name]!r}, and this run makes {value!r}; name another "
                    "folder, or delete that one"
                )

    def write(self, first_id: int, features: Features) -> None:
        """Keep features of the samples ``first_id, first_id + 1, ...``; on return they are on disk.

        Raises:
            UserError: ids of two shards or there already, other shapes than the manifest's, values that are not
                finite in its dtype, or the disk is full: then nothing of these is kept, and all before is.
        """
        ids = range(first_id, first_id + len(features.features))
        if first_id < 0 or list(self._cells(ids)) != [ids]:
            raise UserError(
                f"a shard holds ids within one multiple of {self.manifest.shard_size}, got {_interval(ids)}; "
                "write the ranges of missing()"
            )
        taken = next((shard for shard in self._shards() if _overlap(ids, shard.ids)), None)
        if taken is not None:
            raise UserError(f"{taken.path} holds samples of {_interval(ids)} already; write the ranges of missing()")
        name = f"{ids.start:09d}-{ids.stop:09d}.safetensors"
        self._write(name, save(self._stored(features, len(ids)), self._metadata()), f"{name}.tmp")

    def done(self) -> list[range]:
        """The ids that are there, as ranges in order with gaps between them.

        Raises:
            UserError: a shard is truncated, or not of this store; the message names it.
        """
        merged: list[range] = []
        for shard in self._checked():
            if merged and merged[-1].stop == shard.ids.start:
                merged[-1] = range(merged[-1].start, shard.ids.stop)
            else:
                merged.append(shard.ids)
        return merged

    def missing(self, ids: range) -> list[range]:
        """What is left to write of consecutive ``ids``: ranges of one shard each, for ranks to share out.

        Raises:
            UserError: as ``done``.
        """
        left, start = [], ids.start
        for there in [*self.done(), range(ids.stop, ids.stop)]:
            left += self._cells(range(start, min(there.start, ids.stop)))
            start = max(start, there.stop)
        return left

    def shards(self) -> Iterator[tuple[range, Features]]:
        """Ids and features, as stored, of one shard after another in the order of their ids.

        Raises:
            UserError: as ``done``.
        """
        for shard in self._checked():
            tensors = load_file(shard.path)
            yield shard.ids, Features(tensors["features"], tensors.get("logits"), tensors.get("marks"))

    def read(self, ids: range) -> Features:
        """Features (and logits) of consecutive ``ids``, float32 or more.

        Raises:
            UserError: some are missing, or as ``done``.
        """
        missing = self.missing(ids)
        if missing or not ids:
            raise UserError(f"{self.folder} lacks features of {', '.join(map(_interval, missing)) or 'no samples'}")
        features, logits = [], []
        for own, part in self.shards():
            rows = slice(max(ids.start - own.start, 0), max(ids.stop - own.start, 0))
            features.append(at_least_float32(part.features[rows]))
            if part.logits is not None:
                logits.append(at_least_float32(part.logits[rows]))
        return Features(torch.cat(features), torch.cat(logits) if logits else None)

    def _cells(self, ids: range) -> Iterator[range]:
        """``ids`` cut at the multiples of the shard size."""
        size = self.manifest.shard_size
        for start in range(ids.start // size * size, ids.stop if ids else 0, size):
            yield range(max(start, ids.start), min(start + size, ids.stop))

    def _shards(self) -> list[Shard]:
        """What the names of the files say, in order."""
        shards = []
        for path in self.folder.glob("*.safetensors"):
            match = _SHARD.fullmatch(path.name)
            if match is None:
                raise UserError(f"{path} is no shard of this store; delete it, or move it away")
            shards.append(Shard(path, range(int(match[1]), int(match[2]))))
        return sorted(shards, key=lambda shard: (shard.ids.start, shard.ids.stop))

    def _checked(self) -> list[Shard]:
        """The shards, after their headers and lengths were seen to be this store's."""
        shards = self._shards()
        for shard in shards:
            try:
                with safe_open(shard.path, framework="pt") as file:
                    parts = {name: file.get_slice(name) for name in file.keys() if name != "marks"}  # noqa: SIM118
                    found = {name: (part.get_dtype(), *part.get_shape()) for name, part in parts.items()}
                    mine = file.metadata() == self._metadata()
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{shard.path} is damaged ({first_line(error)}); delete it to have it made again"
                ) from None
            widths = {"features": self.manifest.dimension, "logits": self.manifest.classes}
            kind = _TAGS[self.manifest.dtype]
            if not mine or found != {name: (kind, len(shard.ids), width) for name, width in widths.items() if width}:
                raise UserError(f"{shard.path} is of another store, or renamed: it holds {found}; delete it")
        for one, two in pairwise(shards):
            if _overlap(one.ids, two.ids):
                raise UserError(f"{one.path} and {two.path} hold the same samples; delete one")
        return shards

    def _metadata(self) -> dict[str, str]:
        return {name: vars(self.manifest)[name] for name in ("protocol", "made_by", "seen_by")}

    def _stored(self, features: Features, count: int) -> dict[str, Tensor]:
        """The tensors of a shard, checked against the manifest."""
        expected = {"features": self.manifest.dimension, "logits": self.manifest.classes}
        stored = {}
        for (name, width), tensor in zip(expected.items(), features[:2], strict=True):
            if (tensor is None) != (width == 0) or (tensor is not None and tensor.shape != (count, width)):
                got = None if tensor is None else tuple(tensor.shape)
                raise UserError(f"expected {name} of shape {(count, width) if width else None}, got {got}")
            if tensor is not None:
                stored[name] = tensor.to("cpu", _DTYPES[self.manifest.dtype]).contiguous()
                check_features(stored[name], f"{name} in {self.manifest.dtype}")
        if features.marks is not None:
            stored["marks"] = features.marks.cpu()
        return stored

    def _write(self, name: str, data: bytes, temporary_name: str) -> None:
        """Write a file that is whole or not there."""
        temporary = self.folder / temporary_name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(
                f"cannot write {self.folder / name}: {error.strerror}; what was written before is kept: mend that and "
                "run again"
            ) from None


def at_least_float32(stored: Tensor) -> Tensor:
    """``stored`` in a dtype to reckon with."""
    return stored.to(torch.promote_types(stored.dtype, torch.float32))


def read_manifest(folder: Path) -> Manifest:
    """What a store holds.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no feature store: cannot read {path}: {first_line(error)}") from None
    names = {field.name for field in fields(Manifest)}
    if not isinstance(found, dict) or found.keys() != names:
        raise UserError(f"{path} is not of a feature store: expected {', '.join(sorted(names))}")
    return Manifest(**found)


def _overlap(one: range, two: range) -> bool:
    return max(one.start, two.start) < min(one.stop, two.stop)


def _interval(ids: range) -> str:
    return f"[{ids.start}, {ids.stop})"
