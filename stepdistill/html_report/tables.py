"""The tables of the page: what each run is, what was measured of it, its settings and versions."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any, get_args

import yaml

from .. import __version__
from ..methods import AnyMethod
from ..results import decimals, shown
from .charts import swatch
from .markup import Markup, element, join
from .run_folder import Figure, Generator, RunFolder

_METHODS = {method.name: method for method in get_args(AnyMethod)}
_NONE = "–"
_LONGEST = 300
"""Characters shown of one value of a recipe: a list of prompts may hold thousands."""
_VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def method_name(method: str) -> str:
    """The name that the paper gives the method of a recipe."""
    return _METHODS[method].__name__ if method in _METHODS else method


def _paper(method: str) -> Markup:
    """The method's paper, linked where it has an arXiv number."""
    said = str(_METHODS[method].paper) if method in _METHODS else _NONE
    number = re.search(r"arXiv:(\d{4}\.\d{5})", said)
    if number is None:
        return join(said)
    link = element("a", {"href": f"https://arxiv.org/abs/{number[1]}", "rel": "noreferrer"}, number[0])
    return join(said[: number.start()], link, said[number.end() :])


def table(head: Sequence[str], body: Iterable[Markup], *, kind: str = "") -> Markup:
    """A table that scrolls in itself where the window is narrow."""
    top = element("tr", {}, *(element("th", {"scope": "col"}, name) for name in head))
    inside = element("table", {"class": kind}, element("thead", {}, top), element("tbody", {}, *body))
    return element("div", {"class": "scroll", "tabindex": 0}, inside)


def row(name: str, cells: Iterable[str], *, kind: str = "") -> Markup:
    """A row; cells that are no element yet become one."""
    made = [cell if cell.startswith("<td") and isinstance(cell, Markup) else element("td", {}, cell) for cell in cells]
    return element("tr", {"class": kind}, element("th", {"scope": "row"}, name), *made)


def _heads(runs: Sequence[RunFolder]) -> list[str]:
    return [join(swatch(k), run.name) if len(runs) > 1 else join("") for k, run in enumerate(runs)]


def summary(runs: Sequence[RunFolder]) -> Markup:
    """What each run is, how far it came and what came of it; a column per run."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [row(name, [fact.get(name, _NONE) for fact in facts]) for name in names]
    return table(["", *_heads(runs)], rows, kind="facts")


def _facts(run: RunFolder) -> dict[str, str]:
    """What one looks for first."""
    last, student = run.rows[-1], run.student
    facts: dict[str, str] = {
        "Status": run.status,
        "Method": ", then ".join(f"{method_name(name)} ({steps:,} steps)" for name, steps in run.stages),
        "Paper": join(*(element("div", {}, _paper(name)) for name in run.methods)),
        "Teacher": str(run.config["teacher"]),
        "Training steps": f"{run.step:,} of {run.steps:,}",
        "Images generated": f"{last['images']:,.0f}",
        "Training time": duration(last["seconds"]),
    }
    if student:
        facts |= {f"Student, {key}": _value(figure) for key, figure in student.figures.items()}
        facts["Network calls per image"] = f"{student.network_calls}"
        facts["Images per second"] = rounded(student.images_per_second)
        if student.latency_seconds is not None or student.peak_bytes is not None:
            facts["One image alone, peak memory"] = ", ".join(_alone(student))
        if run.generators[0] is not student:
            facts["Speed-up"] = f"{_speedup(run, student)} against {run.generators[0].label}"
    return facts


def _speedup(run: RunFolder, one: Generator) -> str:
    """Against the first that was measured, where that is a teacher."""
    first = run.generators[0]
    known = first is not run.student and first.images_per_second > 0
    return f"{one.images_per_second / first.images_per_second:.1f}×" if known else _NONE


def measured(runs: Sequence[RunFolder]) -> Markup:
    """Distances, balance and speed of every teacher and student."""
    rows = [one for run in runs for one in run.generators]
    if not rows:
        return element("p", {}, "Nothing has been measured yet.")
    keys = list(dict.fromkeys(key for one in rows for key in one.figures))
    asked = any(one.prompt_accuracy is not None for one in rows)
    head = ["", *(name for key in keys for name in (f"{key} ± se", "debiased", "n"))]
    head += [*(["prompt accuracy"] if asked else []), "diversity", "network calls", "images/s", "speed-up"]
    timed = any(one.latency_seconds is not None or one.peak_bytes is not None for one in rows)
    head += ["one image alone", "peak memory"] if timed else []

    def cells(run: RunFolder, one: Generator) -> list[str]:
        made = [cell for key in keys for cell in _figure(one.figures.get(key))]
        made += [_NONE if one.prompt_accuracy is None else f"{one.prompt_accuracy:.1%}"] if asked else []
        made.append(_NONE if one.diversity is None else rounded(one.diversity))
        made += [f"{one.network_calls}", rounded(one.images_per_second), _speedup(run, one)]
        return [*made, *(_alone(one) if timed else [])]

    note = (
        "± is one standard error; a debiased value estimates what infinitely many samples, in place of n, would give. "
    )
    note += "Of distances (fd, fid, kid, cmmd) lower is better. Speed-up is against the first row."
    main = table(head, _grouped(runs, cells, len(head)), kind="numbers")
    return join(main, element("p", {"class": "note"}, note), _balance(runs))


def _alone(one: Generator) -> list[str]:
    """Latency and memory, where they are known."""
    latency, peak = one.latency_seconds, one.peak_bytes
    return [
        _NONE if latency is None else f"{rounded(1000 * latency)} ms",
        _NONE if peak is None else f"{peak / 1e9:.2f} GB",
    ]


def group(run: RunFolder, style: int, columns: int, told: str = "") -> Markup:
    """The row above those of one run."""
    name = element("th", {"colspan": columns, "scope": "rowgroup"}, swatch(style), run.name, told)
    return element("tr", {"class": "group"}, name)


def _grouped(
    runs: Sequence[RunFolder], cells: Callable[[RunFolder, Generator], list[str]], columns: int
) -> list[Markup]:
    """A row for every generator, under the name of its run where there are several; the student's stands out."""
    made = []
    for style, run in enumerate(runs):
        if len(runs) > 1:
            made.append(group(run, style, columns, "" if run.generators else ": not measured yet"))
        made += [row(g.label, cells(run, g), kind="student" if g is run.student else "") for g in run.generators]
    return made


