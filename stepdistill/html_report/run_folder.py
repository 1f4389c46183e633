"""What the files of a run say, checked as they are read: its recipe, where it is, what was logged and measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError, first_line
from ..identity import of_texts
from ..metrics.presets import PRESETS

T = TypeVar("T")
X = ("step", "images", "seconds")
"""What every row of ``metrics.jsonl`` has."""
_MAYBE = ("diversity", "prompt_accuracy", "latency_seconds", "peak_bytes")
"""What a row of ``evaluation.json`` may have."""


@dataclass(frozen=True)
class Figure:
    """A measured number of ``evaluation.json``: its standard error, its estimate for infinitely many samples."""

    value: float
    se: float | None
    debiased: float | None
    n: int | None


@dataclass(frozen=True)
class Judged:
    """What values were measured by; only those of the same share a column or a curve."""

    preset: str | None
    name: str
    """Of the protocol, or its samples on the way."""
    reference: str
    told: str
    """Checksum of the protocol's fields, the reference and what samples are told."""


@dataclass(frozen=True)
class Generator:
    """What was measured of the teacher in some number of steps, or of the student."""

    label: str
    network_calls: int
    images_per_second: float
    figures: dict[str, Figure]
    class_shares: Sequence[float]
    diversity: float | None
    prompt_accuracy: float | None
    latency_seconds: float | None
    """Of one image alone."""
    peak_bytes: float | None


@dataclass(frozen=True)
class RunFolder:
    """One run, finished or not."""

    path: Path
    name: str
    config: dict[str, Any]
    """``config.yaml`` as it is."""
    stages: tuple[tuple[str, int], ...]
    """Recipe name of each method and its training steps."""
    rows: list[dict[str, float]]
    """``metrics.jsonl``, oldest first; names of what was measured, not trained, have no ``/``."""
    generators: list[Generator]
    """``evaluation.json``, the student last; empty before."""
    environment: dict[str, str]
    """Versions, device and precision that ``evaluation.json`` names."""
    judged: Judged
    """What ``generators`` were measured by."""
    on_the_way: Judged
    """What ``rows`` were."""

    @property
    def steps(self) -> int:
        """Training steps that the recipe asks for."""
        return sum(steps for _, steps in self.stages)

    @property
    def methods(self) -> list[str]:
        """Recipe names of the methods, each once."""
        return list(dict.fromkeys(name for name, _ in self.stages))

    @property
    def step(self) -> int:
        """The last step that a log line or a checkpoint knows of."""
        before, found = 0, [int(self.rows[-1]["step"])]
        for number, (_, steps) in enumerate(self.stages, 1):
            folder = self.path / "checkpoints" / (f"stage_{number}" if len(self.stages) > 1 else "")
            names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
            found += [before + int(name) for name in names if name.isdecimal()]
            before += steps
        return max(found)

    @property
    def status(self) -> str:
        """How far the run has come."""
        if self.step < self.steps:
            at = f"not finished: at step {self.step:,} of {self.steps:,}"
            return f"{at}; the numbers are of an earlier export" if self.generators else at
        # The picture is the last that a run writes of its student.
        return "finished" if (self.path / "student.png").is_file() else "trained, not yet exported and evaluated"

    @property
    def previews(self) -> list[tuple[int, Path]]:
        """Step and file of every preview of the student."""
        found = [(path.stem.removeprefix("step_"), path) for path in sorted(self.path.glob("previews/step_*.png"))]
        return [(int(step), path) for step, path in found if step.isdecimal()]

    @property
    def student(self) -> Generator | None:
        """What was measured of the student."""
        return next((row for row in self.generators if row.label == "student"), None)


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs in ``paths``, each under the shortest end of its path that tells it from the others.

    Raises:
        UserError: a folder is no run, has logged nothing yet, is named twice, or holds a damaged file.
    """
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise UserError(f"the run {path} is named twice; name each once")
    longest = max(len(path.parts) for path in whole)
    depth = next(n for n in range(1, longest + 1) if len({path.parts[-n:] for path in whole}) == len(whole))
    return _titled([_read(path, "/".join(path.parts[-depth:])) for path in whole])


def _read(path: Path, name: str) -> RunFolder:
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run: it has no config.yaml; give the output_dir of `stepdistill distill`")
    config = _parsed(path / "config.yaml", yaml.safe_load)
    rows = _history(path / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path} has no metrics yet: metrics.jsonl must hold a line; wait for training.log_every steps")
    file = path / "evaluation.json"
    measured = _parsed(file, json.loads) if file.is_file() else {"rows": [], "versions": {}}
    generators, environment = _checked(file, _evaluation, measured)
    stages = _checked(path / "config.yaml", _stages, config)
    evaluate = _checked(path / "config.yaml", _evaluate, config)
    final, curve = _checked(file, lambda told: _judged(told, evaluate), measured)
    return RunFolder(path, name, config, stages, rows, generators, environment, final, curve)


def _evaluate(config: dict[str, Any]) -> dict[str, Any]:
    """The section of that name, and its preset, if any, as text."""
    section = dict(config.get("evaluate") or {"preset": None})
    preset = section.get("preset", "digits")
    return section | {"preset": None if preset is None else str(preset)}


def _judged(measured: dict[str, Any], evaluate: dict[str, Any]) -> tuple[Judged, Judged]:
    """By what the end was measured, and by what the way."""
    protocol, reference = measured.get("protocol", {}), str(measured.get("reference") or evaluate.get("reference"))
    preset = evaluate["preset"]
    # Which metrics are beside a value has no say in it; neither has the name, which tells of them.
    fields = {key: value for key, value in protocol.get("fields", {}).items() if key not in ("name", "metrics")}
    against = [measured.get("reference_digest") or reference, measured.get("inputs")]
    curve = evaluate.get("curve_samples")

    def by(samples: object, name: str) -> Judged:
        told = json.dumps([preset, fields | {"samples": samples}, *against], sort_keys=True)
        return Judged(preset, name, reference, of_texts([told]))

    end = by(fields.get("samples", evaluate.get("samples")), protocol.get("name", str(preset)))
    return end, by(curve, f"{curve} samples")


def _titled(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """``runs`` under names of what was measured that tell protocols and references apart."""
    ends = _marks({run.judged for run in runs if run.generators})
    ways = _marks(
        {run.on_the_way for run in runs if any("/" not in name for row in run.rows for name in {*row} - {*X})}
    )
    named = []
    for run in runs:
        end = _title(run.judged.preset, ends.get(run.judged, ""))
        way = _title(run.on_the_way.preset, ways.get(run.on_the_way, ""))
        generators = [replace(each, figures=_renamed(each.figures, end)) for each in run.generators]
        named.append(replace(run, rows=[_renamed(row, way) for row in run.rows], generators=generators))
    return named


def _marks(every: set[Judged]) -> dict[Judged, str]:
    """The shortest that tells each from others of its preset; nothing where there are none."""
    ways: Sequence[Callable[[Judged], str]] = (
        lambda each: "",
        lambda each: each.name,
        lambda each: f"against {each.reference}",
        lambda each: f"{each.name}, against {each.reference}",
        lambda each: f"{each.name}, against {each.reference}, {each.told}",
    )
    marks = {}
    for one in every:
        rivals = {each for each in every if each.preset == one.preset}
        marks[one] = next(way(one) for way in ways if len({way(each) for each in rivals}) == len(rivals))
    return marks


def _renamed(values: dict[str, T], title: Callable[[str], str]) -> dict[str, T]:
    return {title(name): value for name, value in values.items()}


def _title(preset: str | None, mark: str) -> Callable[[str], str]:
    """What to call what was measured by ``preset``."""

    def title(name: str) -> str:
        if "/" in name or name in X or preset is None:
            return name
        known = PRESETS[preset].title(name) if preset in PRESETS else name
        told = [*([preset] if known == name and not mark.startswith(preset) else []), *([mark] if mark else [])]
        return f"{known} ({', '.join(told)})" if told else known

    return title


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:  # noqa: ANN401
    try:
        return parse(file.read_text())
    except (ValueError, yaml.YAMLError) as error:  # broken UTF-8 and JSON are ValueErrors
        raise UserError(f"{file} cannot be read: {first_line(error)}; restore it from a copy") from None


def _checked(file: Path, read: Callable[[Any], Any], value: Any) -> Any:  # noqa: ANN401
    try:
        return read(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        kind = type(error).__name__
        raise UserError(f"{file} is not what `stepdistill distill` writes: {kind} {first_line(error)}") from None


def _history(file: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``; a last line that is only half written is left out, as on resume."""
    lines = _parsed(file, lambda text: text.split("\n")[:-1]) if file.is_file() else []
    return [_checked(file, _row, line) for line in lines]


