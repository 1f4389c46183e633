"""Students of plain networks: weights beside a description of process and sampler, for who has the network's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from .backbones.plain import PLAIN
from .conditions import NO_COND, Cond
from .copies import on_cpu
from .denoiser import Denoiser
from .errors import UserError, first_line
from .plain import PROCESSES, PYTHON, plain_of
from .process import NoiseProcess
from .samplers import SampleNoise, StudentSampler
from .sources import DESCRIPTION
from .teacher import Teacher

WEIGHTS = "network.safetensors"


@dataclass(frozen=True)
class PlainStudent:
    """A student that is ready to generate."""

    denoiser: Denoiser
    sampler: StudentSampler
    shape: tuple[int, ...]
    """``(C, H, W)`` of one sample."""
    classes: int | None
    """Number of class labels; ``None`` for a network without."""

    @torch.no_grad()
    def __call__(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Samples ``(B, C, H, W)`` of standard normal ``noise (B, C, H, W)``, both on the network's device."""
        cond = NO_COND if class_labels is None else {"class_labels": class_labels}
        return self.sampler(self.denoiser, noise, cond)


def load_plain(source: str | Path, network: nn.Module) -> PlainStudent:
    """The student that ``distill`` wrote for a plain teacher; nothing in ``source`` is run.

    Args:
        source: folder or hub id of the student.
        network: built as the teacher's was, by your own code; it is given the student's weights.

    Raises:
        UserError: no such student, or one of another network.
    """
    folder = Path(source)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, DESCRIPTION]))
        load_model(network, folder / WEIGHTS)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the student: {first_line(error)}") from None
    told = _description(folder)
    try:
        sampler = StudentSampler(**{**told["sampler"], "times": tuple(told["sampler"]["times"])})
        process, shape, classes = _process(told["process"], told["settings"]), tuple(told["shape"]), told["classes"]
        denoiser = Denoiser(network, process, told["target"], PLAIN.call, sigma_data=told["sigma_data"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}/{DESCRIPTION} is not what an export writes: {error!r}") from None
    network.eval().requires_grad_(False)
    return PlainStudent(denoiser, sampler, shape, classes)


def rebuilt(source: str, *, trust_remote_code: bool) -> tuple[PlainStudent, Callable[[Tensor], Tensor]]:
    """The student in ``source`` and what makes pictures of its samples, by the function that it names.

    Raises:
        UserError: there is no consent to run that.
    """
    name = _description(Path(source)).get("teacher")
    if not isinstance(name, str) or not name.startswith(PYTHON):
        raise UserError(f"{source}/{DESCRIPTION} is not what an export writes: it names no Python function")
    if not trust_remote_code:
        raise UserError(f"{source} needs the network that {name} builds; read that code, then say --trust-remote-code")
    plain = plain_of(name)
    return load_plain(source, plain.network), plain.decode or (lambda samples: samples)


def write_plain(network: nn.Module, sampler: StudentSampler, teacher: Teacher, folder: Path) -> None:
    """Write the student of a plain teacher, whose second time, if any, is folded into ``network``."""
    folder.mkdir(parents=True)
    save_model(network, str(folder / WEIGHTS))
    process = teacher.denoiser.native
    values = {field.name: vars(process)[field.name] for field in fields(process) if field.init}  # type: ignore[arg-type]
    description = {
        "sampler": asdict(replace(sampler, target_time=None)),
        "process": type(process).__name__,
        "settings": {key: value.tolist() if isinstance(value, Tensor) else value for key, value in values.items()},
        "target": teacher.denoiser.target,
        "sigma_data": teacher.denoiser.sigma_data,
        "shape": teacher.sample_shape,
        "classes": teacher.classes,
        "teacher": teacher.source,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


@torch.no_grad()
def plain_error(denoiser: Denoiser, sampler: StudentSampler, teacher: Teacher, folder: Path, cond: Cond) -> float:
    """Largest difference between two samples of the reloaded student and of its sampler, by the largest value."""
    found = load_plain(folder, on_cpu(teacher.network))
    trained = replace(denoiser, network=on_cpu(denoiser.network))
    cond = {key: value.cpu() for key, value in cond.items()}
    made, expected = (
        each(net, noise(), cond, renoise=noise)
        for each, net in ((found.sampler, found.denoiser), (sampler, trained))
        for noise in [SampleNoise(range(2), teacher.sample_shape)]
    )
    return ((made - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


def plain_usage(folder: Path, teacher: Teacher) -> str:
    """The lines of Python that use a student of a plain teacher."""
    place, _, function = teacher.source.removeprefix(PYTHON).rpartition(":")
    module = Path(place).stem if place.endswith(".py") else place
    size = ", ".join(map(str, (4, *teacher.sample_shape)))
    labels = "" if teacher.classes is None else f", torch.randint({teacher.classes}, (4,))"
    return "\n".join(
        [
            "import torch",
            f"from {module} import {function}  # your own, which builds the network",
            "from stepdistill import load_plain",
            "",
            f'student = load_plain("{folder.as_posix()}", {function}().network)',
            f"samples = student(torch.randn({size}){labels})",
        ]
    )


def _description(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / DESCRIPTION).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/{DESCRIPTION} is not what an export writes: {error!r}") from None


def _process(name: str, settings: dict[str, Any]) -> NoiseProcess:
    def value(told: Any) -> Any:  # noqa: ANN401
        return torch.tensor(told, dtype=torch.float64) if isinstance(told, list) else told

    return PROCESSES[name](**{key: value(told) for key, told in settings.items()})
