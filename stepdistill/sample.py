"""``stepdistill sample``: images of a student, a teacher or both in turn, one file per sample id."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from .backbones import unet2d
from .backbones.family import square
from .conditions import Cond
from .config import Data
from .data import DataFree, class_labels, data_free, draws
from .denoiser import Denoiser
from .errors import UserError
from .export import DESCRIPTION
from .hybrid import HybridSampler, trace_ode, trace_x0
from .images import to_picture, to_uint8
from .process import NoiseProcess
from .samplers import SampleNoise, Solver, StudentSampler, sample_ode, teacher_grid
from .schedulers import read_scheduler
from .teacher import Teacher, load_teacher

Traces = Callable[[range], Tensor]
"""What the calls for the given ids predict, ``(B, K, C, H, W)`` in [-1, 1]; the last of the K is the sample."""


def sample(
    source: str,
    output: Path,
    *,
    count: int = 64,
    steps: int | None = None,
    first_id: int = 0,
    batch_size: int = 64,
    labels: tuple[int, ...] | None = None,
    solver: Solver = "euler",
    teacher_first: int = 0,
    teacher: str | None = None,
    trace: bool = False,
) -> Path:
    """Write ``count`` PNG files named by sample id; sample ``k`` does not depend on count or batch size.

    Args:
        source: an exported student's folder, or a teacher.
        output: folder to create; must not hold anything.
        count: number of samples.
        steps: network calls of a teacher, 50 by default; with ``teacher_first`` those of the teacher's whole grid, as
            many as the student's by default.  A student alone has its own number.
        first_id: id of the first sample.
        batch_size: samples at a time.
        labels: class labels to cycle through; all of them by default.
        solver: ODE solver of a teacher.
        teacher_first: calls of the student that the teacher makes, see ``HybridSampler``.
        teacher: source of that teacher; the one in the student's model card by default.
        trace: also write what every call predicts, as one row of pictures per sample, to the folder ``{output}_trace``.

    Raises:
        UserError: no such pipeline, choices that do not go together, or a folder that holds something.
    """
    pictures = output.with_name(f"{output.name}_trace") if trace else None
    _refuse_occupied(output, pictures)
    if labels is not None and min(labels) < 0:
        raise UserError(f"--labels must not be negative, got {list(labels)}")
    is_student = (Path(source) / DESCRIPTION).is_file()
    if teacher_first == 0 and teacher is not None:
        raise UserError("--teacher is for --teacher-first only; give the number of its calls or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if teacher_first:
        if not is_student:
            raise UserError(f"--teacher-first needs the folder of an exported student; {source} has no {DESCRIPTION}")
        if solver != "euler":
            raise UserError(f"--teacher-first goes in Euler (DDIM) steps; remove --solver {solver}")
        traces = _hybrid(source, labels, device, teacher_first, teacher, steps)
    elif is_student:
        traces = _student(source, labels, device, trace)
    else:
        traces = _teacher(source, labels, device, 50 if steps is None else steps, solver, trace)
    _write(traces, range(first_id, first_id + count), batch_size, output, pictures)
    return output


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


def _asked(labels: tuple[int, ...] | None, classes: int | None) -> Data:
    return Data(class_labels=labels if labels is not None else "uniform" if classes is not None else None)


def _student(source: str, labels: tuple[int, ...] | None, device: torch.device, trace: bool) -> Traces:
    """The student's own pipeline on the samples' generators, or its sampler where several calls are to be seen."""
    pipeline, sampler, _ = _exported(source, device)
    data, calls = _draws(source, pipeline.unet, labels, device), len(sampler.times)

    def images(ids: range) -> Tensor:
        generators = SampleNoise(ids, data.shape).generators
        made = pipeline(  # type: ignore[operator]
            batch_size=len(ids), num_inference_steps=calls, generator=generators, output_type="np", **data.cond(ids)
        ).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    if not trace or calls == 1:
        return images
    denoiser, sampler = _few_step(pipeline, sampler)

    def predictions(ids: range) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        return trace_x0(sampler.trace(denoiser, noise(), data.cond(ids), renoise=noise))

    return predictions


def _teacher(
    source: str, labels: tuple[int, ...] | None, device: torch.device, steps: int, solver: Solver, trace: bool
) -> Traces:
    """A teacher's ODE in ``steps`` steps."""
    teacher = load_teacher(source)
    data = data_free(teacher, _asked(labels, teacher.classes), device)
    try:
        teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    teacher.network.to(device)  # type: ignore[arg-type]

    def traces(ids: range) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)()
        if trace:
            return trace_x0(trace_ode(teacher.denoiser, noise, steps, data.cond(ids), solver=solver))
        return sample_ode(teacher.denoiser, noise, steps, data.cond(ids), solver=solver)[:, None]

    return traces


