"""Scoring from end to end: images, a reference and a protocol in, one record out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .identity import of_images, of_reference, of_texts
from .metrics import collecting, score
from .metrics.base import Extractor, Source, Value
from .metrics.clip import ARCHITECTURES, ClipScorer, load_towers
from .metrics.collecting import Collected, Network, Stream, collect, reader
from .metrics.extractors import PACKAGES, Digits, load_extractor
from .metrics.forms import Statistics
from .metrics.lock import held
from .metrics.precision import full_precision, tf32
from .metrics.presets import protocol as preset
from .metrics.protocols import CLASSIFIERS, FRECHET, PARTS, SINGLE
from .metrics.ranks import device_of_rank, gathered, rank_and_world
from .metrics.score import References
from .metrics.sources import open_source
from .metrics.statistics import contents, read_statistics
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
        self._base = preset(options.preset or ("digits" if (reference or "").startswith("builtin:digits") else "clean"))
        self._changes: dict[str, object] = {}
        self.change({**changes, **({"metrics": options.metrics} if options.metrics else {})})
        if reference is None and (compared := [each for each in self.protocol.metrics if each not in ALONE]):
            raise UserError(f"{', '.join(compared)} need a REFERENCE; without one there are {', '.join(ALONE)}")
        self.skipped: list[str] = []
        self.seconds = {"reference": 0.0, "generation": 0.0, "features": 0.0, "distance": 0.0}
        self.prompts: list[str] = []
        self.inputs: dict[str, str] = {}
        """Checksums of the prompts or the class labels that the images are of, where they are known."""
        self.extractors: dict[str, Extractor] = {}
        self._networks: dict[str, Network] = {}
        self._references: References | None = None

    def begin(self, features: Path | None) -> None:
        """Measure anew, against the same reference, and keep features in another folder."""
        self.options, self.skipped = replace(self.options, features=features), []
        self.seconds |= {"generation": 0.0, "features": 0.0, "distance": 0.0}

    def change(self, changes: dict[str, object]) -> None:
        """Let the protocol differ from its preset in these fields too."""
        self._changes |= changes
        self.protocol = self._base.changed(self._changes)

    def networks(self, count: int) -> dict[str, Network]:
        """Those of the protocol, for ``count`` images."""
        if options := {"clip", "diversity"} & set(self.protocol.metrics):
            self.prompts = self.read_prompts(count, " and ".join(sorted(options)))
        self._networks = self._networks or collecting.networks(
            self.protocol, self.protocol.metrics, self._extractor, self._scorer, self.prompts
        )
        return self._networks

    def read_prompts(self, count: int, metric: str = "") -> list[str]:
        """The prompts of ``count`` images, one each, which ``metric`` needs.

        Raises:
            UserError: there are none, or not as many as images; or an empty one, where text is needed.
        """
        from .prompts import blank_lines, read_prompts

        source = self.options.prompts
        if source is None:
            raise UserError(f"{metric} of {self.protocol.name} needs --prompts FILE, or --metrics without it")
        found = read_prompts(source)
        if len(found) < count or (self.images and len(found) not in (count, self.images)):
            images = self.images or count
            blank = "".join(f"; line {line} is blank, which is no prompt" for line in blank_lines(source)[:1])
            raise UserError(f"{source} holds {len(found)} prompts for {images} images; give one an image{blank}")
        empty = next((k for k, prompt in enumerate(found[:count], 1) if not prompt.strip()), None)
        if "clip" in self.protocol.metrics and empty is not None:
            raise UserError(f"prompt {empty} of {source} is empty; a CLIP score needs text, or --metrics without clip")
        return found[:count]

    def _extractor(self, name: str) -> Extractor:
        told, needed = self.options, {self.protocol.network(metric)[0] for metric in self.protocol.metrics}
        weights = None if name == Digits.name and len(needed) > 1 else told.weights  # They are for the others.
        found = load_extractor(name, weights=weights, device=self.device, trust=told.trust, download=told.download)
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
        asked = f", prompts={of_texts(self.prompts)}" if self.prompts else ""

        def at(network: Network) -> FeatureStore:
            classes = 1008 if network.name in CLASSIFIERS else 0
            steps = " > ".join((*network.steps, network.weights))
            manifest = Manifest(
                self.protocol.digest(), made_by, network.dimension, f"{steps}{asked}", classes, dtype=network.dtype
            )
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
        statistics, images = contents(self.reference)
        fits = [metric for metric in compared if statistics and (metric in FRECHET or not images)]
        found: dict[str, Collected | Statistics] = {metric: self._fit(metric, compared.pop(metric)) for metric in fits}
        if compared:
            source = open_source(self.reference)
            found |= collect(self.reading(source), len(source), compared, device=self.device)
        return found

    def _fit(self, metric: str, network: Network) -> Statistics:
        assert self.reference is not None
        kind = FRECHET.get(metric, "fid")
        sees = self.protocol.sees(metric)
        dimension = network.dimension
        return read_statistics(self.reference, kind=kind, extractor=network.name, dimension=dimension, sees=sees)

    def reading(self, source: Source) -> Stream:
        """The images of ``source``; broken ones are left out and noted where that was asked for."""
        told, skipped = self.options, self.skipped if self.options.skip_broken else None
        return reader(source, batch_size=told.batch_size, workers=told.workers, skip_broken=skipped)

    def left_out(self) -> list[str]:
        """Names of the broken images of all processes."""
        return sorted({name for names in gathered(self.skipped) for name in names})

    def collected(self, stream: Stream, count: int, made_by: str) -> dict[str, Collected]:
        """What the networks say of ``count`` images; the reference is read before, so that its errors come first."""
        needed = self.networks(count)
        self.references(needed)
        began = time.perf_counter()
        with held(self.options.features):
            found = collect(stream, count, needed, device=self.device, store=self.store(made_by))
        self.seconds["features"] += time.perf_counter() - began
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
        names = [network.name for network in self._networks.values()]
        built = dict.fromkeys(PACKAGES[start] for start in PACKAGES for name in names if name.startswith(start))
        packages = ("stepdistill", "torch", "numpy", "pillow", *built)
        dtypes = " + ".join(sorted({network.dtype for network in self._networks.values()}))
        images = "float32" if self.protocol.quantisation == "none" else "uint8"
        with full_precision(self.device):  # As the networks do.
            rounded = tf32(self.device)
        return {
            "protocol": self.protocol.described(),
            "reference": self.reference,
            "reference_digest": None if self.reference is None else of_reference(self.reference),
            "precision": {"images": images, "features": {"dtype": dtypes, "tf32": rounded}},
            "inputs": self.inputs,
            "weights": {network.name: network.weights for network in self._networks.values()},
            "world_size": rank_and_world()[1],
            "device": str(self.device),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }

    def _behind(self, value: str) -> int | None:
        """Images of the reference behind a value."""
        metric = next((metric for metric, parts in PARTS.items() if value in parts), value)
        return None if self._references is None else self._references.count(metric)

    def record(self, images: str, metrics: dict[str, Value], **more: object) -> dict[str, Any]:
        """The result, ready for JSON; kept beside the features, where they are kept."""
        record: dict[str, Any] = {
            **self.setting(),
            "metrics": {name: {**asdict(value), "n_ref": self._behind(name)} for name, value in metrics.items()},
            "images": images,
            "skipped": self.left_out(),
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


def first(options: Options, source: Source, name: str) -> int:
    """How many images of ``source``, which errors call ``name``, are asked for.

    Raises:
        UserError: more than there are.
    """
    if options.count is not None and options.count > len(source):
        raise UserError(f"--count {options.count} is more than the {len(source)} images of {name}")
    return len(source) if options.count is None else options.count


def calc(images: str, reference: str | None, options: Options) -> dict[str, Any]:
    """Score ``images``, any source of ``open_source``, against images or statistics, where a metric compares.

    Raises:
        UserError: an input that cannot be read or compared.
    """
    source = open_source(images)
    count = first(options, source, images)
    run = Run(options, reference, {"samples": count}, images=len(source))
    if options.prompts is not None:
        run.inputs = {"prompts": of_texts(run.read_prompts(count))}
    made_by = images if options.features is None else of_images(images)
    return run.record(images, run.measured(run.reading(source), count, made_by))
