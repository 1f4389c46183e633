"""Line charts as inline SVG: no script, a ``<title>`` on every point, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .markup import Markup, element

STYLES = 8
"""Colours that the style sheet has, ``.line0`` and on; more lines take them again with other dashes."""

MOST_POINTS = 120
"""Of one line; more are averaged."""

_WIDTH, _HEIGHT, _TOP, _RIGHT, _BOTTOM = 440.0, 240.0, 10.0, 14.0, 40.0
_LETTER = 6.6
"""Width of a digit of a tick, in the units of the picture."""
_DASHES = ("none", "7 4", "2 3", "9 3 2 3")


class Point(NamedTuple):
    """A point of a line."""

    x: float
    y: float
    told: str
    """What a pointer over it reads."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: in the tooltips.
        style: number of its colour and dashes, from 0.
        points: ``drawable``, from left to right.
    """

    name: str
    style: int
    points: Sequence[Point]


class _Scale(NamedTuple):
    """From values to places: ``first`` and ``last`` are where ``low`` and ``high`` lie."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (value - low) / (high - low) * (self.last - self.first)


def chart(lines: Sequence[Line], *, title: str, across: str) -> Markup:
    """The lines over a common axis ``across``, which starts at 0; the upright axis is logarithmic where that helps.

    Args:
        lines: at least one point in all.
        title: what a screen reader says.
        across: quantity and unit of the horizontal axis.
    """
    lines = [Line(line.name, line.style, thinned(line.points)) for line in lines if line.points]
    values = [point.y for line in lines for point in line.points]
    log = logarithmic(values)
    low, high = _range(values, log=log)
    upright = ticks(low, high, log=log)
    left = max(46, 14 + _LETTER * max(len(short(value)) for value in upright))
    y = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log)
    x = _Scale(0.0, max(point.x for line in lines for point in line.points) or 1.0, left, _WIDTH - _RIGHT, False)
    axes = [_upright(value, y(value), left) for value in upright]
    axes += [_flat(value, x(value)) for value in ticks(x.low, x.high, log=False)]
    middle = (left + _WIDTH - _RIGHT) / 2
    axes.append(element("text", {"x": middle, "y": _HEIGHT - 5, "text-anchor": "middle"}, across))
    said = f"{title}, {'logarithmic' if log else 'linear'} axis, against {across}"
    box = {"viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}", "role": "img", "aria-label": said}
    return element("svg", box, *axes, *(_drawn(line, x, y) for line in lines))


def swatch(style: int) -> Markup:
    """A short piece of a line, for a legend or beside a name."""
    line = element("line", {"x1": 1, "x2": 27, "y1": 6, "y2": 6, "stroke-dasharray": _dashes(style)})
    box = {"class": f"swatch line{style % STYLES}", "viewBox": "0 0 28 12", "aria-hidden": "true"}
    return element("svg", box, line)


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most ``MOST_POINTS`` points, each the mean of as many neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(_mean([p.x for p in part]), y := _mean([p.y for p in part]), f"mean of {len(part)}: {y:.4g}")
        for part in parts
    ]


def drawable(value: float) -> bool:
    """Whether a value is finite and of a size that a chart's arithmetic can bear."""
    return value == 0 or 1e-100 < abs(value) < 1e100


def logarithmic(values: Sequence[float]) -> bool:
    """Whether values are told apart better by their ratio: all positive, over most of a decade."""
    return min(values) > 0 and max(values) / min(values) >= 8


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        apart = max(1, len(decades) // 6)
        factors = (1, 2, 5) if high / low < 300 else (1,)
        found = [factor * 10.0**decade for decade in decades[::apart] for factor in factors]
        return [value for value in found if low <= value <= high]
    most = (high - low) / 3.5
    base = 10.0 ** math.floor(math.log10(most))
    step = max(base * factor for factor in (1, 2, 5) if base * factor <= most * 1.001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def short(value: float) -> str:
    """A tick: 25000 is ``25k``."""
    size, letter = next(((s, letter) for s, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / size:g}{letter}".replace("-", "−")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _upright(value: float, at: float, left: float) -> Markup:
    grid = element("line", {"class": "grid", "x1": left, "x2": _WIDTH - _RIGHT, "y1": at, "y2": at})
    return element("g", {}, grid, element("text", {"x": left - 6, "y": at + 4, "text-anchor": "end"}, short(value)))


def _flat(value: float, at: float) -> Markup:
    foot = _HEIGHT - _BOTTOM
    mark = element("line", {"class": "grid", "x1": at, "x2": at, "y1": foot, "y2": foot + 4})
    return element("g", {}, mark, element("text", {"x": at, "y": foot + 17, "text-anchor": "middle"}, short(value)))


def _drawn(line: Line, x: _Scale, y: _Scale) -> Markup:
    places = [(x(point.x), y(point.y)) for point in line.points]
    path = {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b in places), "stroke-dasharray": _dashes(line.style)}
    seen = "" if len(places) <= 24 else " hidden"
    dots = [
        element(
            "circle",
            {"class": f"dot{seen}", "cx": a, "cy": b, "r": 3.2 if not seen else 5},
            element("title", {}, f"{line.name}: {point.told}"),
        )
        for (a, b), point in zip(places, line.points, strict=True)
    ]
    return element("g", {"class": f"line{line.style % STYLES}"}, element("polyline", path), *dots)


def _dashes(style: int) -> str:
    return _DASHES[(style + style // STYLES) % len(_DASHES)]
