"""One pass over the images, and every metric of a protocol from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from .base import Extractor, Features, Value
from .clip import ClipScorer
from .cmmd import cmmd
from .forms import Statistics
from .frechet import FeatureSums, Reference, frechet_distance
from .inception_score import inception_score_splits
from .kid import kid
from .prdc import prdc
from .protocols import Protocol
from .ranks import add_up, gathered, rank_and_world, together
from .resampling import prepare_mixed
from .sources import Batch, Source, batches
from .store import FeatureStore
from .vendi import per_prompt_diversity, vendi

FRECHET = {"fid": "fid", "fd-dinov2": "fd-dinov2", "clip-fid": "fid"}
"""Metrics that sums of features are enough for, and the kind of statistics that they compare with."""
SINGLE = ("is", "vendi", "diversity")
"""Metrics of the images alone, without a reference."""

Stream = Callable[[Sequence[int]], Iterable[Batch]]
"""Images of the given ids, in order."""


@dataclass(frozen=True, eq=False)
class Network:
    """What turns images into features, and how they are prepared for it."""

    name: str
    dimension: int
    steps: tuple[str, ...]
    """See ``resampling.prepare``."""
    see: Callable[[Tensor, Sequence[int]], Features]
    """Features of images ``(B, C, H, W)`` that are the samples of these ids."""
    weights: str
    """sha256 of its file."""


def networks(
    protocol: Protocol,
    metrics: Sequence[str],
    load: Callable[[str], Extractor],
    scorer: Callable[[], ClipScorer],
    prompts: Sequence[str],
) -> dict[str, Network]:
    """The network of every metric, each loaded once.

    Args:
        protocol: which one a metric takes, and the steps before it.
        metrics: of ``protocols.METRICS``.
        load: gives the extractor of a name.
        scorer: gives the CLIP score's.
        prompts: the prompt of every image, for the CLIP score.
    """
    made: dict[tuple[bool, str, tuple[str, ...]], Network] = {}
    found: dict[str, Network] = {}
    for metric in metrics:
        name, steps = protocol.network(metric)
        key = (metric == "clip", name, steps)
        if key not in made:
            made[key] = _scoring(scorer(), prompts, steps) if metric == "clip" else _extracting(load(name), steps)
        found[metric] = made[key]
    return found


def _extracting(extractor: Extractor, steps: tuple[str, ...]) -> Network:
    def see(images: Tensor, ids: Sequence[int]) -> Features:
        return extractor(images)

    return Network(extractor.name, extractor.dimension, steps, see, extractor.weights)


def _scoring(scorer: ClipScorer, prompts: Sequence[str], steps: tuple[str, ...]) -> Network:
    def see(images: Tensor, ids: Sequence[int]) -> Features:
        return Features(scorer(images, [prompts[k] for k in ids], first_row=ids[0]).scores[:, None])

    return Network("clip score", 1, steps, see, scorer.towers.weights)


@dataclass(eq=False)
class Collected:
    """What one network said of a set of images."""

    dimension: int
    keeps: bool
    """Whether a metric compares single images, so that features are kept beside their sums."""
    sums: FeatureSums = field(init=False)
    kept: list[tuple[list[int], Features]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = FeatureSums(self.dimension)

    def add(self, ids: Sequence[int], found: Features) -> None:
        """Take the features of the samples ``ids``."""
        self.sums.add(found.features, ids)
        if self.keeps:
            self.kept.append((list(ids), _on_cpu(found)))

    def join(self) -> None:
        """Take what the other processes have collected too."""
        if rank_and_world()[1] > 1:
            add_up(self.sums.count, self.sums.sum, self.sums.outer)
            self.kept = [part for parts in gathered(self.kept) for part in parts]

    def features(self) -> Features:
        """All kept features in the order of their ids."""
        return _in_order(self.kept)


def _on_cpu(found: Features) -> Features:
    return Features(found.features.cpu(), None if found.logits is None else found.logits.cpu())


def _in_order(parts: Sequence[tuple[Sequence[int], Features]]) -> Features:
    order = torch.tensor([k for ids, _ in parts for k in ids]).argsort()
    logits = [found.logits for _, found in parts if found.logits is not None]
    features = torch.cat([found.features for _, found in parts])[order]
    return Features(features, torch.cat(logits)[order] if logits else None)


def reader(source: Source, *, batch_size: int, workers: int, skip_broken: list[str] | None) -> Stream:
    """The images of ``source``, grey ones as RGB."""

    def stream(ids: Sequence[int]) -> Iterable[Batch]:
        return batches(source, ids, batch_size=batch_size, workers=workers, rgb=True, skip_broken=skip_broken)

    return stream


def collect(
    stream: Stream,
    count: int,
    told: Mapping[str, Network],
    *,
    device: torch.device,
    store: Callable[[Network], FeatureStore] | None = None,
) -> dict[str, Collected]:
    """Show ``count`` images to every network, once; processes share the ids, and all return the same.

    Args:
        stream: the images.
        count: how many; ids are ``0 .. count - 1``.
        told: the network of every metric.
        device: where images are prepared.
        store: where a network's features are kept for a run that is continued; what is there is not made again.

    Raises:
        UserError: images that cannot be read, or whose sizes the protocol does not make one.
    """
    made: dict[Network, Collected] = {}
    for network in told.values():
        keeps = any(metric not in FRECHET for metric, other in told.items() if other is network)
        made[network] = Collected(network.dimension, keeps)
    rank, world = rank_and_world()

    def add(ids: Sequence[int]) -> None:
        for taken, found in _shown(stream, ids, list(made), device):
            for network, features in found.items():
                made[network].add(taken, features)

    if store is None:
        together(lambda: add(range(rank, count, world)))
    else:
        stores = together(lambda: {network: store(network) for network in made})
        lacking = _lacking(count, list(stores.values()))[rank::world]
        together(lambda: [_write(ids, list(_shown(stream, ids, list(made), device)), stores) for ids in lacking])
        for network, there in stores.items():
            _read(made[network], there, range(count), rank, world)
    for part in made.values():
        part.join()
    return {metric: made[network] for metric, network in told.items()}


def _shown(
    stream: Stream, ids: Sequence[int], told: Sequence[Network], device: torch.device
) -> Iterator[tuple[list[int], dict[Network, Features]]]:
    for batch in stream(ids):
        prepared = {steps: prepare_mixed(batch.images, steps, device) for steps in {each.steps for each in told}}
        yield batch.ids, {network: network.see(prepared[network.steps], batch.ids) for network in told}


def _lacking(count: int, stores: Sequence[FeatureStore]) -> list[range]:
    """What the stores of one run lack, the same for all processes."""
    missing = together(lambda: [store.missing(range(count)) for store in stores])
    if any(other != missing[0] for other in missing):
        raise UserError("the feature folders of one run hold different samples; delete them and begin again")
    return gathered(missing[0])[0]


def _write(
    ids: range, found: Sequence[tuple[list[int], dict[Network, Features]]], stores: Mapping[Network, FeatureStore]
) -> None:
    """Keep the features of ``ids``, all of one shard."""
    if sum(len(taken) for taken, _ in found) != len(ids):
        raise UserError("a run that keeps its features needs every image; repair the broken ones or leave --features")
    for network, store in stores.items():
        store.write(ids.start, _in_order([(taken, _on_cpu(features[network])) for taken, features in found]))


def _read(part: Collected, store: FeatureStore, ids: range, rank: int, world: int) -> None:
    """Collect from ``store``; processes share its shards."""
    for number, (own, found) in enumerate(store.shards()):
        if number % world == rank and own.start < ids.stop:
            inside = slice(0, ids.stop - own.start)
            logits = None if found.logits is None else found.logits[inside].float()
            part.add(range(own.start, min(own.stop, ids.stop)), Features(found.features[inside].float(), logits))


@dataclass(frozen=True, eq=False)
class References:
    """What each metric compares with; made once for any number of measurements."""

    moments: Mapping[str, Reference]
    features: Mapping[str, Tensor]


def references(found: Mapping[str, Collected | Statistics]) -> References:
    """What every metric takes of images or their statistics.

    Raises:
        UserError: too few images, or statistics without what a metric needs.
    """
    return References(
        {
            metric: Reference((each.sums if isinstance(each, Collected) else each).moments())
            for metric, each in found.items()
            if metric in FRECHET
        },
        {metric: _features(each, metric) for metric, each in found.items() if metric not in FRECHET},
    )


def values(
    protocol: Protocol,
    metrics: Sequence[str],
    generated: Mapping[str, Collected],
    reference: References,
    *,
    prompts: Sequence[str] = (),
) -> dict[str, Value]:
    """Every metric by name; precision, recall, density and coverage are four.

    Raises:
        UserError: too few images for a metric.
    """
    found: dict[str, Value] = {}
    for metric in metrics:
        if metric == "clip":
            scores = generated[metric].features().features[:, 0].double()
            found[metric] = Value(scores.mean().item(), scores.std().item() / len(scores) ** 0.5, len(scores))
        elif metric in FRECHET:
            distance = frechet_distance(generated[metric].sums, reference.moments[metric], ddof=protocol.ddof)
            found[metric] = Value(distance.value, distance.se, distance.n, distance.debiased)
        elif metric in SINGLE:
            found[metric] = _single(metric, generated[metric], protocol, prompts)
        else:
            found |= _compared(metric, generated[metric].features().features, reference.features[metric], protocol)
    return found


def _features(found: Collected | Statistics, metric: str) -> Tensor:
    if not isinstance(found, Statistics):
        return found.features().features
    if found.features is None:
        raise UserError(f"{metric} compares single images, and these statistics hold none; give the reference images")
    return found.features


def _single(metric: str, generated: Collected, protocol: Protocol, prompts: Sequence[str]) -> Value:
    found = generated.features()
    if metric == "vendi":
        return vendi(found.features)
    if metric == "diversity":
        numbers = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        kept = sorted(k for ids, _ in generated.kept for k in ids)  # Broken images are left out.
        return per_prompt_diversity(found.features, torch.tensor([numbers[prompts[k]] for k in kept]))
    assert found.logits is not None
    # Images may come in the order of their classes.
    order = torch.randperm(len(found.logits), generator=torch.Generator().manual_seed(0))
    return inception_score_splits(found.logits[order].tensor_split(protocol.is_splits))


def _compared(metric: str, generated: Tensor, reference: Tensor, protocol: Protocol) -> dict[str, Value]:
    if metric == "prdc":
        four = prdc(generated, reference, k=protocol.neighbours, closed=protocol.neighbours == 3)
        named = {"precision": four.precision, "recall": four.recall}
        return {**named, "density": four.density, "coverage": four.coverage}
    return {metric: (kid if metric == "kid" else cmmd)(generated, reference)}
