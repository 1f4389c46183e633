"""``stepdistill sample``: images of a student, a teacher or both in turn, one file per sample id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import Family
from .backbones.family import square
from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .by_sampler import (
    asked_labels,
    asked_prompts,
    class_draws,
    plain_student,
    student_alone,
    teacher_alone,
    teacher_first,
)
from .errors import UserError
from .images import to_picture, to_uint8
from .labels import turns
from .prompts import read_prompts
from .samplers import SampleNoise
from .sampling import Sampling, Traced, Traces
from .sources import DESCRIPTION
from .student import Description, calls_of, described, exported, family_of, is_adapters


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
    family = family_of(asked.source, asked.teacher) if is_student else None
    _check(asked, family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if family is None:
        return teacher_alone(asked, device)
    if asked.teacher_first:
        return teacher_first(asked, family, device)
    if family is PLAIN:
        return plain_student(asked, device)
    if is_adapters(asked.source) or (asked.trace and len(described(asked.source).sampler.times) > 1):
        return student_alone(asked, device)
    return _student(asked, device) if family is UNET2D else _placed(asked, family, device)


def _check(asked: Sampling, family: Family | None) -> None:
    """Refuse choices that do not go together; ``family`` is a student's, ``None`` a teacher."""
    if asked.labels is not None and min(asked.labels) < 0:
        raise UserError(f"--labels must not be negative, got {list(asked.labels)}")
    if family:
        _check_student(asked, family)
    if asked.guidance_scale is not None and not 0 <= asked.guidance_scale < math.inf:
        raise UserError(f"--guidance-scale must not be negative, and finite, got {asked.guidance_scale}")
    if asked.teacher_first == 0 and asked.teacher is not None and not is_adapters(asked.source):
        raise UserError("--teacher is for --teacher-first only; give the number of its calls or remove it")
    if asked.teacher_first and family is None:
        raise UserError(f"--teacher-first needs the folder of an exported student; {asked.source} has no {DESCRIPTION}")
    if asked.teacher_first and asked.solver != "euler":
        raise UserError(f"--teacher-first goes in Euler (DDIM) steps; remove --solver {asked.solver}")


def _check_student(asked: Sampling, family: Family) -> None:
    reads = family.encode is not None
    if asked.guidance_scale not in (None, 1.0) and not asked.teacher_first:
        raise UserError("--guidance-scale is for a teacher; a student has learned its own")
    if asked.prompts is not None and not reads:
        raise UserError(f"{asked.source} reads no prompts; remove --prompt")
    if asked.labels is not None and reads:
        raise UserError(f"{asked.source} reads prompts; remove --labels")


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
    """A student of pixels: its own pipeline on the samples' generators."""
    pipeline, told = exported(asked.source, device, trust_remote_code=asked.trust_remote_code)
    config = pipeline.unet.config
    data = class_draws(asked, square(config), config["num_class_embeds"], device)
    calls = _calls(asked, told, pipeline)

    def images(ids: Sequence[int]) -> Tensor:
        generators = SampleNoise(ids, data.shape).generators
        made = pipeline(
            batch_size=len(ids),
            num_inference_steps=calls,
            generator=generators,
            output_type="np",
            **data.cond(ids),
        ).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    return Traced(images, data.told, data.conditions, (pipeline.unet,))


def _placed(asked: Sampling, family: Family, device: torch.device) -> Traced:
    """A student in its teacher's pipeline, one sample at a time on torch's global generator, which all of them read."""
    pipeline, student = exported(asked.source, device, trust_remote_code=asked.trust_remote_code)
    network, calls = pipeline.components[family.component], _calls(asked, student, pipeline)
    config = network.config
    if family.encode:
        every: Sequence[Any] = read_prompts(asked_prompts(asked))
    else:
        every = asked_labels(asked, family.classes(config), family.null_label(config)) or ()
    shape = family.shape(config)
    which = turns("prompts" if family.encode else asked.law, shape, asked.period)

    def images(ids: Sequence[int]) -> Tensor:
        made = []
        for k, turn in zip(ids, which(ids, len(every)), strict=True):
            torch.manual_seed(k)
            told = {"prompt": every[turn]} if family.encode else {"class_labels": [every[turn]]}
            told |= {"num_inference_steps": calls, "output_type": "np", **student.call}
            made.append(torch.from_numpy(pipeline(**told).images))
        return torch.cat(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    return Traced(images, "prompts" if family.encode else "classes", every, (network,))


def _calls(asked: Sampling, told: Description, pipeline: Any) -> int:  # noqa: ANN401
    """Steps of the pipeline: others than the student's own are for stock schedulers and whole flow maps."""
    if told.sole and told.sampler.any_steps and asked.steps is not None:
        try:
            return len(told.sampler.in_steps(asked.steps).times)
        except ValueError as error:
            raise UserError(f"--steps: {error}") from None
    return calls_of(asked.source, len(told.sampler.times), asked.steps, None if told.sole else pipeline.scheduler)
