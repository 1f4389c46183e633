"""Finds the files that ship with the library.

``configs/`` and ``pipelines/`` are top-level folders of a checkout; the wheel carries them as
``stepdistill/_configs`` and ``stepdistill/_pipelines``.  ``assets/`` lies inside the package.
"""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).parent

BUILTIN = "builtin:"


def bundled(kind: Literal["configs", "pipelines", "assets"]) -> Path:
    """The folder that holds the bundled files of one ``kind``."""
    if kind == "assets":
        return _PACKAGE / "assets"
    installed, checkout = _PACKAGE / f"_{kind}", _PACKAGE.parent / kind
    return installed if installed.is_dir() else checkout


def bundled_configs() -> dict[str, Path]:
    """The bundled recipes by name."""
    return {path.stem: path for path in sorted(bundled("configs").glob("*.yaml"))}
