"""``stepdistill sample``: images of a student or a teacher, one file per sample id."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .config import Data
from .data import DataFree, data_free
from .errors import UserError
from .images import to_uint8
from .samplers import SampleNoise, Solver, sample_ode
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
        source: an exported student's folder (one step, ``steps`` is ignored) or a teacher.
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
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(source)
    wanted = labels if labels is not None else ("uniform" if teacher.classes is not None else None)
    data = data_free(teacher, Data(class_labels=wanted), device)
    student = _student(Path(source), device) if (Path(source) / "stepdistill.json").is_file() else None
    teacher.network.to(device)  # type: ignore[arg-type]
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=count, desc="sample", mininterval=1) as bar, torch.no_grad():
        for start in range(first_id, first_id + count, batch_size):
            ids = range(start, min(start + batch_size, first_id + count))
            noise = SampleNoise(ids, data.shape, device=device)
            if student is not None:
                images = _run(student, noise, data, ids)
            else:
                images = sample_ode(teacher.denoiser, noise(), steps, data.cond(ids), solver=solver)
            for index, pixels in zip(ids, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                grey = pixels.shape[-1] == 1
                Image.fromarray(pixels[..., 0] if grey else pixels).save(output / f"{index:06d}.png")
            bar.update(len(ids))
    return output


def _student(folder: Path, device: torch.device) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _run(pipeline: DiffusionPipeline, noise: SampleNoise, data: DataFree, ids: range) -> Tensor:
    """The student's own pipeline on the samples' generators, ``(B, C, H, W)`` in [-1, 1]."""
    images = pipeline(  # type: ignore[operator]
        batch_size=len(ids), num_inference_steps=1, generator=noise.generators, output_type="np", **data.cond(ids)
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
