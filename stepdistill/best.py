"""The best student so far, kept beside the last."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .config import Evaluate
from .errors import UserError, first_line
from .metrics.base import Value
from .metrics.protocols import DIRECTIONS

FILE = "best.json"


class Best:
    """The student that one measured value likes best.

    What it is worth stands in its folder alone, so that a run that is continued knows it.  A student measured otherwise
    (another value, protocol, reference or number of samples) does not count.

    Args:
        folder: where it is kept.
        evaluate: how students are measured; its ``best`` is set.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path, evaluate: Evaluate) -> None:
        assert evaluate.best is not None
        self.folder, self.metric = folder, evaluate.best
        self.measured = {
            "metric": evaluate.best,
            "preset": evaluate.preset,
            "reference": evaluate.reference,
            "samples": evaluate.curve_samples,
        }
        self._value = self._kept()

    def _kept(self) -> float:
        """Of the student in the folder, or what any value is better than."""
        file, worst = self.folder / FILE, -DIRECTIONS[self.metric] * math.inf
        if not self.folder.is_dir():
            return worst
        try:
            told = json.loads(file.read_text())
            return float(told["value"]) if self.measured.items() <= told.items() else worst
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} cannot be read: {first_line(error)}; move {self.folder} away") from None

    def beaten_by(self, values: dict[str, Value]) -> bool:
        """Whether what was measured of another student is better."""
        return DIRECTIONS[self.metric] * (values[self.metric].value - self._value) > 0

    def keep(self, values: dict[str, Value], when: dict[str, Any], write: Callable[[Path], object]) -> None:
        """Replace the student by the one that ``write`` writes to a folder, which is whole before it gets its name.

        Args:
            values: what was measured of it.
            when: step and images of its training.
            write: makes the folder.

        Raises:
            UserError: it cannot be written.
        """
        fresh, old = (self.folder.with_name(f"{self.folder.name}.{end}") for end in ("new", "old"))
        found = values[self.metric]
        try:
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)
            write(fresh)
            told = {**self.measured, "value": found.value, "se": found.se, **when}
            (fresh / FILE).write_text(json.dumps(told, indent=1) + "\n")
            if self.folder.is_dir():
                self.folder.rename(old)
            fresh.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write {self.folder}: {first_line(error)}; make room, then continue with resume=true"
            ) from None
        self._value = found.value
