"""What a pipeline is asked to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .bundled import BUILTIN
from .identity import of_files, of_texts
from .labels import Told
from .metrics.weights import sha256_of
from .plain import PYTHON
from .prompts import read_prompts
from .samplers import Solver
from .sources import DESCRIPTION, locate
from .student import recipe

_ELSEWHERE = ("source", "prompts", "teacher", "trace", "trust_remote_code", "law", "period")
"""Fields that are said in another form, or by the protocol, or that change no image."""

Traces = Callable[[Sequence[int]], Tensor]
"""What the calls for the given ids predict, ``(B, K, C, H, W)`` in [-1, 1]; the last of the K is the sample."""


class Traced(NamedTuple):
    """A pipeline that is ready to generate."""

    traces: Traces
    told: Told
    conditions: Sequence[str] | Sequence[int]
    """The prompts or class labels that the law of the samples takes from."""
    networks: tuple[nn.Module, ...]
    """What it calls."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What generates images, and what it is asked for."""

    source: str
    """An exported student's folder, or a teacher."""
    steps: int | None = None
    """Network calls of a teacher, 50 by default; with ``teacher_first`` those of the teacher's whole grid, as many as
    the student's by default.  A student alone has its own number; one of several calls, any that its stock scheduler
    takes."""
    labels: tuple[int, ...] | None = None
    """Class labels to cycle through; those of the student's recipe, or all of them, by default."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts to cycle through, or a file of them; those of the student's recipe by default."""
    guidance_scale: float | None = None
    """Of a teacher, 1 by default; with ``teacher_first`` of its calls, the recipe's by default.  A student has learned
    its own."""
    solver: Solver = "euler"
    """ODE solver of a teacher."""
    teacher_first: int = 0
    """Calls of the student that the teacher makes, see ``HybridSampler``."""
    teacher: str | None = None
    """Source of that teacher, or of the one that a student's adapters are for; the one in the student's model card by
    default."""
    trace: bool = False
    """Whether to see what every call predicts, in place of the sample alone."""
    trust_remote_code: bool = False
    """Run the pipeline file that a student comes with, or the function that builds its network."""
    law: str = "balanced"
    """Which label or prompt a sample has, of ``protocols.LABELS``; prompts are always in turn."""
    period: int | None = None
    """Samples after which labels and prompts begin again."""


def data_of(asked: Sampling) -> dict[str, Any]:
    """The section of that name in a student's recipe."""
    return recipe(Path(asked.source) / "README.md").get("data", {})


def prompts_of(asked: Sampling) -> Any:  # noqa: ANN401
    """The prompts that were asked for, or those of a student's recipe; ``None`` without either."""
    return asked.prompts or data_of(asked).get("prompts")


def made_by(asked: Sampling) -> str:
    """What determines the images of ``asked``, beside the protocol: the setting, and checksums of all files."""
    told = {name: value for name, value in asdict(asked).items() if name not in _ELSEWHERE}
    parts = [_pipeline(asked.source), *(f"{name}={value}" for name, value in told.items())]
    if asked.teacher is not None:
        parts.append(f"teacher={_pipeline(asked.teacher)}")
    prompts = prompts_of(asked) if (Path(asked.source) / DESCRIPTION).is_file() else asked.prompts
    if prompts is not None:
        parts.append(f"prompts={of_texts(read_prompts(prompts))}")
    return ", ".join(parts)


def _pipeline(source: str) -> str:
    """``source`` and a checksum of its files; a hub id names the commit."""
    if source.startswith(PYTHON):
        place = Path(source.removeprefix(PYTHON).rpartition(":")[0])
        return f"{source} ({sha256_of(place)[:12]})" if place.is_file() else source
    folder = locate(source)
    if not (source.startswith(BUILTIN) or Path(source).expanduser().is_dir()):
        return f"{source} ({folder.name[:12]})"
    return f"{source} ({of_files(folder)})"
