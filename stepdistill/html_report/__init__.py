"""One HTML page about one or several runs, complete in itself: figures, pictures, curves, settings."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..bundled import bundled
from ..errors import UserError
from .figures import curves, pictures
from .markup import Markup, element
from .run_folder import RunFolder, read_runs
from .tables import environment, measured, method_name, settings, summary

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing from elsewhere, no script."""


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about ``runs``; returns its file, which replaces an older one at once.

    Args:
        runs: folders of runs, finished or not.
        out: file of the page; of one run ``report.html`` in its folder, else in the current one.

    Raises:
        UserError: a folder is no run, has logged nothing yet, is named twice or holds a damaged file; or ``out``
            cannot be written.
    """
    made = report(read_runs(runs))
    out = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_text(made, encoding="utf-8", errors="xmlcharrefreplace")  # of half characters in JSON
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror}; give another file by --out") from None
    return out


def report(runs: Sequence[RunFolder]) -> str:
    """The page about ``runs``."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "Summary": summary(runs),
        "Measured": measured(runs),
        "Pictures": pictures(runs),
        "Curves": curves(runs),
        "Settings": settings(runs),
        "Environment": environment(runs),
    }
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", {}, f"stepdistill: {title}"),
        element("style", {}, Markup((bundled("assets") / "report.css").read_text())),
    )
    links = [element("a", {"href": f"#{name.lower()}"}, name) for name in parts]
    header = element(
        "header",
        {},
        element("h1", {}, title),
        *(element("p", {"class": "lead"}, _sentence(run, named=len(runs) > 1)) for run in runs),
        element("nav", {}, *links),
    )
    sections = [
        element("section", {"id": name.lower()}, element("h2", {}, name), inside) for name, inside in parts.items()
    ]
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = element("footer", {}, f"Written by stepdistill {__version__} report on {today}.")
    body = element("body", {}, header, element("main", {}, *sections), footer)
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def _sentence(run: RunFolder, *, named: bool) -> str:
    images = "" if run.config.get("real_data") else " without images"
    said = (
        f"A student of {run.config['teacher']}, distilled{images} by {', then '.join(map(method_name, run.methods))}."
    )
    return f"{run.name}: {said}" if named else said
