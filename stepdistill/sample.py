"""``stepdistill sample``: images of a student, a teacher or both in turn, one file per sample id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import Family
from .backbones.family import square
from .backbones.unet2d import UNET2D
from .conditions import in_turn
from .config import Data
from .data import DataFree, class_labels, data_free, draws
from .decoder import Decoder
from .errors import UserError
from .hybrid import HybridSampler, trace_ode, trace_x0
from .images import to_picture, to_uint8
from .prompts import read_prompts
from .samplers import SampleNoise, Solver, sample_ode, teacher_grid
from .sources import DESCRIPTION, read_index
from .student import exported, few_step, one_step, recipe, teacher_of
from .teacher import load_teacher

Traces = Callable[[Sequence[int]], Tensor]
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
    prompts: str | tuple[str, ...] | None = None,
    guidance_scale: float = 1.0,
    solver: Solver = "euler",
    teacher_first: int = 0,
    teacher: str | None = None,
    trace: bool = False,
    trust_remote_code: bool = False,
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
        prompts: prompts to cycle through, or a file of them; those of the student's recipe by default.
        guidance_scale: of a teacher; a student has learned its own.
        solver: ODE solver of a teacher.
        teacher_first: calls of the student that the teacher makes, see ``HybridSampler``.
        teacher: source of that teacher; the one in the student's model card by default.
        trace: also write what every call predicts, as one row of pictures per sample, to the folder ``{output}_trace``.
        trust_remote_code: run the pipeline file that a student comes with.

    Raises:
        UserError: no such pipeline, choices that do not go together, or a folder that holds something.
    """
    pictures = output.with_name(f"{output.name}_trace") if trace else None
    _refuse_occupied(output, pictures)
    traces = tracing(
        source,
        steps=steps,
        labels=labels,
        prompts=prompts,
        guidance_scale=guidance_scale,
        solver=solver,
        teacher_first=teacher_first,
        teacher=teacher,
        trace=trace,
        trust_remote_code=trust_remote_code,
    )
    _write(traces, range(first_id, first_id + count), batch_size, output, pictures)
    return output


