"""``stepdistill sample``: images of a student, a teacher or both in turn, one file per sample id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import Family
from .backbones.family import square
from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .config import Data
from .data import DataFree, class_labels, data_free, draws
from .decoder import Decoder
from .errors import UserError
from .hybrid import HybridSampler, trace_ode, trace_x0
from .images import to_picture, to_uint8
from .labels import turns
from .plain_student import WEIGHTS, rebuilt
from .prompts import read_prompts
from .samplers import SampleNoise, sample_ode, teacher_grid
from .sampling import Sampling, Traced, Traces, data_of, prompts_of
from .sources import DESCRIPTION, read_index
from .student import exported, few_step, one_step, teacher_of
from .teacher import load_teacher


def sample(asked: Sampling, output: Path, *, count: int = 64, first_id: int = 0, batch_size: int = 64) -> Path:
    """Write ``count`` PNG files named by sample id; sample ``k`` does not depend on count or batch size.

    Args:
        asked: what generates them; a trace is one row of pictures per sample, in the folder ``{output}_trace``.
        output: folder to create; must not hold anything.
        count: number of samples.
        first_id: id of the first sample.
        batch_size: samples at a time.

    Raises:
        UserError: no such pipeline, choices that do not go together, or a folder that holds something.
    """
    pictures = output.with_name(f"{output.name}_trace") if asked.trace else None
    _refuse_occupied(output, pictures)
    _write(tracing(asked).traces, range(first_id, first_id + count), batch_size, output, pictures)
    return output


def tracing(asked: Sampling) -> Traced:
    """What generates the images.

    Raises:
        UserError: no such pipeline, or choices that do not go together.
    """
    is_student = (Path(asked.source) / DESCRIPTION).is_file()
    family = _family(asked.source) if is_student else None
    _check(asked, family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.teacher_first:
        return _hybrid(asked, device)
    if family is PLAIN:
        return _plain(asked, device)
    if family and family is not UNET2D:
        return _placed(asked, family, device)
    return _student(asked, device) if family else _teacher(asked, device)


def _family(source: str) -> Family:
    """Of an exported student; a folder that is none is refused later, with the reason."""
    index = Path(source) / "model_index.json"
    if (Path(source) / WEIGHTS).is_file():
        return PLAIN
    return read_index(index, source, student=True)[1] if index.is_file() else UNET2D


def _check(asked: Sampling, family: Family | None) -> None:
    """Refuse choices that do not go together; ``family`` is a student's, ``None`` a teacher."""
    if asked.labels is not None and min(asked.labels) < 0:
        raise UserError(f"--labels must not be negative, got {list(asked.labels)}")
    if family:
        _check_student(asked, family)
    if asked.guidance_scale < 0:
        raise UserError(f"--guidance-scale must not be negative, got {asked.guidance_scale}")
    if asked.teacher_first == 0 and asked.teacher is not None:
        raise UserError("--teacher is for --teacher-first only; give the number of its calls or remove it")
    if asked.teacher_first and family is None:
        raise UserError(f"--teacher-first needs the folder of an exported student; {asked.source} has no {DESCRIPTION}")
    if asked.teacher_first and asked.solver != "euler":
        raise UserError(f"--teacher-first goes in Euler (DDIM) steps; remove --solver {asked.solver}")


def _check_student(asked: Sampling, family: Family) -> None:
    reads = family.encode is not None
    if asked.guidance_scale != 1:
        raise UserError("--guidance-scale is for a teacher; a student has learned its own")
    if asked.prompts is not None and not reads:
        raise UserError(f"{asked.source} reads no prompts; remove --prompt")
    if asked.labels is not None and reads:
        raise UserError(f"{asked.source} reads prompts; remove --labels")
    if (asked.teacher_first and family is not UNET2D) or (asked.trace and family not in (UNET2D, PLAIN)):
        raise UserError("--teacher-first and --trace are not supported yet for pipelines with a VAE or plain networks")


def _refuse_occupied(*folders: Path | None) -> None:
    for folder in filter(None, folders):
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; choose another --out")


@torch.no_grad()
def _write(traces: Traces, ids: range, batch_size: int, output: Path, pictures: Path | None) -> None:
    """Samples to ``output``, and to ``pictures`` all that was predicted on the way, one row per sample."""
    for folder in filter(None, (output, pictures)):
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(ids), desc="sample", mininterval=1) as bar:
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            for index, images in zip(batch, to_uint8(traces(batch)), strict=True):
                to_picture(images[-1]).save(output / f"{index:06d}.png")
                if pictures:
                    to_picture(torch.cat(list(images), dim=-1)).save(pictures / f"{index:06d}.png")
            bar.update(len(batch))


