"""Scoring from end to end: images, a reference and a protocol in, one record out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .metrics import score
from .metrics.base import Extractor, Value
from .metrics.clip import ARCHITECTURES, ClipScorer, load_towers
from .metrics.extractors import load_extractor
from .metrics.forms import Statistics
from .metrics.presets import protocol as preset
from .metrics.protocols import CLASSIFIERS
from .metrics.ranks import device_of_rank, gathered, rank_and_world
from .metrics.score import FRECHET, SINGLE, Collected, Network, References, Stream, collect, reader
from .metrics.sources import open_source
from .metrics.statistics import read_statistics, write_statistics
from .metrics.store import FeatureStore, Manifest
from .metrics.weights import find_weights

ALONE = (*SINGLE, "clip")
"""Metrics without a reference."""
RUN = "run.json"
"""Record of a run that keeps its features, beside them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command of the evaluator may be told."""

    preset: str | None = None
    """Name of a protocol; ``digits`` against the bundled digits and ``clean`` against anything else, by default."""
    metrics: tuple[str, ...] | None = None
    """In place of the protocol's."""
    count: int | None = None
    """The first so many images; all, or as many as the protocol generates, by default."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts or a file of them, one an image, for the CLIP score, diversity and text-to-image pipelines."""
    weights: str | None = None
    """File or folder of the networks' weights."""
    trust: bool = False
    download: bool = False
    batch_size: int = 64
    workers: int = 4
    features: Path | None = None
    """Folder where features are kept, so that a killed run is continued and two runs can be compared."""
    skip_broken: bool = False


class Run:
    """One protocol, its networks, its reference, and what was noted on the way."""

    def __init__(
        self,
        options: Options,
        reference: str | None,
        changes: dict[str, object],
        device: torch.device | None = None,
        *,
        images: int | None = None,
    ) -> None:
        self.options, self.reference, self.device = options, reference, device or device_of_rank()
        self.images = images
        """How many there are, of which some may be asked for; ``None`` where they are made."""
        base = preset(options.preset or ("digits" if (reference or "").startswith("builtin:digits") else "clean"))
        if options.metrics:
            changes = {**changes, "metrics": options.metrics}
        self.protocol = base.changed(changes)
        if reference is None and (compared := [each for each in self.protocol.metrics if each not in ALONE]):
            raise UserError(f"{', '.join(compared)} need a REFERENCE; without one there are {', '.join(ALONE)}")
        self.skipped: list[str] = []
        self.seconds = {"reference": 0.0, "images": 0.0, "distance": 0.0}
        self.prompts: list[str] = []
        self.extractors: dict[str, Extractor] = {}
        self._networks: dict[str, Network] = {}
        self._references: References | None = None

    def networks(self, count: int) -> dict[str, Network]:
        """Those of the protocol, for ``count`` images."""
        if options := {"clip", "diversity"} & set(self.protocol.metrics):
            self.prompts = self._read_prompts(count, " and ".join(sorted(options)))
        self._networks = self._networks or score.networks(
            self.protocol, self.protocol.metrics, self._extractor, self._scorer, self.prompts
        )
        return self._networks

    def _read_prompts(self, count: int, metric: str) -> list[str]:
        from .prompts import read_prompts

        if self.options.prompts is None:
            raise UserError(f"{metric} of {self.protocol.name} needs --prompts FILE, or --metrics without it")
        found = read_prompts(self.options.prompts)
        if len(found) < count or (self.images and len(found) not in (count, self.images)):
            images = self.images or count
            raise UserError(f"{self.options.prompts} holds {len(found)} prompts for {images} images; give one an image")
        return found[:count]

    def _extractor(self, name: str) -> Extractor:
        told = self.options
        found = load_extractor(name, weights=told.weights, device=self.device, trust=told.trust, download=told.download)
        self.extractors[name] = found
        return found

    def _scorer(self) -> ClipScorer:
        told, protocol = self.options, self.protocol
        found = find_weights(protocol.clip_model, path=told.weights, trust=told.trust, download=told.download)
        towers = load_towers(ARCHITECTURES[protocol.clip_model], found, device=self.device)
        template, scale, clamp = protocol.clip_template, protocol.clip_scale, protocol.clip_clamp
        return ClipScorer(towers, template=template, scale=scale, clamp=clamp)

    def store(self, made_by: str) -> Callable[[Network], FeatureStore] | None:
        """Where the features of a network are kept, if anywhere."""
        folder = self.options.features
        if folder is None:
            return None

        def at(network: Network) -> FeatureStore:
            classes = 1008 if network.name in CLASSIFIERS else 0
            manifest = Manifest(self.protocol.digest(), made_by, network.dimension, classes, "float32")
            return FeatureStore(folder / network.name.replace(" ", "-"), manifest)

        return at

    def references(self, needed: dict[str, Network]) -> References:
        """What the images are compared with, read at the first call.

        Raises:
            UserError: it cannot be read, or is not what a metric compares with.
        """
        if self._references is None:
            began = time.perf_counter()
            self._references = score.references(self._referred(needed))
            self.seconds["reference"] = time.perf_counter() - began
        return self._references

    def _referred(self, needed: dict[str, Network]) -> Mapping[str, Collected | Statistics]:
        compared = {metric: network for metric, network in needed.items() if metric not in ALONE}
        if self.reference is None or not compared:
            return {}
        statistics, images = _contents(self.reference)
        fits = [metric for metric in compared if statistics and (metric in FRECHET or not images)]
        found: dict[str, Collected | Statistics] = {metric: self._fit(metric, compared.pop(metric)) for metric in fits}
        if compared:
            source = open_source(self.reference)
            stream = reader(source, batch_size=self.options.batch_size, workers=self.options.workers, skip_broken=None)
            found |= collect(stream, len(source), compared, device=self.device)
        return found

    def _fit(self, metric: str, network: Network) -> Statistics:
        assert self.reference is not None
        kind = FRECHET.get(metric, "fid")
        return read_statistics(self.reference, kind=kind, extractor=network.name, dimension=network.dimension)

    def collected(self, stream: Stream, count: int, made_by: str) -> dict[str, Collected]:
        """What the networks say of ``count`` images; the reference is read before, so that its errors come first."""
        needed = self.networks(count)
        self.references(needed)
        began = time.perf_counter()
        found = collect(stream, count, needed, device=self.device, store=self.store(made_by))
        self.seconds["images"] += time.perf_counter() - began
        return found

    def values(self, found: dict[str, Collected]) -> dict[str, Value]:
        """Every metric of what was collected last."""
        began = time.perf_counter()
        against = self.references(self._networks)
        result = score.values(self.protocol, self.protocol.metrics, found, against, prompts=self.prompts)
        self.seconds["distance"] += time.perf_counter() - began
        return result

    def measured(self, stream: Stream, count: int, made_by: str) -> dict[str, Value]:
        """Every metric of ``count`` images."""
        return self.values(self.collected(stream, count, made_by))

    def setting(self) -> dict[str, Any]:
        """What measured, ready for JSON."""
        packages = ("stepdistill", "torch", "numpy", "pillow")
        return {
            "protocol": {
                "name": self.protocol.name,
                "digest": self.protocol.digest(),
                "text": self.protocol.text(),
                "fields": asdict(self.protocol),
            },
            "reference": self.reference,
            "weights": {network.name: network.weights for network in self._networks.values()},
            "tf32": False,
            "world_size": rank_and_world()[1],
            "device": str(self.device),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }

    def record(self, images: str, metrics: dict[str, Value], **more: object) -> dict[str, Any]:
        """The result, ready for JSON; kept beside the features, where they are kept."""
        record = {
            **self.setting(),
            "metrics": {name: asdict(value) for name, value in metrics.items()},
            "images": images,
            "skipped": self.skipped,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            **more,
        }
        if self.options.features is not None and rank_and_world()[0] == 0:
            temporary = self.options.features / f".{RUN}"
            try:
                temporary.write_text(json.dumps(record, indent=1) + "\n")
                temporary.replace(self.options.features / RUN)
            except OSError as error:
                raise UserError(f"cannot write {self.options.features / RUN}: {error.strerror}") from None
        return record


