"""One pass over the images: what every network says of them, kept on disk where a run is to be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UserError
from .base import Extractor, Features
from .clip import ClipScorer
from .feature_file import FeatureFile
from .feature_sets import BLOCK
from .frechet import FeatureSums
from .protocols import FRECHET, Protocol
from .ranks import add_up, gathered, rank_and_world, together
from .showing import Network, Stream, shown
from .sources import Batch, Source, batches
from .store import FeatureStore, at_least_float32


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
            marked = "is" in metrics and (name, steps) == protocol.network("is")
            made[key] = (
                _scoring(scorer(), prompts, steps) if metric == "clip" else _extracting(load(name), steps, marked)
            )
        found[metric] = made[key]
    return found


def _extracting(extractor: Extractor, steps: tuple[str, ...], marked: bool) -> Network:
    def see(images: Tensor, ids: Sequence[int]) -> Features:
        return extractor(images)

    return Network(extractor.name, extractor.dimension, steps, see, extractor.weights, extractor.dtype, marked)


def _scoring(scorer: ClipScorer, prompts: Sequence[str], steps: tuple[str, ...]) -> Network:
    def see(images: Tensor, ids: Sequence[int]) -> Features:
        return Features(scorer(images, [prompts[k] for k in ids], rows=ids).scores[:, None])

    return Network("clip score", 1, steps, see, scorer.towers.weights)


@dataclass(eq=False)
class Collected:
    """What one network said of a set of images."""

    sums: FeatureSums
    features: FeatureFile | None = None
    """Those of single images, where a metric compares them."""
    logits: FeatureFile | None = None
    marks: FeatureFile | None = None
    waiting: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    """Ids and features that are to be summed: many at once take a fraction of the time."""

    @classmethod
    def of(cls, network: Network, metrics: Sequence[str]) -> Collected:
        """Nothing yet, for all ``metrics`` of a network."""
        features = FeatureFile() if {*metrics} - {*FRECHET, "is"} else None
        logits, marks = (FeatureFile(), FeatureFile()) if "is" in metrics else (None, None)
        return cls(FeatureSums(network.dimension), features, logits, marks)

    def add(self, ids: Sequence[int], found: Features) -> None:
        """Take the features of the samples ``ids``."""
        self.waiting.append((ids, found.features))
        if sum(len(each) for each, _ in self.waiting) >= BLOCK:
            self._sum()
        marks = None if found.marks is None else found.marks[:, None]
        for file, rows in zip(self._files, (found.features, found.logits, marks), strict=True):
            if file is not None and rows is not None:
                file.write(ids, rows)

    def join(self) -> None:
        """Take what the other processes have collected too."""
        self._sum()
        add_up(self.sums.count, self.sums.sum, self.sums.outer)
        for file in self._files:
            if file is not None:
                file.join()

    def _sum(self) -> None:
        if self.waiting:
            ids = [k for part, _ in self.waiting for k in part]
            self.sums.add(torch.cat([features for _, features in self.waiting]), ids)
            self.waiting.clear()

    @property
    def _files(self) -> tuple[FeatureFile | None, ...]:
        return self.features, self.logits, self.marks


def _on_cpu(found: Features) -> Features:
    others = (None if part is None else part.cpu() for part in found[1:])
    return Features(found.features.cpu(), *others)


def _in_order(parts: Sequence[tuple[Sequence[int], Features]]) -> Features:
    order = torch.tensor([k for ids, _ in parts for k in ids]).argsort()

    def joined(column: Iterable[Tensor | None]) -> Tensor | None:
        present = [part for part in column if part is not None]
        return torch.cat(present)[order] if present else None

    features = torch.cat([found.features for _, found in parts])[order]
    return Features(features, joined(found.logits for _, found in parts), joined(found.marks for _, found in parts))


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
        made[network] = Collected.of(network, [metric for metric, other in told.items() if other is network])
    rank, world = rank_and_world()

    def add(ids: Sequence[int]) -> None:
        for taken, found in shown(stream, ids, list(made), device):
            for network, features in found.items():
                made[network].add(taken, features)

    if store is None:
        together(lambda: add(range(rank, count, world)))
    else:
        stores = together(lambda: {network: store(network) for network in made})
        mine = _share(_lacking(count, list(stores.values())), rank, world)
        together(lambda: _complete(stream, mine, stores, device))
        for network, there in stores.items():
            _read(made[network], there, range(count), rank, world)
    for part in made.values():
        part.join()
    return {metric: made[network] for metric, network in told.items()}


def _lacking(count: int, stores: Sequence[FeatureStore]) -> list[tuple[range, list[int]]]:
    """Samples, all of one shard, and the numbers of the stores that lack them; the same for all processes."""
    missing = together(lambda: [store.missing(range(count)) for store in stores])
    edges = sorted({edge for ranges in missing for ids in ranges for edge in (ids.start, ids.stop)})
    pieces = [
        (range(*ends), [k for k, ranges in enumerate(missing) if any(ends[0] in ids for ids in ranges)])
        for ends in pairwise(edges)
    ]
    return gathered([(ids, lacking) for ids, lacking in pieces if lacking])[0]


def _share(pieces: Sequence[tuple[range, list[int]]], rank: int, world: int) -> list[tuple[range, list[int]]]:
    """Of the samples of ``pieces`` one of ``world`` equal parts."""
    total, before, mine = sum(len(ids) for ids, _ in pieces), 0, []
    first, last = total * rank // world, total * (rank + 1) // world
    for ids, lacking in pieces:
        if part := ids[max(first - before, 0) : max(last - before, 0)]:
            mine.append((part, lacking))
        before += len(ids)
    return mine


def _complete(
    stream: Stream,
    pieces: Sequence[tuple[range, Sequence[int]]],
    stores: Mapping[Network, FeatureStore],
    device: torch.device,
) -> None:
    """Make the samples of ``pieces``, and give every store what it lacks: one may have gone further than another."""
    for ids, lacking in pieces:
        wanted = [list(stores)[k] for k in lacking]
        found = list(shown(stream, ids, wanted, device))
        if sum(len(taken) for taken, _ in found) != len(ids):
            raise UserError(
                "a run that keeps its features needs every image; repair the broken ones or leave --features"
            )
        for network in wanted:
            parts = [(taken, _on_cpu(features[network])) for taken, features in found]
            stores[network].write(ids.start, _in_order(parts))


def _read(part: Collected, store: FeatureStore, ids: range, rank: int, world: int) -> None:
    """Collect from ``store``; processes share its shards."""
    for number, (own, found) in enumerate(store.shards()):
        if number % world == rank and own.start < ids.stop:
            inside = slice(0, ids.stop - own.start)
            logits = None if found.logits is None else at_least_float32(found.logits[inside])
            marks = None if found.marks is None else found.marks[inside]
            features = at_least_float32(found.features[inside])
            part.add(range(own.start, min(own.stop, ids.stop)), Features(features, logits, marks))
