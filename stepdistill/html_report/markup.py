"""HTML and SVG whose text is escaped by construction: only what ``element`` returns is taken as it is."""

from __future__ import annotations

import html
from collections.abc import Mapping

_VOID = {"img", "meta"}


class Markup(str):
    """HTML that may stand in a page as it is."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, object] | None = None, *inside: str) -> Markup:
    """``<name attributes>inside</name>``; everything that is not ``Markup`` is escaped.

    Args:
        name: of the element.
        attributes: by name; numbers are rounded to what a page can show.
        inside: text and elements, in order.
    """
    told = "".join(f' {key}="{html.escape(_plain(value))}"' for key, value in (attributes or {}).items())
    return Markup(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{join(*inside)}</{name}>")


def join(*parts: str) -> Markup:
    """The parts one after the other, escaped where they are text."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
