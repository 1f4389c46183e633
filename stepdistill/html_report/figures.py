"""The figures of the page: previews on the way, teacher beside student, and curves over images and time."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .charts import MOST_POINTS, Line, Point, chart, drawable, logarithmic, swatch
from .markup import Markup, element, join
from .run_folder import RunFolder, X
from .tables import duration, group, row, table

_MOST = 12
"""Previews shown of a run, the first and the last among them."""
_SMALL, _LARGE = 288, 1000
"""Pictures up to ``_SMALL`` pixels wide are shown in whole multiples, those beyond ``_LARGE`` are shrunk to it."""


def pictures(runs: Sequence[RunFolder]) -> Markup:
    """Of every run: the teacher and the student's previews at the same noise, and the picture that ends it."""
    return join(*(_pictures(run, style, named=len(runs) > 1) for style, run in enumerate(runs)))


def _pictures(run: RunFolder, style: int, *, named: bool) -> Markup:
    every = run.previews
    shown = _spread(every)
    images = {int(line["step"]): line["images"] for line in run.rows}
    found = {int(line["step"]): line for line in run.rows if _measured([line])}
    teacher = run.path / "previews" / "teacher.png"
    frames = [_framed(teacher, "teacher", "")] if shown and teacher.is_file() else []
    for step, file in shown:
        said = f"{images[step]:,.0f} images" if step in images else ""
        line = found.get(step, {})
        said += "".join(f", {name} {line[name]:.3g}" for name in _measured([line]))
        frames.append(_framed(file, f"step {step:,}", said))
    parts = [element("h3", {}, swatch(style), run.name)] if named else []
    if frames:
        left = f"{len(shown)} of {len(every)} previews" if len(shown) < len(every) else "Previews"
        note = f"{left} of the student, averaged weights, at one noise throughout; the teacher from the same noise."
        parts += [element("div", {"class": "previews"}, *frames), element("p", {"class": "note"}, note)]
    final = run.path / "student.png"
    if final.is_file():
        parts.append(_framed(final, "teacher and student from the same noise, as the run ended", "", wide=True))
    if not frames and not final.is_file():
        parts.append(element("p", {}, "No pictures yet."))
    return join(*parts)


