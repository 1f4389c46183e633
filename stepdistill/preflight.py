"""What can be refused before any work starts."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import LoggerType, str_to_bool

from .config import SHARED, Config, Evaluate, Stage, Training
from .data import DataFree, check_conditions, check_guided, check_images
from .denoiser import Denoiser
from .errors import UserError, first_line
from .hosting import Plan, plan
from .learners import check_learners
from .lora import check_lora
from .methods._shared import forward_mode
from .metrics.digits import DigitsExtractor
from .metrics.extractors import Digits
from .samplers import StudentSampler, teacher_grid
from .teacher import Teacher

_SAME_START = 1.1
"""Ratio of ``sigma / alpha`` within which two students begin at one level: grids of a table move it to an entry."""


def checked(config: Config, teacher: Teacher) -> tuple[list[StudentSampler], Plan]:
    """How the student of every stage samples, and how the last one is hosted.

    Raises:
        UserError: the stages, the teacher and the data of ``config`` do not go together.
    """
    guided, stages = teacher.guided(config.data), config.plan
    prompts = check_conditions(teacher, config.data)
    check_stages(stages, guided)
    _check_shared(config)
    for stage in stages:
        _check_roles(stage, teacher, config)
    samplers = [stage.method.sampler(guided.process) for stage in stages]
    hosted = plan(
        teacher.denoiser,
        samplers[-1],
        classes=teacher.classes,
        family=teacher.family,
        own_code=config.export.own_code,
        sana_sprint=config.export.sana_sprint,
        guidance=config.data.scale if teacher.embeds_guidance and not config.data.scales else None,
    )
    check_evaluation(config.evaluate, teacher, prompts)
    check_images(stages, config.real_data, teacher)
    check_guided(config.data, [scale for stage in stages for scale in stage.method.fake_scales(guided)])
    return samplers, hosted


def check_launch() -> None:
    """Refuse ``accelerate launch --cpu --num_processes N``, which starts one process and says nothing.

    Raises:
        UserError: accelerate was asked for several processes (it sets MASTER_PORT) but started no group (no
            WORLD_SIZE, no MPI).
    """
    asked = "MASTER_PORT" in os.environ and str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    started = any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if asked and not started:
        raise UserError(
            "accelerate launch starts a single process on the CPU whatever --num_processes says; use\n"
            "  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m stepdistill distill --config ..."
        )


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, and a resumed run without one.

    Raises:
        UserError: as said.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not resume:
        raise UserError(f"output_dir {folder} holds another run; choose another, or continue it with resume=true")
    if resume and not occupied:
        raise UserError(f"nothing to resume: output_dir {folder} is empty or does not exist")


def check_teacher_device(name: str | None, processes: int) -> None:
    """Refuse a device that this machine lacks, and one teacher's device for several processes.

    Raises:
        UserError: as said.
    """
    if name is None:
        return
    if processes > 1:
        raise UserError(
            "training.teacher_device is for a run of one process; remove it, as every process has a teacher"
        )
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"training.teacher_device={name}: {first_line(error)}") from None


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that accelerate does not know or that are not installed.

    Raises:
        UserError: naming the tracker and what to do.
    """
    known = [kind.value for kind in LoggerType if kind.value != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"training.trackers: {name!r} is not one of {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name} is not installed; pip install {name}")


def check_evaluation(evaluate: Evaluate | None, teacher: Teacher, prompts: Sequence[str] | None = None) -> None:
    """Refuse an evaluation that the metrics or the teacher cannot do.

    Raises:
        UserError: images or prompts that a metric does not compare, or more steps than the teacher has levels.
    """
    if evaluate is None:
        return
    channels, height, width = _picture_shape(teacher)
    if evaluate.protocol.extractor == Digits.name and not DigitsExtractor.compares((channels, height, width)):
        raise UserError(
            f"evaluate: {DigitsExtractor.name} compares 8x8 digits, or square multiples of that with 1 or 3 channels; "
            f"the teacher makes {width}x{height} images with {channels}; set evaluate=null, or another evaluate.preset"
        )
    if channels not in (1, 3):
        raise UserError(f"evaluate: metrics see grey or RGB images, the teacher makes {channels} channels; set it null")
    _check_prompts(evaluate, prompts)
    try:
        for steps in evaluate.teacher_steps:
            teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"evaluate.teacher_steps: {error}") from None


