"""The difference of two runs that kept their features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError
from .metrics.base import Value
from .metrics.influence import paired_difference, paired_mean_difference
from .metrics.protocols import Protocol
from .metrics.score import FRECHET
from .metrics.store import FeatureStore, read_manifest
from .scoring import RUN, Options, Run


def compare(a: Path, b: Path, options: Options, *, plot: Path | None = None) -> dict[str, Any]:
    """Difference of two runs that kept their features, on the sample ids that both have.

    ``plot`` is a PNG to draw the samples in on which they agree best and worst.

    Raises:
        UserError: folders without such runs, or runs of different protocols or references.
    """
    one, two = _kept(a), _kept(b)
    for field in ("protocol", "reference"):
        mine, other = (each[field]["digest"] if field == "protocol" else each[field] for each in (one, two))
        if mine != other:
            raise UserError(f"{a} and {b} differ in their {field} ({mine} and {other}); only equal ones compare")
    told = one["protocol"]["fields"]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    run = Run(replace(options, preset=None, metrics=None), one["reference"], {})
    run.protocol = Protocol(**fields)
    found: dict[str, Value] = {}
    metrics = [metric for metric in run.protocol.metrics if metric in FRECHET]
    run.protocol = replace(run.protocol, metrics=tuple(metrics) or run.protocol.metrics)
    against = run.references(run.networks(0)).moments if metrics else {}
    apart = None
    for metric in metrics:
        name, _ = run.protocol.network(metric)
        first, second = _features(a / name), _features(b / name)
        found[metric] = paired_difference(first, second, against[metric])
        apart = (first - second).norm(dim=1) if apart is None else apart
    if (a / "clip-score").is_dir():
        found["clip"] = paired_mean_difference(_features(a / "clip-score")[:, 0], _features(b / "clip-score")[:, 0])
    if plot is not None:
        from .agreement import draw

        if apart is None:
            raise UserError(f"--plot takes the features of a Frechet distance, and {a} has none")
        draw(plot, {str(folder): kept.get("saved") or kept["images"] for folder, kept in ((a, one), (b, two))}, apart)
    return run.record(f"{a} - {b}", found)


def _kept(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no finished run with --features: {error}") from None


def _features(folder: Path) -> Tensor:
    store = FeatureStore(folder, read_manifest(folder))
    return store.read(range(sum(len(ids) for ids, _ in store.shards()))).features