def _hybrid(
    source: str,
    labels: tuple[int, ...] | None,
    device: torch.device,
    teacher_first: int,
    teacher_source: str | None,
    steps: int | None,
) -> Traces:
    """The teacher's first steps, then the student's calls."""
    pipeline, recorded, label = _exported(source, device)
    data = _draws(source, pipeline.unet, labels, device)
    teacher, guided = _teacher_of(source, teacher_source, device)
    if (teacher.sample_shape, teacher.classes) != (data.shape, pipeline.unet.config["num_class_embeds"]):
        raise UserError(f"{teacher.source} and {source} differ in the size of a sample or the number of classes")
    if len(recorded.times) == 1:
        student, recorded = _one_step(source, pipeline, recorded, label, teacher.denoiser.process)
    else:
        student, recorded = _few_step(pipeline, recorded)
    try:
        sampler = HybridSampler(recorded, teacher_first, steps)
        sampler.check(student.process)
    except ValueError as error:
        raise UserError(f"--teacher-first: {error}") from None
    try:
        sampler.teacher_times(teacher.denoiser.process, student.process)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None

    def traces(ids: range) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        return trace_x0(sampler.trace(guided, student, noise(), data.cond(ids), renoise=noise))

    return traces


def _draws(source: str, unet: UNet2DModel, labels: tuple[int, ...] | None, device: torch.device) -> DataFree:
    classes = unet.config["num_class_embeds"]
    return draws(square(unet.config), class_labels(source, classes, _asked(labels, classes)), device)


def _exported(source: str, device: torch.device) -> tuple[Any, StudentSampler, float]:
    """An exported student's pipeline, its sampler in the teacher's times, and the teacher's label of its first call."""
    try:
        written = json.loads((Path(source) / DESCRIPTION).read_text())
        recorded = {**written["sampler"], "times": tuple(written["sampler"]["times"])}
        sampler, label = StudentSampler(**recorded), float(written["map"]["label"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}/{DESCRIPTION} is not what an export writes: {error!r}") from None
    try:
        pipeline = DiffusionPipeline.from_pretrained(source).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the student: {str(error).splitlines()[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, sampler, label


def _few_step(pipeline: Any, sampler: StudentSampler) -> tuple[Denoiser, StudentSampler]:  # noqa: ANN401
    """A student of several calls under the process of its own stock scheduler, which is the teacher's up there."""
    scheduler = pipeline.scheduler
    denoiser = Denoiser(pipeline.unet, **read_scheduler(scheduler), call=unet2d.call)
    scheduler.set_timesteps(len(sampler.times))
    times = denoiser.process.time_of_label(scheduler.timesteps.double()).tolist()
    return denoiser, replace(sampler, times=tuple(times), input="unit", target_time=None)


def _one_step(
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


def _teacher_of(source: str, given: str | None, device: torch.device) -> tuple[Teacher, Denoiser]:
    """The teacher ``given`` or named by the student's card, and its denoiser with the guidance of the recipe there."""
    recipe = _recipe(Path(source) / "README.md")
    name = given or recipe.get("teacher")
    if not isinstance(name, str):
        raise UserError(f"the model card of {source} names no teacher; give it with --teacher")
    try:
        teacher = load_teacher(name)
    except UserError as error:
        raise error if given else UserError(f"{error}; {source}/README.md names it, --teacher gives another") from None
    teacher.network.to(device)  # type: ignore[arg-type]
    try:
        return teacher, teacher.guided(Data(**recipe.get("data", {})))
    except (TypeError, ValueError) as error:
        raise UserError(f"the recipe in {source}/README.md: {str(error).splitlines()[0]}") from None


def _recipe(card: Path) -> dict[str, Any]:
    """The recipe that ``distill`` wrote into a model card; empty where there is none."""
    text = card.read_text() if card.is_file() else ""
    found = re.search(r"^## Recipe$.*?^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    try:
        recipe = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        recipe = None
    return recipe if isinstance(recipe, dict) else {}
