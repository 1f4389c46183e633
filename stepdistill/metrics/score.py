"""Every metric of a protocol, from what its networks said of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from .base import Value
from .cmmd import cmmd
from .collecting import Collected
from .feature_sets import Rows
from .forms import Statistics
from .frechet import Reference, frechet_distance
from .inception_score import inception_score_splits
from .kid import kid, kid_subsets
from .prdc import prdc
from .protocols import FRECHET, SINGLE, Protocol
from .vendi import per_prompt_diversity, vendi

_PAIRS: dict[str, Callable[[Rows, Rows], Value]] = {"kid": kid, "kid-subsets": kid_subsets, "cmmd": cmmd}


@dataclass(frozen=True, eq=False)
class References:
    """What each metric compares with; made once for any number of measurements."""

    moments: Mapping[str, Reference]
    features: Mapping[str, Rows]

    def count(self, metric: str) -> int | None:
        """Images behind what ``metric`` compares with; ``None`` where none are, or their number is not known."""
        if metric in self.moments:
            return self.moments[metric].moments.n
        return len(self.features[metric]) if metric in self.features else None


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
            scores = _features(generated[metric], metric)[:][:, 0].double()
            se = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else None
            found[metric] = Value(scores.mean().item(), se, len(scores))
        elif metric in FRECHET:
            distance = frechet_distance(generated[metric].sums, reference.moments[metric], ddof=protocol.ddof)
            found[metric] = Value(distance.value, distance.se, distance.n, distance.debiased)
        elif metric in SINGLE:
            found[metric] = _single(metric, generated[metric], protocol, prompts)
        else:
            found |= _compared(metric, _features(generated[metric], metric), reference.features[metric], protocol)
    return found


def _features(found: Collected | Statistics, metric: str) -> Rows:
    if found.features is None:
        raise UserError(
            f"{metric} compares single images, and these statistics hold none; give the reference images, or "
            "write the statistics again by `ref` with the same --preset and --metrics"
        )
    return found.features


def _single(metric: str, generated: Collected, protocol: Protocol, prompts: Sequence[str]) -> Value:
    if metric == "vendi":
        return vendi(_features(generated, metric))
    if metric == "diversity":
        assert generated.features is not None
        numbers = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        kept = generated.features.ids  # Broken images are left out.
        return per_prompt_diversity(generated.features, torch.tensor([numbers[prompts[k]] for k in kept]))
    assert generated.logits is not None
    assert generated.marks is not None
    # Images may come in the order of their classes, or in any: their content alone says of which part they are.
    order = generated.marks[:][:, 0].argsort()
    return inception_score_splits(generated.logits[:][order].tensor_split(protocol.is_splits))


def _compared(metric: str, generated: Rows, reference: Rows, protocol: Protocol) -> dict[str, Value]:
    if metric == "prdc":
        four = prdc(generated, reference, k=protocol.neighbours, closed=protocol.neighbours == 3)
        named = {"precision": four.precision, "recall": four.recall}
        return {**named, "density": four.density, "coverage": four.coverage}
    return {metric: _PAIRS[metric](generated, reference)}
