"""What is printed of results: as many digits as their errors leave, costs, what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_NOTHING = 1e-9
"""What rounding may leave of a zero."""


def decimals(value: float, se: float | None) -> int:
    """Decimals that show two digits of the error, or four of the value where no error is known."""
    size = abs(value) / 100 if se is None else se
    if not math.isfinite(size) or size < _NOTHING:
        size = abs(value) / 100
    return max(0, 1 - math.floor(math.log10(size))) if math.isfinite(size) and size >= _NOTHING else 4


def shown(value: float, se: float | None, *, sign: str = "+-") -> str:
    """``1.2345 +- 0.0021``."""
    places = decimals(value, se)
    return f"{value:z.{places}f}" + ("" if se is None else f" {sign} {se:.{places}f}")


def table_of(record: dict[str, Any]) -> str:
    """A record for people."""
    fields = record["protocol"]["fields"]
    rows = [("metric", "value +- se", "debiased", "n")]
    for name, found in record["metrics"].items():
        title = "fd-digits-v1" if (name, fields["extractor"]) == ("fid", "digits") else name
        value, se, debiased = found["value"], found["se"], found["debiased"]
        estimate = "n/a" if debiased is None else f"{debiased:z.{decimals(value, se)}f}"
        rows.append((title, shown(value, se), estimate, str(found["n"])))
    lines = _aligned(rows) + skipped(record["skipped"])
    if cost := record.get("cost"):
        lines.append(_cost(cost))
    if left := record.get("not_compared"):
        lines.append(f"{', '.join(left)}: not compared, as no paired error of them is known")
    return "\n".join([*lines, f"protocol {record['protocol']['name']} ({record['protocol']['digest']})"])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers of images to the right."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return [
        "".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + row[-1].rjust(widths[-1] - 2)
        for row in rows
    ]


def skipped(names: Sequence[str]) -> list[str]:
    """A line where images could not be read."""
    return [f"{len(names)} images could not be read, the first {names[0]}"] if names else []


def _cost(cost: dict[str, Any]) -> str:
    parts = [f"{cost['network_calls']:g} network calls an image", f"{cost['latency_seconds']:.3g} s for one alone"]
    if cost["images_per_second"] is not None:
        parts.append(f"{cost['images_per_second']:.1f} images/s")
    peak = cost["generation_peak_bytes"] or cost["peak_bytes"]
    return ", ".join([*parts, f"{peak / 1e9:.2f} GB at most"])
