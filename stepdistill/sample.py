"""``stepdistill sample``: images of a student or a teacher, one file per sample id."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import unet2d
from .config import Data
from .data import class_labels, data_free, draws
from .errors import UserError
from .evaluation import Generate
from .export import DESCRIPTION
from .images import to_picture, to_uint8
from .samplers import SampleNoise, Solver, sample_ode, teacher_grid
from .teacher import load_teacher


def sample(
    source: str,
    output: Path,
    *,
    count: int = 64,
    steps: int = 50,
    first_id: int = 0,
    batch_size: int = 64,
    labels: tuple[int, ...] | None = None,
    solver: Solver = "euler",
) -> Path:
    """Write ``count`` PNG files named by sample id; sample ``k`` does not depend on count or batch size.

    Args:
        source: an exported student's folder (its own number of steps, ``steps`` is ignored) or a teacher.
        output: folder to create; must not hold anything.
        count: number of samples.
        steps: network calls of a teacher.
        first_id: id of the first sample.
        batch_size: samples at a time.
        labels: class labels to cycle through; all of them by default.
        solver: ODE solver of a teacher.

    Raises:
        UserError: no such pipeline, or ``output`` holds something.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; choose another --out")
    if labels is not None and min(labels) < 0:
        raise UserError(f"--labels must not be negative, got {list(labels)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (Path(source) / DESCRIPTION).is_file():
        generate = _student(source, labels, device)
    else:
        generate = _teacher(source, labels, device, steps, solver)
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=count, desc="sample", mininterval=1) as bar, torch.no_grad():
        for start in range(first_id, first_id + count, batch_size):
            ids = range(start, min(start + batch_size, first_id + count))
            for index, image in zip(ids, to_uint8(generate(ids)), strict=True):
                to_picture(image).save(output / f"{index:06d}.png")
            bar.update(len(ids))
    return output


def _asked(labels: tuple[int, ...] | None, classes: int | None) -> Data:
    return Data(class_labels=labels if labels is not None else "uniform" if classes is not None else None)


def _student(source: str, labels: tuple[int, ...] | None, device: torch.device) -> Generate:
    """The student's own pipeline on the samples' generators."""
    pipeline = DiffusionPipeline.from_pretrained(source).to(device)
    pipeline.set_progress_bar_config(disable=True)
    unet: UNet2DModel = pipeline.unet  # type: ignore[attr-defined]
    calls = json.loads((Path(source) / DESCRIPTION).read_text()).get("steps", 1)
    classes, shape = unet.config["num_class_embeds"], unet2d.sample_shape(unet)
    data = draws(shape, class_labels(source, classes, _asked(labels, classes)), device)

    def generate(ids: range) -> Tensor:
        generators = SampleNoise(ids, shape).generators
        images = pipeline(  # type: ignore[operator]
            batch_size=len(ids), num_inference_steps=calls, generator=generators, output_type="np", **data.cond(ids)
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    return generate


def _teacher(source: str, labels: tuple[int, ...] | None, device: torch.device, steps: int, solver: Solver) -> Generate:
    """A teacher's ODE in ``steps`` steps."""
    teacher = load_teacher(source)
    data = data_free(teacher, _asked(labels, teacher.classes), device)
    try:
        teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    teacher.network.to(device)  # type: ignore[arg-type]

    def generate(ids: range) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)()
        return sample_ode(teacher.denoiser, noise, steps, data.cond(ids), solver=solver)

    return generate
