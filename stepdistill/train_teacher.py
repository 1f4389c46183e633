"""Train a small teacher from images: the one place where training images enter, so that examples have a teacher.

``stepdistill teacher --config teacher_digits`` and ``python training/train_teacher.py --config ...``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import unet2d
from .config import EnoughSamples, Section
from .denoiser import Denoiser
from .errors import UserError
from .evaluation import Evaluator
from .images import to_float
from .methods._shared import UniformTimes, denoising_loss
from .metrics.sources import load_images
from .preflight import check_launch
from .samplers import SampleNoise, sample_ode
from .schedulers import read_scheduler


class TeacherConfig(Section):
    """What determines a teacher."""

    images: str
    """Folder, ``.npz`` or ``builtin:digits``: the training images."""
    output_dir: Path
    """Folder of the finished ``DDPMPipeline``; must not exist."""
    seed: int = 0
    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 200
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    unet: dict[str, Any]
    """Arguments of ``diffusers.UNet2DModel``."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``diffusers.DDPMScheduler``."""
    evaluate_steps: tuple[PositiveInt, ...] = (50, 10, 4)
    """DDIM steps at which the finished teacher is measured."""
    evaluate_samples: EnoughSamples | None = 5000
    """Samples per distance; null measures nothing (the bundled metric knows 8x8 digits only)."""


def train_teacher(config: TeacherConfig) -> Path:
    """Train on ``config.images``, save the pipeline with its record (``training.json``), return its folder."""
    if config.output_dir.exists():
        raise UserError(f"{config.output_dir} exists; choose another output_dir or remove it")
    images = to_float(load_images(config.images))
    check_launch()
    accelerator = Accelerator()
    set_seed(config.seed)
    try:
        scheduler = DDPMScheduler(**config.scheduler)
        unet = UNet2DModel(**config.unet)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the unet or scheduler section cannot be built: {error}") from None
    if config.evaluate_samples:
        Evaluator(config.images)  # refuses images that the metric does not know before the training
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, fused=True)
    lr_schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    network, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    teacher = Denoiser(network, **read_scheduler(scheduler), call=unet2d.call)
    if accelerator.num_processes > 1:
        set_seed(config.seed, device_specific=True)  # one network, other images on every process
    images, times = images.to(accelerator.device), UniformTimes(low=0.0, high=1.0)
    started = time.monotonic()
    for _ in tqdm(range(config.steps), desc="teacher", mininterval=2, disable=not accelerator.is_main_process):
        x0 = images[torch.randint(len(images), (config.batch_size,), device=images.device)]
        accelerator.backward(denoising_loss(teacher, x0, times.draw(teacher.process, x0), {}) / x0[0].numel())
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        ema.step(unet.parameters())
    seconds = time.monotonic() - started
    ema.copy_to(unet.parameters())
    measured = _measure(config, teacher)
    if accelerator.is_main_process:
        DDPMPipeline(unet.eval(), scheduler).save_pretrained(config.output_dir)
        record = {"config": config.model_dump(mode="json"), "seconds": round(seconds), **measured}
        (config.output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["distances"], indent=1))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir


def _measure(config: TeacherConfig, teacher: Denoiser) -> dict[str, Any]:
    """Distance of the teacher at several step counts, and of a random half of the images (the floor)."""
    if not config.evaluate_samples:
        return {"distances": {}}
    evaluator, images = Evaluator(config.images), load_images(config.images)
    distances = {"metric": evaluator.protocol.title("fid"), "real half": evaluator.floor(images, config.seed)}
    device = next(teacher.network.parameters()).device
    for steps in config.evaluate_steps:

        def generate(ids: Sequence[int], steps: int = steps) -> Tensor:
            return sample_ode(teacher, SampleNoise(ids, images.shape[1:], device=device)(), steps)

        measured = evaluator.measure(f"{steps} steps", steps, generate, samples=config.evaluate_samples)
        distances[measured.label] = asdict(measured.metrics["fid"])
    return {"distances": distances}
