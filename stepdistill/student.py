"""Exported students, read back from their folders: the pipeline, its sampler, the teacher and recipe of its card."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor, nn

from .backbones import unet2d
from .backbones.family import square
from .conditions import Cond
from .config import Data
from .denoiser import Denoiser
from .errors import UserError, first_line
from .export import empty_parts
from .own_code import runs_own_code
from .plain import PYTHON
from .process import NoiseProcess
from .samplers import StudentSampler
from .schedulers import read_scheduler
from .sources import DESCRIPTION, read_index, read_json
from .teacher import Teacher, load_teacher, with_weights


class Exported(NamedTuple):
    """A student's folder, read back."""

    pipeline: Any
    sampler: StudentSampler
    """In the teacher's times."""
    label: float
    """The teacher's, of the first call."""
    call: dict[str, Any]
    """What a call of a student in its teacher's own pipeline says beside prompt or label, and steps."""


def exported(source: str, device: torch.device, *, trust_remote_code: bool = False) -> Exported:
    """Read what an export wrote; its pipeline is on ``device``, its own pipeline file run only with consent."""
    try:
        written = json.loads((Path(source) / DESCRIPTION).read_text())
        recorded = {**written["sampler"], "times": tuple(written["sampler"]["times"])}
        sampler, label = StudentSampler(**recorded), float(written["map"]["label"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}/{DESCRIPTION} is not what an export writes: {error!r}") from None
    try:
        index, _ = read_index(Path(source) / "model_index.json", source, student=True)
        if written.get("sole") and not trust_remote_code:
            raise UserError(f"{source} runs by a pipeline file of its own; read it, then say --trust-remote-code")
        consent = {"trust_remote_code": True} if written.get("sole") else {}
        pipeline: Any = DiffusionPipeline.from_pretrained(source, **empty_parts(index), **consent).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the student: {first_line(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return Exported(pipeline, sampler, label, written.get("call", {}))


def few_step(pipeline: Any, sampler: StudentSampler) -> tuple[Denoiser, StudentSampler]:  # noqa: ANN401
    """A student of several calls under the process of its own stock scheduler, which is the teacher's up there."""
    scheduler = pipeline.scheduler
    if runs_own_code(pipeline):
        raise UserError("--teacher-first and --trace do not know the scheduler in a student's own pipeline file")
    denoiser = Denoiser(pipeline.unet, **read_scheduler(scheduler), call=unet2d.call)
    scheduler.set_timesteps(len(sampler.times))
    times = denoiser.process.time_of_label(scheduler.timesteps.double()).tolist()
    return denoiser, replace(sampler, times=tuple(times), input="unit", target_time=None)


def one_step(
    source: str,
    pipeline: Any,  # noqa: ANN401
    sampler: StudentSampler,
    label: float,
    process: NoiseProcess,
) -> tuple[Denoiser, StudentSampler]:
    """A student of one call, whose stock scheduler need not be at its true level, at that level of ``process``.

    The export folds the input scale into the network, which takes the noise itself.
    """
    time = torch.tensor(sampler.times, dtype=torch.float64)
    wanted, scale = process.label(time).item(), process.sigma(time).item() if sampler.input == "sigma" else 1.0
    if not math.isclose(wanted, label, rel_tol=1e-5, abs_tol=1e-3):
        raise UserError(
            f"{source} was made from a teacher with another noise schedule: its call is at label {label:.6g}, "
            f"which would be {wanted:.6g} of this teacher"
        )
    scheduler = pipeline.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        told, direct, output = scheduler.config["num_train_timesteps"], 1.0, -1.0
    else:
        told, alpha = len(scheduler.alphas_cumprod) - 1, scheduler.alphas_cumprod[-1].double().sqrt().item()
        sigma, is_eps = math.sqrt(1 - alpha**2), scheduler.config["prediction_type"] == "epsilon"
        direct, output = (1 / alpha, -sigma / alpha) if is_eps else (alpha, -sigma)

    def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        unit = x / scale
        return direct * unit + output * unet2d.call(network, unit, torch.full_like(label, told), cond)

    return Denoiser(pipeline.unet, process, "x0", call), replace(sampler, target_time=None)


def teacher_of(source: str, given: str | None, device: torch.device) -> tuple[Teacher, Denoiser]:
    """The teacher ``given`` or named by the student's card, and its denoiser with the guidance of the recipe there.

    Raises:
        UserError: there is none, or, before its weights are read, it makes other samples than the student.
    """
    told = recipe(Path(source) / "README.md")
    name = given or told.get("teacher")
    if not isinstance(name, str):
        raise UserError(f"the model card of {source} names no teacher; give it with --teacher")
    if name.startswith(PYTHON) and not given:
        raise UserError(f"{source}/README.md names code as its teacher, which is not run; say --teacher {name}")
    try:
        teacher = load_teacher(name, weights=False)
        _check_shapes(teacher, source)
        teacher = with_weights(teacher)
    except UserError as error:
        raise error if given else UserError(f"{error}; {source}/README.md names it, --teacher gives another") from None
    teacher.network.to(device)
    try:
        data = Data(**told.get("data", {}))
        return teacher, teacher.guided(data.model_copy(update={"guidance_scale": data.scale}))
    except (TypeError, ValueError) as error:
        raise UserError(f"the recipe in {source}/README.md: {first_line(error)}") from None


def _check_shapes(teacher: Teacher, source: str) -> None:
    """Refuse a teacher whose samples or classes are not those of the student in ``source``."""
    config = read_json(Path(source) / unet2d.UNET2D.component / "config.json", source)
    theirs, ours = (teacher.sample_shape, teacher.classes), (square(config), config.get("num_class_embeds"))
    if theirs != ours:
        got, wanted = (f"{'x'.join(map(str, shape))} of {classes or 'no'} classes" for shape, classes in (theirs, ours))
        raise UserError(f"{teacher.source} makes samples of {got}, {source} of {wanted}; take the one it was made from")


def recipe(card: Path) -> dict[str, Any]:
    """The recipe that ``distill`` wrote into a model card; empty where there is none."""
    text = card.read_text() if card.is_file() else ""
    found = re.search(r"^## Recipe$.*?^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    try:
        recipe = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        recipe = None
    return recipe if isinstance(recipe, dict) else {}