def _balance(runs: Sequence[RunFolder]) -> Markup:
    """The share of every class, each as a number over a bar."""
    classes = max(len(one.class_shares) for run in runs for one in run.generators)
    if not classes:
        return join()
    most = max(share for run in runs for one in run.generators for share in one.class_shares) or 1.0

    def cells(run: RunFolder, one: Generator) -> list[str]:
        bars: list[str] = [
            element("td", {"style": f"--share:{share / most:.3f}", "class": "bar"}, f"{share:.1%}")
            for share in one.class_shares
        ]
        return [*bars, *[_NONE] * (classes - len(bars)), f"{min(one.class_shares):.1%}" if bars else _NONE]

    note = "Share of the samples that the bundled classifier takes for each digit; the last column is the rarest."
    head = ["", *map(str, range(classes)), "rarest"]
    return join(
        element("h3", {}, "Class balance"),
        table(head, _grouped(runs, cells, len(head)), kind="numbers balance"),
        element("p", {"class": "note"}, note),
    )


def _figure(figure: Figure | None) -> list[str]:
    if figure is None:
        return [_NONE] * 3
    places = decimals(figure.value, figure.se)
    debiased = _NONE if figure.debiased is None else f"{figure.debiased:z.{places}f}"
    return [_value(figure), debiased, _NONE if figure.n is None else f"{figure.n:,}"]


def _value(figure: Figure) -> Markup:
    """To two digits of the error; what the file says in full is a tooltip."""
    full = f"{figure.value!r}" if figure.se is None else f"{figure.value!r} ± {figure.se!r}"
    return element("span", {"title": full}, shown(figure.value, figure.se, sign="±"))


def rounded(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``3 h 02 min``, ``3 min 55 s`` or ``12.3 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{seconds:.1f} s"


def settings(runs: Sequence[RunFolder]) -> Markup:
    """The recipes, a line per key; of several runs first the keys in which they differ."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))

    def line(key: str) -> Markup:
        first, *others = (values.get(key, _NONE) for values in flat)
        return row(key, [first, *(_unlike(other) if other != first else other for other in others)])

    whole = table(["key", *_heads(runs)], map(line, keys), kind="settings")
    if len(runs) == 1:
        return whole
    told = [key for key in keys if key != "output_dir" and len({values.get(key) for values in flat}) > 1]
    first = table(["key", *_heads(runs)], map(line, told), kind="settings") if told else element("p", {}, "None.")
    note = element("p", {"class": "note"}, "Marked is what differs from the first run.")
    every = element("details", {}, element("summary", {}, f"All {len(keys)} keys"), whole)
    return join(element("h3", {}, "Differences"), first, note, every)


def _unlike(said: str) -> Markup:
    return element("td", {"class": "unlike"}, said)


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:  # noqa: ANN401
    """Dotted keys and their values as YAML writes them."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = enumerate(value, 1)
    if inner:
        for name, item in inner:
            yield from _flat(item, f"{key}.{name}" if key else f"{name}")
    else:
        said = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9)
        said = said.removesuffix("\n").removesuffix("\n...")
        yield key, said if len(said) <= _LONGEST else f"{said[:_LONGEST]}… ({len(said):,} characters)"


def environment(runs: Sequence[RunFolder]) -> Markup:
    """The versions and devices that the evaluations name; this installation's versions where none does."""
    told = [run.environment for run in runs]
    if any(told):
        names = list(dict.fromkeys(name for versions in told for name in versions))
        return table(["", *_heads(runs)], [row(name, [v.get(name, _NONE) for v in told]) for name in names])
    here = {"stepdistill": __version__, "python": platform.python_version()} | {p: version(p) for p in _VERSIONS}
    note = "The runs name no versions; these are of the installation that wrote this page."
    return join(
        table(["", ""], [row(name, [said]) for name, said in here.items()]), element("p", {"class": "note"}, note)
    )
