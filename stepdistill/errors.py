"""What a command says to people: the input is wrong, the training is, or something is worth knowing."""

from __future__ import annotations

import warnings
from pathlib import Path

_PACKAGE, _USUAL = Path(__file__).parent, warnings.formatwarning


class UserError(ValueError):
    """Input that cannot work; the command line prints the message and exits with code 2."""


class Diverged(RuntimeError):
    """A loss or a weight stopped being finite; the command line prints the message and exits with code 1."""


class NotExported(RuntimeError):
    """A written student is not its sampler; the command line prints the message and exits with code 1."""


def first_line(error: Exception) -> str:
    """What an error of another library says first, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def plain_warnings() -> None:
    """Show this package's own warnings as one line; those of other libraries keep their place in the code."""
    warnings.formatwarning = _shown


def _shown(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    own = Path(filename).is_relative_to(_PACKAGE)
    return f"warning: {message}\n" if own else _USUAL(message, category, filename, lineno, line)