def _row(line: str) -> dict[str, float]:
    row = {name: _number(value) for name, value in json.loads(line).items()}
    if not all(math.isfinite(row[name]) for name in X):
        raise ValueError(f"expected finite {', '.join(X)}, got {line}")
    return row


def _number(value: Any) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def _stages(config: Any) -> tuple[tuple[str, int], ...]:  # noqa: ANN401
    str(config["teacher"])
    parts = config.get("stages") or [config]
    return tuple((str(part["method"]["name"]), int(part["steps"])) for part in parts)


def _evaluation(measured: Any) -> tuple[list[Generator], dict[str, str]]:  # noqa: ANN401
    """The rows, and the versions and the device that measured them."""
    told = {str(name): str(version) for name, version in measured["versions"].items()}
    told |= {
        name: str(measured[key]) for name, key in (("device", "device"), ("processes", "world_size")) if key in measured
    }
    if features := measured.get("precision", {}).get("features"):
        told["features"] = f"{features['dtype']}, TF32 {'on' if features['tf32'] else 'off'}"
    return [_generator(row) for row in measured["rows"]], told


def _generator(row: dict[str, Any]) -> Generator:
    figures = {key: _figure(value) for key, value in row["metrics"].items()}
    maybe = {key: _number(row[key]) for key in _MAYBE if row.get(key) is not None}
    return Generator(
        str(row["label"]),
        int(_number(row["network_calls"])),
        _number(row["images_per_second"]),
        figures,
        [_number(share) for share in row.get("class_shares") or ()],
        *map(maybe.get, _MAYBE),
    )


def _figure(told: dict[str, Any]) -> Figure:
    known = {key: _number(told[key]) for key in ("se", "debiased", "n") if told.get(key) is not None}
    n = known.get("n")
    return Figure(_number(told["value"]), known.get("se"), known.get("debiased"), None if n is None else int(n))
