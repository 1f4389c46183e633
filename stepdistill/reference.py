"""Statistics of reference images, in files that other tools read too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .errors import UserError
from .metrics.collecting import collect
from .metrics.forms import Statistics
from .metrics.protocols import FRECHET, Protocol
from .metrics.ranks import rank_and_world
from .metrics.sources import open_source
from .metrics.statistics import write_statistics
from .scoring import ALONE, Options, Run


def ref(images: str, out: Path, options: Options) -> list[str]:
    """Write what the protocol compares with of ``images`` to ``out``: statistics that other tools read, and features.

    Returns:
        The names of the images that were left out, where broken ones may be.

    Raises:
        UserError: an input that cannot be read, or a file that cannot be written.
    """
    if out.suffix.lower() != ".npz" or not out.parent.is_dir():
        raise UserError(
            f"statistics are written to an .npz in a folder that exists, got {out}; `convert` makes others of it"
        )
    source = open_source(images)
    count = len(source) if options.count is None else min(options.count, len(source))
    run = Run(options, images, {})
    protocol, kinds = run.protocol, _kinds(run.protocol)
    served = [each for each in protocol.metrics if each not in ALONE and protocol.network(each) in kinds.values()]
    run.change({"metrics": tuple(served)})
    networks = run.networks(count)
    collected = collect(run.reading(source), count, networks, device=run.device)
    found: dict[str, Statistics] = {}
    for kind, network in kinds.items():
        metric = next(each for each in served if protocol.network(each) == network)
        moments, by = collected[metric].sums.moments(), networks[metric]
        told = Statistics(moments.mean, moments.covariance, moments.n, 1, by.name)
        found[kind] = replace(told, features=collected[metric].features, weights=by.weights)
    if rank_and_world()[0] == 0:
        (kind, first), *others = found.items()
        write_statistics(out, first, kind=kind, others=dict(others), protocol=run.protocol)
    return run.left_out()


def _kinds(protocol: Protocol) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The network of every kind of statistics: of several metrics of a kind the first; that of fid before all."""
    ordered = sorted((each for each in protocol.metrics if each in FRECHET), key=lambda each: each != "fid")
    if not ordered:
        raise UserError(f"{protocol.name} has no Frechet distance, so there are no statistics to write")
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {}
    for metric in ordered:
        kinds.setdefault(FRECHET[metric], protocol.network(metric))
    return kinds