def _check_prompts(evaluate: Evaluate, prompts: Sequence[str] | None) -> None:
    asking = [metric for metric in evaluate.metrics if metric in ("clip", "diversity")]
    if asking and prompts is None:
        raise UserError(f"evaluate.metrics: {asking[0]} is of prompts, which this teacher does not read; remove it")
    if "clip" in asking and not all(prompt.strip() for prompt in prompts or ()):
        raise UserError("evaluate.metrics: clip compares with prompts, and one of data.prompts is empty; remove either")
    fewest = min(evaluate.samples, evaluate.curve_samples if evaluate.every_images else evaluate.samples)
    if "diversity" in asking and fewest < 2 * len(prompts or ()):
        raise UserError(
            f"evaluate.metrics: diversity takes 2 images or more of each of {len(prompts or ())} prompts, and {fewest} "
            "are measured; raise evaluate.samples and curve_samples, or remove it"
        )


def _picture_shape(teacher: Teacher) -> tuple[int, int, int]:
    """``(C, H, W)`` of a picture: a sample, or what the VAE makes of it."""
    channels, height, width = teacher.sample_shape
    return 3 if teacher.makes_latents else channels, height * teacher.scale, width * teacher.scale


def check_stages(stages: tuple[Stage, ...], teacher: Denoiser) -> None:
    """Refuse methods that cannot learn from the teacher, and stages whose students are not one network's work.

    A hand-over after which the student is another function is only a warm start, which is warned of.

    Raises:
        UserError: naming the stage and what to set.
    """
    samplers = []
    for number, stage in enumerate(stages, 1):
        try:
            stage.method.check(teacher)
            samplers.append(stage.method.sampler(teacher.process))
        except ValueError as error:
            raise UserError(f"stage {number}: {error}" if len(stages) > 1 else str(error)) from None
        if stage.steps < stage.method.least_steps:
            raise UserError(
                f"{stage.method.name} needs at least {stage.method.least_steps} steps for all its phases, got "
                f"steps={stage.steps}; train longer, or shorten the phases in method"
            )
    for number, (before, after) in enumerate(pairwise(samplers), 1):
        fed = [f"at t = {each.times[0]:.4g}, {each.input}" for each in (before, after)]
        ratio = _ratio(teacher, after) / _ratio(teacher, before)
        if before.input != after.input or not 1 / _SAME_START < ratio < _SAME_START:
            raise UserError(
                f"stages {number} and {number + 1} do not fit: noise enters the student of "
                f"{stages[number - 1].method.name} {fed[0]}, that of {stages[number].method.name} {fed[1]}; "
                "give both methods the same level (init_ratio or t_max) and input"
            )
        if lost := _lost(stages[number - 1], before, stages[number], after):
            warnings.warn(f"stage {number} is only a warm start for stage {number + 1}: {lost}", stacklevel=1)


def _ratio(teacher: Denoiser, sampler: StudentSampler) -> float:
    """``sigma / alpha`` where noise enters."""
    first = torch.tensor(sampler.times[:1], dtype=torch.float64)
    return (teacher.process.sigma(first) / teacher.process.alpha(first)).item()


