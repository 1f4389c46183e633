"""What generates by the samplers of this package: a teacher's ODE, a student's calls, or the two in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import Family
from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .conditions import Cond
from .config import Data
from .data import DataFree, class_labels, data_free, draws
from .decoder import Decoder
from .denoiser import Prediction
from .errors import UserError
from .hybrid import HybridSampler, trace_ode, trace_x0
from .labels import turns
from .plain_student import rebuilt
from .samplers import SampleNoise, teacher_grid
from .sampling import Sampling, Traced, data_of, prompts_of
from .student import calls_of, described, is_adapters, learned, teacher_of
from .teacher import Teacher, load_teacher


def _traced(
    asked: Sampling,
    data: DataFree,
    decode: Callable[[Tensor], Tensor],
    trace: Callable[..., Iterator[Prediction]],
    *networks: nn.Module,
    family: Family = UNET2D,
) -> Traced:
    """What is made by the calls of ``trace(noise, cond, renoise=...)``; of most it is enough to keep the last."""

    def traces(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=data.device)
        said = trace(noise(), data.cond(ids), renoise=lambda: family.later_noise(noise()))
        seen = trace_x0(said if asked.trace else deque(said, maxlen=1))
        return torch.stack([decode(each) for each in seen.unbind(1)], dim=1)

    return Traced(traces, data.told, data.conditions, networks)


def student_alone(asked: Sampling, device: torch.device) -> Traced:
    """A student by its sampler: one whose calls are to be seen, or adapters on the teacher's weights."""
    source, told = asked.source, described(asked.source)
    call, _ = told.call, calls_of(source, len(told.sampler.times), asked.steps)
    if is_adapters(source):
        host, told = teacher_of(source, asked.teacher, call.get("height"))
    else:
        host = load_teacher(source, resolution=call.get("height"), weights=False)
        told = Data(guidance_scale=call.get("guidance_scale", 1.0))
    student, sampler = learned(source, host)
    student.network.to(device)
    data = _conditions(asked, host, told, device)
    return _traced(asked, data, Decoder(host), partial(sampler.trace, student), student.network, family=host.family)


def plain_student(asked: Sampling, device: torch.device) -> Traced:
    """A student of a plain network, by its sampler."""
    student, decode = rebuilt(asked.source, trust_remote_code=asked.trust_remote_code)
    calls_of(asked.source, len(student.sampler.times), asked.steps)
    network = student.denoiser.network.to(device)
    data = class_draws(asked, student.shape, student.classes, device)
    return _traced(asked, data, decode, partial(student.sampler.trace, student.denoiser), network)


def teacher_alone(asked: Sampling, device: torch.device) -> Traced:
    """A teacher's ODE."""
    teacher, steps = load_teacher(asked.source), 50 if asked.steps is None else asked.steps
    labels = "uniform" if teacher.classes is not None and asked.labels is None else asked.labels
    scale = 1.0 if asked.guidance_scale is None else asked.guidance_scale
    told = Data(class_labels=labels, prompts=asked.prompts, guidance_scale=scale)
    data = _by_law(asked, data_free(teacher, told, device))
    try:
        teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    teacher.network.to(device)
    denoiser = teacher.guided(told, data.null)

    def trace(noise: Tensor, cond: Cond, *, renoise: Callable[[], Tensor]) -> Iterator[Prediction]:
        return trace_ode(denoiser, noise, steps, cond, solver=asked.solver)

    return _traced(asked, data, Decoder(teacher), trace, teacher.network)


def teacher_first(asked: Sampling, family: Family, device: torch.device) -> Traced:
    """The teacher's first steps, then the student's calls."""
    source = asked.source
    height = None if family is PLAIN else described(source).call.get("height")
    teacher, told = teacher_of(source, asked.teacher, height)
    student, recorded = learned(source, teacher)
    try:
        sampler = HybridSampler(recorded, asked.teacher_first, asked.steps)
        sampler.check(student.process)
    except ValueError as error:
        raise UserError(f"--teacher-first: {error}") from None
    try:
        sampler.teacher_times(teacher.denoiser.process, student.process)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    if asked.guidance_scale is not None:
        if teacher.embeds_guidance:
            raise UserError(f"{teacher.source} and its student are told one scale; remove --guidance-scale")
        told = told.model_copy(update={"guidance_scale": asked.guidance_scale})
    teacher.network.to(device)
    student.network.to(device)
    data = _conditions(asked, teacher, told, device)
    trace = partial(sampler.trace, teacher.guided(told, data.null), student)
    return _traced(asked, data, Decoder(teacher), trace, teacher.network, student.network, family=family)


def asked_prompts(asked: Sampling) -> Any:  # noqa: ANN401
    """The prompts that were asked for, or those of a student's recipe, as ``read_prompts`` takes them."""
    prompts = prompts_of(asked)
    if prompts is None:
        raise UserError(f"{asked.source} reads prompts, and its card names none; give --prompts")
    return Data(prompts=prompts).prompts


def asked_labels(asked: Sampling, classes: int | None, null_label: int | None = None) -> list[int] | None:
    """The class labels that were asked for or, by their law, those of a student's recipe; without either, all.

    Args:
        asked: of the samples.
        classes: of the network; ``None`` is one without.
        null_label: what means "no class" in its family.
    """
    recorded = data_of(asked)
    labels = asked.labels or recorded.get("class_labels") or (None if classes is None else "uniform")
    told = Data(class_labels=labels, null_label=recorded.get("null_label"))
    return class_labels(asked.source, classes, told, null_label)


def _conditions(asked: Sampling, host: Teacher, told: Data, device: torch.device) -> DataFree:
    """What samples of a student of ``host`` are told."""
    if host.family.encode is None:
        return class_draws(asked, host.sample_shape, host.classes, device, host.null_label)
    return _by_law(asked, data_free(host, told.model_copy(update={"prompts": asked_prompts(asked)}), device))


def class_draws(
    asked: Sampling, shape: tuple[int, ...], classes: int | None, device: torch.device, null_label: int | None = None
) -> DataFree:
    """Noise of ``shape`` and the class labels that samples have."""
    return _by_law(asked, draws(shape, asked_labels(asked, classes, null_label), device))


def _by_law(asked: Sampling, data: DataFree) -> DataFree:
    """``data`` whose samples are told what the law says; prompts are in turn."""
    law = "prompts" if data.told == "prompts" else asked.law
    return replace(data, turns=turns(law, data.shape, asked.period))
