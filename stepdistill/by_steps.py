"""A pipeline scored in several numbers of steps, and the curve of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from .errors import UserError
from .generating import Session
from .metrics.ranks import rank_and_world
from .report import write_figure
from .sampling import Sampling
from .scoring import Options


def by_steps(
    asked: Sampling,
    steps: Sequence[int | None],
    reference: str | None,
    options: Options,
    *,
    repeats: int | None = None,
    save_images: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """``gen`` in each number of ``steps``, against one reference that is read once.

    Args:
        asked: what generates the images, in any number of steps.
        steps: network calls; features and images of each are kept in a folder ``steps_N`` of theirs.
        reference: as ``options`` and what follows, see ``generating.gen``.
        options: see there.
        repeats: see there.
        save_images: see there.
        plot: a PNG with the first metric against the network calls.

    Returns:
        The records of all, ready for JSON: ``{"runs": [...]}``.

    Raises:
        UserError: a number of steps twice, a picture that cannot be written there, or as ``gen``.
    """
    if len({*steps}) < len(steps):
        raise UserError(f"--steps names a number twice: {' '.join(map(str, steps))}")
    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir() or plot.is_dir()):
        raise UserError(f"--plot writes a .png into a folder that exists, got {plot}")
    session, runs = Session(reference, options, repeats), []
    for number in steps:
        features, images = (
            each and (each / f"steps_{number}" if len(steps) > 1 else each) for each in (options.features, save_images)
        )
        runs.append(session.scored(replace(asked, steps=number), features, images))
    if plot is not None and rank_and_world()[0] == 0:
        draw(plot, runs)
    return {"runs": runs}


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of the first metric of ``runs`` with its errors, against their network calls.

    Raises:
        UserError: it cannot be written.
    """
    name = next(iter(runs[0]["metrics"]))
    points = sorted((run["cost"]["network_calls"], run["metrics"][name]) for run in runs)
    calls, values = [each for each, _ in points], [found["value"] for _, found in points]
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.errorbar(calls, values, yerr=[found["se"] or 0.0 for _, found in points], marker="o", capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(calls)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.minorticks_off()
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    axis.set_xlabel("network calls an image")
    axis.set_ylabel(f"{name}, {points[0][1]['n']:,} images")
    axis.set_title(f"{runs[0]['images']}\n{runs[0]['protocol']['name']}", fontsize=8)
    axis.grid(alpha=0.3)
    write_figure(path, figure)