def _lost(first: Stage, before: StudentSampler, second: Stage, after: StudentSampler) -> str | None:
    """Why the second stage's student does not begin as the function that the first one's was."""
    names = first.method.name, second.method.name
    if len(before.times) > 1 and before.times != after.times and before.renoising == "ddim":
        return f"a call of {names[0]} leads to its own next level, not to a sample as in {names[1]}"
    if not first.method.every_level and (second.method.every_level or set(after.times) - set(before.times)):
        return f"{names[0]} has not trained the student at all levels where {names[1]} asks it"
    if len(after.times) > 1 and before.renoising != after.renoising:
        return f"{names[0]} is fed {before.renoising} noise by method.renoising, {names[1]} {after.renoising}"
    if before.clip_sample and not after.clip_sample:
        return f"{names[0]} clips its pictures by method.clip_sample, {names[1]} sees what lies beyond"
    return None


@torch.no_grad()
def check_derivatives(stages: Sequence[Stage], student: Denoiser, sampler: StudentSampler, data: DataFree) -> None:
    """Refuse methods that need a forward-mode derivative of a network without: one sample is tried.

    Raises:
        UserError: naming the setting that needs none.
    """
    settings = [setting for stage in stages if (setting := stage.method.avoids_forward_mode)]
    if not settings:
        return
    x, t = torch.ones(1, *data.shape, device=data.device), torch.full((1,), 0.5, device=data.device).double()
    cond = sampler.cond(student.process, data.cond(range(1)), x)
    try:
        forward_mode(lambda x, t: student(x, t, cond).x0, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    except RuntimeError as error:
        raise UserError(
            f"{type(student.network).__name__} as it is set up has no forward-mode derivative ({first_line(error)}); "
            f"set {settings[0]}, or remove training.attention"
        ) from None


def _check_shared(config: Config) -> None:
    """Refuse a stage's ``training`` that says otherwise than the run's what a run has one of.

    Raises:
        UserError: naming stage and key.
    """
    run = config.training.model_dump(include={*SHARED})
    for number, stage in enumerate(config.plan, 1):
        told = cast(Training, stage.training).model_dump(include={*SHARED})
        if apart := [key for key in SHARED if told[key] != run[key]]:
            key = apart[0]
            raise UserError(
                f"stage {number}: training.{key} is {told[key]!r}, that of the run {run[key]!r}; all stages share it: "
                f"remove it there, or set training.{key} of the run"
            )


def _check_roles(stage: Stage, teacher: Teacher, config: Config) -> None:
    training, method = cast(Training, stage.training), stage.method
    if training.batch_size < method.least_batch:
        raise UserError(
            f"{method.name} splits every batch, got {training.batch_size} sample; "
            f"set training.batch_size={method.least_batch} or more"
        )
    ranged = config.data.scales is not None and not teacher.embeds_guidance
    told = ranged and not {"student", *method.roles} <= set(training.lora)
    check_learners(teacher.network, training, conditioned=method.two_times or told)
    if ranged and (method.frozen_roles or set(method.roles) & set(training.lora)):
        raise UserError(
            f"data.guidance_scale: the other network of {method.name} must be told the scale that a sample drew, which "
            "adapters and networks that a method goes back to cannot be; give one scale"
        )
    if training.quantize_teacher and method.frozen_roles:
        raise UserError(f"training.quantize_teacher: {method.name} goes back to whole networks; remove it")
    roles = {"student", *method.roles}
    by_role = training.compile if isinstance(training.compile, dict) else {}
    for section, named, known in (
        ("role_optimizers", training.role_optimizers, roles),
        ("lora", training.lora, roles),
        ("compile", by_role, {"teacher", *roles, *method.frozen_roles}),
    ):
        if unknown := set(named) - known:
            raise UserError(f"training.{section} names {sorted(unknown)}; the roles are {sorted(known)}")
    if teacher.makes_latents and method.sampler(teacher.denoiser.process).clip_sample:
        raise UserError(f"{teacher.source} makes latents, which have no range to clip to; set method.clip_sample=false")
    for role, lora in training.lora.items():
        check_lora(teacher.network, lora, role)
    if method.two_times and "student" in training.lora:
        raise UserError(
            f"training.lora.student: the student of {method.name} learns a second time embedding; remove it"
        )
