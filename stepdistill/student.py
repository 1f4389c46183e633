"""Exported students, read back from their folders: pipeline, denoiser and sampler; teacher and recipe of their card."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapters import with_adapters
from .backbones import Family
from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .conditions import Cond
from .config import Data
from .denoiser import Denoiser
from .errors import UserError, first_line
from .export import empty_parts
from .linear_map import stock_output
from .plain import PYTHON
from .plain_student import WEIGHTS, load_plain
from .process import NoiseProcess
from .samplers import StudentSampler
from .schedulers import SUPPORTED, read_scheduler
from .sources import DESCRIPTION, locate, read_index, read_json
from .teacher import Teacher, load_teacher, with_weights


class Description(NamedTuple):
    """What an export wrote beside the weights."""

    sampler: StudentSampler
    """In the teacher's times."""
    label: float
    """The teacher's, of the first call."""
    direct: float
    """``A`` of a student of one call, see ``OneStepMap``."""
    told: float
    """What the exported network is told for ``label``."""
    call: dict[str, Any]
    """What a call of a student in its teacher's own pipeline says beside prompt or label, and steps."""
    sole: bool
    """Whether no stock pipeline runs the student."""


def described(source: str) -> Description:
    """What the student in ``source`` says of itself."""
    try:
        written = json.loads((Path(source) / DESCRIPTION).read_text())
        sampler = StudentSampler(**{**written["sampler"], "times": tuple(written["sampler"]["times"])})
        first, told = written["map"], float(written["label"])
        call, sole = written.get("call", {}), written.get("sole", False)
        return Description(sampler, float(first["label"]), float(first["direct"]), told, call, sole)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}/{DESCRIPTION} is not what an export writes: {error!r}") from None