def tracing(
    source: str,
    *,
    steps: int | None = None,
    labels: tuple[int, ...] | None = None,
    prompts: str | tuple[str, ...] | None = None,
    guidance_scale: float = 1.0,
    solver: Solver = "euler",
    teacher_first: int = 0,
    teacher: str | None = None,
    trace: bool = False,
    trust_remote_code: bool = False,
) -> Traces:
    """What generates the images of ``sample``, by their ids; arguments and errors are the same."""
    if labels is not None and min(labels) < 0:
        raise UserError(f"--labels must not be negative, got {list(labels)}")
    is_student = (Path(source) / DESCRIPTION).is_file()
    family = _family(source) if is_student else None
    if family:
        in_steps = bool(teacher_first or trace)
        _refuse_for_student(source, family, labels, prompts, guidance_scale, in_steps=in_steps)
    if guidance_scale < 0:
        raise UserError(f"--guidance-scale must not be negative, got {guidance_scale}")
    if teacher_first == 0 and teacher is not None:
        raise UserError("--teacher is for --teacher-first only; give the number of its calls or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if teacher_first:
        if not is_student:
            raise UserError(f"--teacher-first needs the folder of an exported student; {source} has no {DESCRIPTION}")
        if solver != "euler":
            raise UserError(f"--teacher-first goes in Euler (DDIM) steps; remove --solver {solver}")
        return _hybrid(source, labels, device, teacher_first, teacher, steps)
    if family and family is not UNET2D:
        return _placed(source, family, labels, prompts, device, trust_remote_code=trust_remote_code)
    if family:
        return _student(source, labels, device, trace, trust_remote_code=trust_remote_code)
    asked = {"class_labels": labels, "prompts": prompts, "guidance_scale": guidance_scale}
    return _teacher(source, asked, device, 50 if steps is None else steps, solver, trace)


def _family(source: str) -> Family:
    """Of an exported student; a folder that is none is refused later, with the reason."""
    index = Path(source) / "model_index.json"
    return read_index(index, source, student=True)[1] if index.is_file() else UNET2D


def _refuse_for_student(
    source: str,
    family: Family,
    labels: tuple[int, ...] | None,
    prompts: str | tuple[str, ...] | None,
    guidance_scale: float,
    *,
    in_steps: bool,
) -> None:
    reads = family.encode is not None
    if guidance_scale != 1:
        raise UserError("--guidance-scale is for a teacher; a student has learned its own")
    if prompts is not None and not reads:
        raise UserError(f"{source} reads no prompts; remove --prompt")
    if labels is not None and reads:
        raise UserError(f"{source} reads prompts; remove --labels")
    if in_steps and family is not UNET2D:
        raise UserError("--teacher-first and --trace are not supported yet for pipelines with a VAE")


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


def _student(
    source: str, labels: tuple[int, ...] | None, device: torch.device, trace: bool, *, trust_remote_code: bool
) -> Traces:
    """The student's own pipeline on the samples' generators, or its sampler where several calls are to be seen."""
    pipeline, sampler, *_ = exported(source, device, trust_remote_code=trust_remote_code)
    data, calls = _draws(source, pipeline.unet, labels, device), len(sampler.times)

    def images(ids: Sequence[int]) -> Tensor:
        generators = SampleNoise(ids, data.shape).generators
        made = pipeline(  # type: ignore[operator]
            batch_size=len(ids), num_inference_steps=calls, generator=generators, output_type="np", **data.cond(ids)
        ).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    if not trace or calls == 1:
        return images
    denoiser, sampler = few_step(pipeline, sampler)

    def predictions(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)
        return trace_x0(sampler.trace(denoiser, noise(), data.cond(ids), renoise=noise))

    return predictions


def _placed(
    source: str,
    family: Family,
    labels: tuple[int, ...] | None,
    prompts: str | tuple[str, ...] | None,
    device: torch.device,
    *,
    trust_remote_code: bool,
) -> Traces:
    """A student in its teacher's pipeline, one sample at a time on torch's global generator, which all of them read."""
    student = exported(source, device, trust_remote_code=trust_remote_code)
    data = recipe(Path(source) / "README.md").get("data", {})
    if family.encode:
        prompts = prompts or data.get("prompts")
        if prompts is None:
            raise UserError(f"{source} reads prompts, and its card names none; give --prompts")
        every: list[Any] = read_prompts(prompts)
    else:
        given = labels or data.get("class_labels")
        every = list(given) if isinstance(given, tuple | list) else list(range(1000))

    def images(ids: Sequence[int]) -> Tensor:
        made = []
        for k, turn in zip(ids, in_turn(ids, len(every)), strict=True):
            torch.manual_seed(k)
            told = {"prompt": every[turn]} if family.encode else {"class_labels": [every[turn]]}
            told |= {"num_inference_steps": len(student.sampler.times), "output_type": "np", **student.call}
            made.append(torch.from_numpy(student.pipeline(**told).images))
        return torch.cat(made).permute(0, 3, 1, 2)[:, None] * 2 - 1

    return images


def _teacher(
    source: str, asked: dict[str, Any], device: torch.device, steps: int, solver: Solver, trace: bool
) -> Traces:
    """A teacher's ODE in ``steps`` steps."""
    teacher = load_teacher(source)
    if teacher.classes is not None and asked["class_labels"] is None:
        asked = {**asked, "class_labels": "uniform"}
    told = Data(**asked)
    data, decode = data_free(teacher, told, device), Decoder(teacher)
    try:
        teacher_grid(teacher.denoiser.process, steps)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from None
    teacher.network.to(device)
    denoiser = teacher.guided(told, data.null)

    def traces(ids: Sequence[int]) -> Tensor:
        noise = SampleNoise(ids, data.shape, device=device)()
        if trace:
            seen = trace_x0(trace_ode(denoiser, noise, steps, data.cond(ids), solver=solver))
            return torch.stack([decode(each) for each in seen.unbind(1)], dim=1)
        return decode(sample_ode(denoiser, noise, steps, data.cond(ids), solver=solver))[:, None]

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
    pipeline, recorded, label, _ = exported(source, device)
    data = _draws(source, pipeline.unet, labels, device)
    teacher, guided = teacher_of(source, teacher_source, device)
    if (teacher.sample_shape, teacher.classes) != (data.shape, pipeline.unet.config["num_class_embeds"]):
        raise UserError(f"{teacher.source} and {source} differ in the size of a sample or the number of classes")
    if len(recorded.times) == 1:
        student, recorded = one_step(source, pipeline, recorded, label, teacher.denoiser.process)
    else:
        student, recorded = few_step(pipeline, recorded)
    try:
        sampler = HybridSampler(recorded, teacher_first, steps)
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

    return traces


def _draws(source: str, unet: UNet2DModel, labels: tuple[int, ...] | None, device: torch.device) -> DataFree:
    classes = unet.config["num_class_embeds"]
    asked = Data(class_labels=labels if labels is not None else "uniform" if classes is not None else None)
    return draws(square(unet.config), class_labels(source, classes, asked), device)
