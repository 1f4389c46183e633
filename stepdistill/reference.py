"""Statistics of reference images, in files that other tools read too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UserError
from .metrics.collecting import collect
from .metrics.forms import Statistics
from .metrics.jackknife import MIN_SAMPLES
from .metrics.protocols import FRECHET, Protocol
from .metrics.ranks import rank_and_world
from .metrics.sources import open_source
from .metrics.statistics import write_statistics
from .scoring import ALONE, Options, Run, first


def ref(images: str, out: Path, options: Options) -> dict[str, Any]:
    """Write what the protocol compares with of ``images`` to ``out``: statistics that other tools read, and features.

    Returns:
        What was written, ready for JSON: ``kinds`` of statistics, the ``metrics`` that they serve, those ``left_out``
        as a file has the features of one network, and the images that were ``skipped``, where broken ones may be.

    Raises:
        UserError: an input that cannot be read, or a file that cannot be written.
    """
    if out.suffix.lower() != ".npz" or not out.parent.is_dir():
        raise UserError(
            f"statistics are written to an .npz in a folder that exists, got {out}; `convert` makes others of it"
        )
    source = open_source(images)
    count = first(options, source, images)
    run = Run(options, images, {})
    protocol, kinds = run.protocol, _kinds(run.protocol)
    served = [each for each in protocol.metrics if each not in ALONE and protocol.network(each) in kinds.values()]
    left = [each for each in protocol.metrics if each not in (*ALONE, *served)]
    run.change({"metrics": tuple(served)})
    networks = run.networks(count)
    collected = collect(run.reading(source), count, networks, device=run.device)
    found: dict[str, Statistics] = {}
    for kind, network in kinds.items():
        metric = next(each for each in served if protocol.network(each) == network)
        moments, by = collected[metric].sums.moments(), networks[metric]
        if moments.n is None or moments.n < MIN_SAMPLES:
            raise UserError(f"at least {MIN_SAMPLES} reference images are needed, got {moments.n}")
        told = Statistics(moments.mean, moments.covariance, moments.n, 1, by.name)
        found[kind] = replace(told, features=collected[metric].features, weights=by.weights)
    if rank_and_world()[0] == 0:
        (kind, main), *others = found.items()
        write_statistics(out, main, kind=kind, others=dict(others), protocol=run.protocol)
    kept = {"metrics": served, "left_out": left, "skipped": run.left_out()}
    return {"out": str(out), "kinds": {kind: each.brief() for kind, each in found.items()}, **kept, **run.setting()}


def _kinds(protocol: Protocol) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The network of every kind of statistics: of several metrics of a kind the first; that of fid before all.

    What other metrics compare is kept with the kind ``fid``, whose file has features too.
    """
    compared = [each for each in protocol.metrics if each not in ALONE]
    if not compared:
        raise UserError(f"{', '.join(protocol.metrics)} are of images alone, so there is no reference to write")
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {}
    for metric in sorted(
        compared, key=lambda each: (FRECHET.get(each, "fid") != "fid", each not in FRECHET, each != "fid")
    ):
        kinds.setdefault(FRECHET.get(metric, "fid"), protocol.network(metric))
    return kinds