def _spread(every: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most ``_MOST``, evenly spread from the first to the last."""
    if len(every) <= _MOST:
        return list(every)
    return [every[round(k * (len(every) - 1) / (_MOST - 1))] for k in range(_MOST)]


def _framed(file: Path, title: str, told: str, *, wide: bool = False) -> Markup:
    """A picture as part of the page, above what it is."""
    caption = element("figcaption", {}, element("b", {}, title), element("span", {}, told))
    try:
        kind, content, (width, height) = _picture(file)
    except (OSError, ValueError) as error:
        missing = element("div", {"class": "missing"}, f"{file.name} cannot be read: {error}")
        return element("figure", {}, missing, caption)
    times = max(1, _SMALL // width)
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    size = {"width": times * width, "height": times * height}
    look = {"class": "pixels" if times > 1 else "large" if width > _SMALL else "plain"}
    image = element("img", {"src": data, "alt": f"{title} {told}".strip(), **size, **look})
    return element("figure", {"class": "wide"} if wide else {}, image, caption)


def _picture(file: Path) -> tuple[str, bytes, tuple[int, int]]:
    """Kind, content and size; a large one shrunk."""
    content = file.read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()  # a file that a running job has half written is found out here
        if image.width <= _LARGE:
            return "png", content, image.size
        height = round(image.height * _LARGE / image.width)
        small = image.convert("RGB").resize((_LARGE, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return "jpeg", buffer.getvalue(), small.size


def curves(runs: Sequence[RunFolder]) -> Markup:
    """What was measured against images and time, the losses, and whatever else was logged, against images."""
    measured = _measured([line for run in runs for line in run.rows])
    names = sorted({name for run in runs for line in run.rows for name in line} - {*X, *measured})
    losses = [name for name in names if name.endswith("/loss")]
    others = [name for name in names if name not in losses]
    parts = [_by_calls(runs)] if any(run.generators for run in runs) else []
    parts += [_on_the_way(runs, measured)] if measured else []
    for title, chosen in (("Losses", losses), ("Learning signals", others)):
        if chosen:
            charts = element("div", {"class": "charts"}, *(_signal(runs, name) for name in chosen))
            parts.append(join(element("h3", {}, title), _legend(runs), charts))
    parts.append(element("p", {"class": "note"}, _reading(runs)))
    return join(*parts)


def _reading(runs: Sequence[RunFolder]) -> str:
    said = "Every point reads its numbers when pointed at."
    if any(len(run.rows) > MOST_POINTS for run in runs):
        said += f" Lines of more than {MOST_POINTS} points show means of neighbours."
    lost = sum(not drawable(value) for run in runs for line in run.rows for value in line.values())
    return said + (f" {lost:,} values that are not finite, or beyond 1e±100, are left out." if lost else "")


def _measured(rows: Sequence[dict[str, float]]) -> list[str]:
    """Names of what was measured of students."""
    return [name for name in dict.fromkeys(name for line in rows for name in line) if "/" not in name and name not in X]


def _by_calls(runs: Sequence[RunFolder]) -> Markup:
    """What was measured at the end, of teachers in several numbers of steps and of their students."""
    names = dict.fromkeys(name for run in runs for one in run.generators for name in one.figures)
    charts = [
        _figure(
            f"{name} against network calls",
            [line for style, run in enumerate(runs) for line in _ends(run, style, name)],
            "network calls per image",
        )
        for name in names
    ]
    note = "A line joins the teacher's numbers of steps; the point by itself is the student."
    return join(
        element("h3", {}, "Against network calls"),
        _legend(runs),
        element("div", {"class": "charts"}, *charts),
        element("p", {"class": "note"}, note),
    )


def _ends(run: RunFolder, style: int, name: str) -> list[Line]:
    """The teacher's line and the student's point."""
    found = [one for one in run.generators if name in one.figures and drawable(one.figures[name].value)]
    points = {
        one.label: Point(one.network_calls, one.figures[name].value, f"{one.figures[name].value:.4g}, {one.label}")
        for one in sorted(found, key=lambda one: one.network_calls)
    }
    student = [points.pop("student")] if "student" in points else []
    return [Line(f"teacher of {run.name}", style, list(points.values())), Line(run.name, style, student)]


def _on_the_way(runs: Sequence[RunFolder], names: Sequence[str]) -> Markup:
    unit, size = _unit(max(line["seconds"] for run in runs for line in run.rows))
    charts = []
    for name in names:
        charts.append(_figure(f"{name} against images", _lines(runs, name, "images"), "generated images"))
        charts.append(_figure(f"{name} against time", _lines(runs, name, "seconds", size), f"training time, {unit}"))
    rows = []
    for style, run in enumerate(runs):
        if len(runs) > 1:
            rows.append(group(run, style, 3 + len(names)))
        for line in run.rows:
            if _measured([line]):
                told = [f"{line[name]:.4g}" if name in line else "–" for name in names]
                rows.append(row(f"{line['step']:,.0f}", [f"{line['images']:,.0f}", duration(line["seconds"]), *told]))
    sections = [run.config.get("evaluate") for run in runs]
    counts = {f"{section.get('curve_samples')}": None for section in sections if isinstance(section, dict)}
    values = element(
        "details",
        {},
        element("summary", {}, "The values"),
        table(["step", "images", "time", *names], rows, kind="numbers"),
    )
    on = f" on {' or '.join(counts)} samples" if counts else ""
    note = (
        f"The averaged student, measured{on}; of fewer samples distances read higher, so that the curves compare with "
        "each other and not with the table above."
    )
    return join(
        element("h3", {}, "Measured on the way"),
        _legend(runs),
        element("div", {"class": "charts"}, *charts),
        element("p", {"class": "note"}, note),
        values,
    )


def _signal(runs: Sequence[RunFolder], name: str) -> Markup:
    return _figure(name, _lines(runs, name, "images"), "generated images")


def _figure(title: str, lines: Sequence[Line], across: str) -> Markup:
    values = [point.y for line in lines for point in line.points]
    told = element("span", {}, "logarithmic") if values and logarithmic(values) else ""
    inside = chart(lines, title=title, across=across) if values else element("p", {}, "No values to draw.")
    return element("figure", {}, element("figcaption", {}, element("b", {}, title), told), inside)


def _lines(runs: Sequence[RunFolder], name: str, across: str, size: float = 1.0) -> list[Line]:
    """The values of one name, a line per run, with what a pointer reads."""
    return [
        Line(
            run.name,
            style,
            [
                Point(line[across] / size, line[name], f"{line[name]:.4g} at step {line['step']:,.0f}, {_told(line)}")
                for line in run.rows
                if drawable(line.get(name, math.nan))
            ],
        )
        for style, run in enumerate(runs)
    ]


def _told(line: dict[str, float]) -> str:
    return f"{line['images']:,.0f} images, {duration(line['seconds'])}"


def _unit(seconds: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("h", 3600.0), ("min", 60.0)) if seconds >= 3 * size), ("s", 1.0))


def _legend(runs: Sequence[RunFolder]) -> Markup:
    """Which line is whose, where there are several."""
    items = [element("li", {}, swatch(style), run.name) for style, run in enumerate(runs)]
    return element("ul", {"class": "legend"}, *items) if len(runs) > 1 else join()