def _student(asked: Sampling, device: torch.device) -> Traced:
    """The student's own pipeline on the samples' generators, or its sampler where several calls are to be seen."""
    pipeline, sampler, *_ = exported(asked.source, device, trust_remote_code=asked.trust_remote_code)
    config, calls = pipeline.unet.config, len(sampler.times)
    data = _draws(asked, square(config), config["num_class_embeds"], device)

    def images(ids: Sequence[int]) -> Tensor:
        generators = SampleNoise(ids, data.shape).generators
        made = pipeline(  # type: ignore[operator]
            batch_size=len(ids), num_inference_steps=calls, generator=generators, output_type="np", **data.cond(ids)
        ).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    if not asked.trace or calls == 1:
        return Traced(images, data.told, (pipeline.unet,))
    denoiser, sampler = few_step(pipeline, sampler)

    def predictions(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        return trace_x0(sampler.trace(denoiser, noise(), data.cond(ids), renoise=noise))

    return Traced(predictions, data.told, (pipeline.unet,))


def _placed(asked: Sampling, family: Family, device: torch.device) -> Traced:
    """A student in its teacher's pipeline, one sample at a time on torch's global generator, which all of them read."""
    student = exported(asked.source, device, trust_remote_code=asked.trust_remote_code)
    network = student.pipeline.components[family.component]
    if family.encode:
        prompts = prompts_of(asked)
        if prompts is None:
            raise UserError(f"{asked.source} reads prompts, and its card names none; give --prompts")
        every: list[Any] = read_prompts(prompts)
    else:
        given = asked.labels or data_of(asked).get("class_labels")
        every = list(given) if isinstance(given, tuple | list) else list(range(1000))
    shape = family.shape(network.config)
    which = turns("prompts" if family.encode else asked.law, shape, asked.period)

    def images(ids: Sequence[int]) -> Tensor:
        made = []
        for k, turn in zip(ids, which(ids, len(every)), strict=True):
            torch.manual_seed(k)
            told = {"prompt": every[turn]} if family.encode else {"class_labels": [every[turn]]}
            told |= {"num_inference_steps": len(student.sampler.times), "output_type": "np", **student.call}
            made.append(torch.from_numpy(student.pipeline(**told).images))
        return torch.cat(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    return Traced(images, "prompts" if family.encode else "classes", (network,))


def _plain(asked: Sampling, device: torch.device) -> Traced:
    """A student of a plain network, by its sampler."""
    student, decode = rebuilt(asked.source, trust_remote_code=asked.trust_remote_code)
    student.denoiser.network.to(device)
    data = _draws(asked, student.shape, student.classes, device)

    def traces(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        seen = trace_x0(student.sampler.trace(student.denoiser, noise(), data.cond(ids), renoise=noise))
        return torch.stack([decode(each) for each in (seen if asked.trace else seen[:, -1:]).unbind(1)], dim=1)

    return Traced(traces, data.told, (student.denoiser.network,))


def _teacher(asked: Sampling, device: torch.device) -> Traced:
    """A teacher's ODE."""
    teacher, steps = load_teacher(asked.source), 50 if asked.steps is None else asked.steps
    labels = "uniform" if teacher.classes is not None and asked.labels is None else asked.labels
    told = Data(class_labels=labels, prompts=asked.prompts, guidance_scale=asked.guidance_scale)
    data, decode = _by_law(asked, data_free(teacher, told, device)), Decoder(teacher)
    try:
        teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    teacher.network.to(device)
    denoiser = teacher.guided(told, data.null)

    def traces(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)()
        if asked.trace:
            seen = trace_x0(trace_ode(denoiser, noise, steps, data.cond(ids), solver=asked.solver))
            return torch.stack([decode(each) for each in seen.unbind(1)], dim=1)
        return decode(sample_ode(denoiser, noise, steps, data.cond(ids), solver=asked.solver))[:, None]

    return Traced(traces, data.told, (teacher.network,))


def _hybrid(asked: Sampling, device: torch.device) -> Traced:
    """The teacher's first steps, then the student's calls."""
    source = asked.source
    teacher, guided = teacher_of(source, asked.teacher, device)
    pipeline, recorded, label, _ = exported(source, device)
    data = _draws(asked, teacher.sample_shape, teacher.classes, device)
    if len(recorded.times) == 1:
        student, recorded = one_step(source, pipeline, recorded, label, teacher.denoiser.process)
    else:
        student, recorded = few_step(pipeline, recorded)
    try:
        sampler = HybridSampler(recorded, asked.teacher_first, asked.steps)
        sampler.check(student.process)
    except ValueError as error:
        raise UserError(f"--teacher-first: {error}") from None
    try:
        sampler.teacher_times(teacher.denoiser.process, student.process)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None

    def traces(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        return trace_x0(sampler.trace(guided, student, noise(), data.cond(ids), renoise=noise))

    return Traced(traces, data.told, (teacher.network, pipeline.unet))


def _draws(asked: Sampling, shape: tuple[int, ...], classes: int | None, device: torch.device) -> DataFree:
    told = Data(class_labels=asked.labels or (None if classes is None else "uniform"))
    return _by_law(asked, draws(shape, class_labels(asked.source, classes, told), device))


def _by_law(asked: Sampling, data: DataFree) -> DataFree:
    """``data`` whose samples are told what the law says; prompts are in turn."""
    law = "prompts" if data.told == "prompts" else asked.law
    return replace(data, turns=turns(law, data.shape, asked.period))