def exported(source: str, device: torch.device, *, trust_remote_code: bool = False) -> tuple[Any, Description]:
    """The pipeline that an export wrote, on ``device``; its own pipeline file is run only with consent."""
    told = described(source)
    try:
        index, _ = read_index(Path(source) / "model_index.json", source, student=True)
        if told.sole and not trust_remote_code:
            raise UserError(f"{source} runs by a pipeline file of its own; read it, then say --trust-remote-code")
        consent = {"trust_remote_code": True} if told.sole else {}
        pipeline: Any = DiffusionPipeline.from_pretrained(source, **empty_parts(index), **consent).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the student: {first_line(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, told


def calls_of(source: str, own: int, steps: int | None, scheduler: Any = None) -> int:  # noqa: ANN401
    """Calls of a sample: ``own`` of the student, or ``steps`` where several are its own and ``scheduler`` takes it.

    Raises:
        UserError: it makes samples in no such number.
    """
    if steps in (None, own):
        return own
    reason = "it has learned no other number"
    if scheduler is not None and own > 1:
        try:
            scheduler.set_timesteps(steps)
            if scheduler.timesteps.isfinite().all():
                return steps
            reason = f"{type(scheduler).__name__} has no such grid"
        except ValueError as error:
            reason = first_line(error)
    raise UserError(f"--steps {steps}: {source} makes a sample in {own} call{'s'[: own - 1]}; {reason}")


def is_adapters(source: str) -> bool:
    """Whether the student in ``source`` is adapters for the teacher's own pipeline."""
    folder = Path(source)
    return not any((folder / name).is_file() for name in (WEIGHTS, "model_index.json")) and (
        (folder / "scheduler").is_dir() and (folder / DESCRIPTION).is_file()
    )


def family_of(source: str, teacher: str | None) -> Family:
    """Of an exported student; a folder that is none is refused later, with the reason."""
    if (Path(source) / WEIGHTS).is_file():
        return PLAIN
    if is_adapters(source):
        name = _teacher_name(source, teacher)
        return read_index(locate(name) / "model_index.json", name)[1]
    index = Path(source) / "model_index.json"
    return read_index(index, source, student=True)[1] if index.is_file() else UNET2D


def learned(source: str, host: Teacher) -> tuple[Denoiser, StudentSampler]:
    """The student in ``source`` as a denoiser without guidance, and its sampler in that one's times.

    A stock student of several calls is read under its own scheduler, so its teacher may have another process.

    Args:
        source: of the student; adapters go on the weights of ``host``, whose memory they share.
        host: the teacher, or the settings of the student's own pipeline.

    Raises:
        UserError: no such student, or one of another teacher.
    """
    if host.family is PLAIN:
        found = load_plain(source, copy.deepcopy(host.network))
        return found.denoiser, found.sampler
    told = described(source)
    if told.sole and told.sampler.any_steps:
        raise UserError(f"{source} is told where to go by its own pipeline file alone; export it without own_code")
    network = _network(source, host)
    name = read_json(Path(source) / "scheduler" / "scheduler_config.json", source).get("_class_name")
    kind: Any = next((kind for kind in SUPPORTED if kind.__name__ == name), None)
    if len(told.sampler.times) > 1 and kind is not None and not told.sole:
        return _few_step(network, kind.from_pretrained(Path(source) / "scheduler"), told.sampler, host.family)
    _check_schedule(source, told, host.denoiser.process)
    if len(told.sampler.times) > 1 or told.sole:  # as it was trained
        return replace(host.denoiser, network=network), replace(told.sampler, target_time=None)
    return _one_step(network, told, host)


def _network(source: str, host: Teacher) -> Any:  # noqa: ANN401
    try:
        if is_adapters(source):
            return with_adapters(host, Path(source))
        network = host.family.network.from_pretrained(Path(source) / host.family.component)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the student: {first_line(error)}") from None
    return network.eval().requires_grad_(False)


def _few_step(
    network: nn.Module,
    scheduler: Any,  # noqa: ANN401
    sampler: StudentSampler,
    family: Family,
) -> tuple[Denoiser, StudentSampler]:
    """A student of several calls under the process of its own stock scheduler, which is the teacher's up there."""
    denoiser = Denoiser(network, **read_scheduler(scheduler), call=family.call)
    scheduler.set_timesteps(len(sampler.times))
    times = denoiser.process.time_of_label(scheduler.timesteps.double()).tolist()
    return denoiser, replace(sampler, times=tuple(times), input="unit", target_time=None)


def _one_step(network: nn.Module, told: Description, teacher: Teacher) -> tuple[Denoiser, StudentSampler]:
    """A student of one call, whose stock scheduler need not be at its true level, at that level of the teacher.

    The export folds the input scale into the network, which takes the noise itself.
    """
    process, output = teacher.denoiser.process, stock_output(told.direct)
    level = process.sigma(torch.tensor(told.sampler.times, dtype=torch.float64)).item()
    scale = level if told.sampler.input == "sigma" else 1.0

    def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        unit = x / scale
        said = teacher.family.call(network, unit, torch.full_like(label, told.told), cond)
        return told.direct * unit + output * said

    return Denoiser(network, process, "x0", call), replace(told.sampler, target_time=None)


def _check_schedule(source: str, told: Description, process: NoiseProcess) -> None:
    wanted = process.label(torch.tensor(told.sampler.times[:1], dtype=torch.float64)).item()
    if not math.isclose(wanted, told.label, rel_tol=1e-5, abs_tol=1e-3):
        raise UserError(
            f"{source} was made from a teacher with another noise schedule: its call is at label {told.label:.6g}, "
            f"which would be {wanted:.6g} of this teacher"
        )


def teacher_of(source: str, given: str | None, resolution: int | None = None) -> tuple[Teacher, Data]:
    """The teacher ``given`` or named by the student's card, and what the recipe there asks of it, one scale.

    Raises:
        UserError: there is none, or, before its weights are read, it makes other samples than the student.
    """
    name = _teacher_name(source, given)
    try:
        teacher = load_teacher(name, resolution=resolution, weights=False)
        if teacher.family is not family_of(source, given):
            raise UserError(f"{name} and {source} are not of one family of pipelines; give its own --teacher")
        _check_shapes(teacher, source)
        teacher = with_weights(teacher)
    except UserError as error:
        raise error if given else UserError(f"{error}; {source}/README.md names it, --teacher gives another") from None
    try:
        data = Data(**recipe(Path(source) / "README.md").get("data", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"the recipe in {source}/README.md: {first_line(error)}") from None
    return teacher, data.model_copy(update={"guidance_scale": data.scale})


def _teacher_name(source: str, given: str | None) -> str:
    name = given or recipe(Path(source) / "README.md").get("teacher")
    if not isinstance(name, str):
        raise UserError(f"the model card of {source} names no teacher; give it with --teacher")
    if name.startswith(PYTHON) and not given:
        raise UserError(f"{source}/README.md names code as its teacher, which is not run; say --teacher {name}")
    return name


def _check_shapes(teacher: Teacher, source: str) -> None:
    """Refuse a teacher whose samples, text or classes are not those of the student in ``source``."""
    family, file = teacher.family, Path(source) / teacher.family.component / "config.json"
    if family is PLAIN or not file.is_file():  # adapters have no shapes of their own
        return
    theirs, ours = (
        (family.shape(config), family.classes(config), family.told(config))
        for config in (teacher.network.config, read_json(file, source))
    )
    if theirs != ours:
        got, wanted = (
            f"{'x'.join(map(str, shape))} of {classes or 'no'} classes" for shape, classes, _ in (theirs, ours)
        )
        text = "" if theirs[2] == ours[2] else ", told another text"
        raise UserError(
            f"{teacher.source} makes samples of {got}, {source} of {wanted}{text}; take the one it was made from"
        )


def recipe(card: Path) -> dict[str, Any]:
    """The recipe that ``distill`` wrote into a model card; empty where there is none."""
    text = card.read_text() if card.is_file() else ""
    found = re.search(r"^## Recipe$.*?^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    try:
        recipe = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        recipe = None
    return recipe if isinstance(recipe, dict) else {}
