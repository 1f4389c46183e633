"""The difference of two runs that kept their features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError, first_line
from .identity import of_reference
from .metrics.base import Value
from .metrics.influence import paired_difference, paired_mean_difference
from .metrics.protocols import FRECHET, Protocol
from .metrics.store import FeatureStore, read_manifest
from .scoring import RUN, Options, Run

PAIRED = (*FRECHET, "clip")
"""Metrics with an error of the difference of two runs."""


def compare(a: Path, b: Path, options: Options, *, plot: Path | None = None) -> dict[str, Any]:
    """Difference of two runs that kept their features, on the sample ids that both have.

    ``plot`` is a PNG to draw the samples in on which they agree best and worst.

    Raises:
        UserError: folders without such runs, or runs of different protocols or references.
    """
    one, two = _kept(a), _kept(b)
    for field, mine, other in (
        ("protocol", one["protocol"]["digest"], two["protocol"]["digest"]),
        ("reference", one["reference_digest"], two["reference_digest"]),
    ):
        if mine != other:
            raise UserError(f"{a} and {b} differ in their {field} ({mine} and {other}); only equal ones compare")
    for told in one["inputs"].keys() & two["inputs"].keys():
        if one["inputs"][told] != two["inputs"][told]:
            raise UserError(f"{a} and {b} are images of different {told}; only those of the same compare")
    protocol = _protocol(a, one["protocol"]["fields"])
    metrics = _compared(a, protocol.metrics, options.metrics)
    run = _run(one, protocol, tuple(metric for metric in metrics if metric in FRECHET), options)
    against = {} if run.protocol.metrics == ("clip",) else run.references(run.networks(0)).moments
    found: dict[str, Value] = {}
    apart = None
    for metric in metrics:
        first, second = (_features(folder / _folder(protocol, metric)) for folder in (a, b))
        if metric == "clip":
            found[metric] = paired_mean_difference(first[:, 0], second[:, 0])
        else:
            found[metric] = paired_difference(first, second, against[metric], ddof=protocol.ddof)
            apart = (first - second).norm(dim=1) if apart is None else apart
    if plot is not None:
        from .agreement import draw

        if apart is None:
            raise UserError(f"--plot takes the features of a Frechet distance, and {a} has none")
        draw(plot, {str(folder): kept.get("saved") or kept["images"] for folder, kept in ((a, one), (b, two))}, apart)
    run.protocol, run.inputs = protocol, {**one["inputs"], **two["inputs"]}
    left = [metric for metric in protocol.metrics if metric not in metrics] if options.metrics is None else []
    return run.record(f"{a} - {b}", found, not_compared=left)


def _compared(folder: Path, metrics: tuple[str, ...], asked: tuple[str, ...] | None) -> list[str]:
    """Those of ``metrics`` that are compared, or those that were asked for."""
    able = [metric for metric in metrics if metric in PAIRED]
    if wrong := [metric for metric in asked or () if metric not in able]:
        raise UserError(f"{', '.join(wrong)}: {folder} has {', '.join(able) or 'nothing'} to compare")
    if not able:
        raise UserError(f"{folder} holds {', '.join(metrics)}, and compare knows paired errors of {', '.join(PAIRED)}")
    return [metric for metric in able if asked is None or metric in asked]


def _run(kept: dict[str, Any], protocol: Protocol, metrics: tuple[str, ...], options: Options) -> Run:
    """What reads the reference of ``metrics``, which are Frechet distances."""
    base = replace(options, preset=protocol.name.partition(",")[0], metrics=metrics or ("clip",), features=None)
    run = Run(base, kept["reference"], {})
    run.protocol = replace(protocol, metrics=metrics or ("clip",))
    if metrics and of_reference(kept["reference"]) != kept["reference_digest"]:
        raise UserError(f"{kept['reference']} has changed since it was compared with; repeat both runs")
    return run


def _folder(protocol: Protocol, metric: str) -> str:
    """Where ``scoring.Run.store`` keeps the features of ``metric``."""
    return "clip-score" if metric == "clip" else protocol.network(metric)[0]


def _kept(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no finished run with --features: {error}") from None
    if not isinstance(record, dict):
        raise _of_another_version(folder, f"it holds a {type(record).__name__}")
    lacking = [name for name in ("protocol", "reference", "reference_digest", "inputs", "images") if name not in record]
    if lacking:
        raise _of_another_version(folder, f"it lacks {', '.join(lacking)}")
    try:
        protocol = {"digest": record["protocol"]["digest"], "fields": dict(record["protocol"]["fields"])}
        return {**record, "protocol": protocol, "inputs": dict(record["inputs"])}
    except (KeyError, TypeError, ValueError) as error:
        raise _of_another_version(folder, first_line(error)) from None


def _protocol(folder: Path, told: dict[str, Any]) -> Protocol:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    try:
        return Protocol(**fields)
    except (TypeError, ValueError) as error:
        raise _of_another_version(folder, first_line(error)) from None


def _of_another_version(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder / RUN} was written by another version of stepdistill: {problem}; repeat its command, which makes no "
        "feature again that is kept there"
    )


def _features(folder: Path) -> Tensor:
    store = FeatureStore(folder, read_manifest(folder))
    return store.read(range(sum(len(ids) for ids, _ in store.shards()))).features