def calc(images: str, reference: str | None, options: Options) -> dict[str, Any]:
    """Score ``images``, any source of ``open_source``, against images or statistics, where a metric compares.

    Raises:
        UserError: an input that cannot be read or compared.
    """
    source = open_source(images)
    count = len(source) if options.count is None else options.count
    if count > len(source):
        raise UserError(f"--num {count} is more than the {len(source)} images of {images}")
    run = Run(options, reference, {"samples": count}, images=len(source))
    skipped = run.skipped if options.skip_broken else None
    stream = reader(source, batch_size=options.batch_size, workers=options.workers, skip_broken=skipped)
    metrics = run.measured(stream, count, images)
    run.skipped = sorted(name for names in gathered(run.skipped) for name in names)
    return run.record(images, metrics)


def ref(images: str, out: Path, options: Options) -> None:
    """Write the statistics of ``images``, for the protocol's Frechet distance, to ``out``, which other tools read.

    Raises:
        UserError: an input that cannot be read, or a file that cannot be written.
    """
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise UserError(f"statistics are written to an .npz in a folder that exists, got {out}; see `convert` for .pkl")
    source = open_source(images)
    count = len(source) if options.count is None else min(options.count, len(source))
    run = Run(options, images, {})
    metric = next((each for each in run.protocol.metrics if each in FRECHET), None)
    if metric is None:
        raise UserError(f"{run.protocol.name} has no Frechet distance, so there are no statistics to write")
    run.protocol = run.protocol.changed({"metrics": (metric,)})
    network = run.networks(count)[metric]
    stream = reader(source, batch_size=options.batch_size, workers=options.workers, skip_broken=None)
    moments = collect(stream, count, {metric: network}, device=run.device)[metric].sums.moments()
    if rank_and_world()[0] == 0:
        found = Statistics(moments.mean, moments.covariance, moments.n, 1, network.name)
        write_statistics(out, found, kind=FRECHET[metric], protocol=run.protocol, weights=network.weights)


def _contents(path: str) -> tuple[bool, bool]:
    """Whether there are statistics at ``path``, and whether there are images; a reference of ADM holds both."""
    if path.endswith((".pkl", ".pickle", ".pt")):
        return True, False
    if not (path.endswith(".npz") and Path(path).is_file()):
        return False, True
    try:
        with np.load(path, allow_pickle=False) as archive:
            return bool({"mu", "mu_s", "feats"} & set(archive.files)), "arr_0" in archive.files
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
