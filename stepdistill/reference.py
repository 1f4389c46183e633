"""Statistics of reference images, in files that other tools read too."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError
from .metrics.collecting import collect
from .metrics.forms import Statistics
from .metrics.protocols import FRECHET
from .metrics.ranks import rank_and_world
from .metrics.sources import open_source
from .metrics.statistics import write_statistics
from .scoring import Options, Run


def ref(images: str, out: Path, options: Options) -> list[str]:
    """Write the statistics of ``images``, for the protocol's Frechet distance, to ``out``, which other tools read.

    Returns:
        The names of the images that were left out, where broken ones may be.

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
    run.change({"metrics": (metric,)})
    network = run.networks(count)[metric]
    moments = collect(run.reading(source), count, {metric: network}, device=run.device)[metric].sums.moments()
    if rank_and_world()[0] == 0:
        found = Statistics(moments.mean, moments.covariance, moments.n, 1, network.name)
        write_statistics(out, found, kind=FRECHET[metric], protocol=run.protocol, weights=network.weights)
    return run.left_out()
