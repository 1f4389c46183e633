"""Judges generators by a protocol: the metrics of ``stepdistill fid``, speed, and what the digits' classifier sees."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .generating import Generated, latency, peak_bytes
from .metrics.base import Value
from .metrics.collecting import Collected, reader
from .metrics.extractors import Digits
from .metrics.ranks import gathered
from .metrics.sources import Batch, MemorySource
from .scoring import Options, Run

Generate = Callable[[Sequence[int]], Tensor]
"""The samples of the given ids, ``(B, C, H, W)`` in [-1, 1]; sample ``k`` is the same in any batch."""


@dataclass(frozen=True)
class Measurement:
    """What is known of one generator."""

    label: str
    network_calls: int
    metrics: dict[str, Value]
    """By the names of ``Protocol.values``."""
    images_per_second: float
    """Of the median batch on one device, noise to 8-bit images on the CPU, features excluded: a slow first batch has
    no say."""
    class_shares: tuple[float, ...] = ()
    """Share of the samples that the bundled classifier takes for each digit; this and the rest with its features."""
    diversity: float | None = None
    """Root mean square distance between the features of two samples, ``sqrt(2 tr Cov)``."""
    prompt_accuracy: float | None = None
    """Share of the samples that it takes for the digit asked of them, where digits were asked."""
    latency_seconds: float | None = None
    """Of one image alone, where that was timed."""
    peak_bytes: int | None = None
    """Memory of the GPU, or of the process on a CPU, at most."""


class Evaluator:
    """Compares generators with one reference; processes share the samples, and all of them get the same numbers.

    Args:
        reference: images or statistics, as ``stepdistill fid`` takes them.
        preset: name of the protocol.
        metrics: in place of the protocol's.
        samples: of a generator; some measurements may have fewer.
        batch_size: samples at a time.
        prompts: what is asked of each sample, where something is.
        inputs: checksums of what samples are told, see ``labels.inputs``.
        device: where features are computed.

    Raises:
        UserError: weights or a reference that are not there, or do not fit.
    """

    def __init__(
        self,
        reference: str,
        *,
        preset: str = "digits",
        metrics: tuple[str, ...] = ("fid",),
        samples: int = 5000,
        batch_size: int = 250,
        prompts: tuple[str, ...] | None = None,
        inputs: dict[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        options = Options(preset=preset, metrics=metrics, batch_size=batch_size, prompts=prompts)
        changes = {"labels": "prompts" if prompts else "balanced", "samples": samples, "repeats": 1}
        self.run = Run(options, reference, changes, torch.device(device))
        self.protocol, self.run.inputs = self.run.protocol, inputs or {}
        self.run.references(self.run.networks(len(prompts) if prompts else samples))

    def score(self, images: Tensor) -> dict[str, Value]:
        """Every metric of uint8 ``(N, C, H, W)`` images."""
        stream = reader(MemorySource(images), batch_size=1000, workers=0, skip_broken=None)
        return self.run.measured(stream, len(images), "memory")

    def floor(self, images: Tensor, seed: int) -> float:
        """Distance of a random half of the reference's own ``images``: what no generator can be asked to beat."""
        half = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: len(images) // 2]
        return self.score(images[half])["fid"].value

    @torch.no_grad()
    def measure(
        self,
        label: str,
        network_calls: int,
        generate: Generate,
        *,
        samples: int,
        digits: Tensor | None = None,
        alone: bool = False,
    ) -> Measurement:
        """Generate samples ``0 .. samples - 1`` in batches and score them as the protocol's bytes.

        Args:
            label: name of the generator.
            network_calls: what one sample takes.
            generate: the generator.
            samples: how many.
            digits: ``(samples,)`` the digit 0..9 that each sample was asked for.
            alone: whether to time one image alone too.
        """
        made = Generated(lambda ids: generate(ids)[:, None], self.protocol, self.run.options.batch_size)
        seen: dict[int, int] = {}

        def stream(ids: Sequence[int]) -> Iterator[Batch]:
            for batch in made.stream(0)(ids):
                seen.update(self._seen(batch))
                yield batch

        found = self.run.collected(stream, samples, label)
        speeds = [count / seconds for part in gathered(made.batches) for count, seconds in part]
        classes = [digit for _, digit in sorted(pair for part in gathered(seen) for pair in part.items())]
        measured = Measurement(
            label,
            network_calls,
            self.run.values(found),
            statistics.median(speeds),
            latency_seconds=latency(made.traces) if alone else None,
            peak_bytes=peak_bytes(made),
        )
        return self._with_digits(measured, torch.tensor(classes), found, digits) if classes else measured

    def _seen(self, batch: Batch) -> dict[int, int]:
        """The digit seen in each image, where the protocol looks at digits."""
        classifier = self.run.extractors.get(Digits.name)
        if not isinstance(classifier, Digits):
            return {}
        return dict(zip(batch.ids, classifier.classify(torch.stack(batch.images)).tolist(), strict=True))

    def _with_digits(
        self, measured: Measurement, classes: Tensor, found: Mapping[str, Collected], asked: Tensor | None
    ) -> Measurement:
        sums = next(found[metric].sums for metric in found if self.protocol.network(metric)[0] == Digits.name)
        return replace(
            measured,
            class_shares=tuple((torch.bincount(classes, minlength=10) / len(classes)).tolist()),
            diversity=(2 * sums.moments().covariance.trace()).sqrt().item(),
            prompt_accuracy=None if asked is None else (classes == asked).double().mean().item(),
        )
