"""Students become diffusers folders: a stock pipeline whose scheduler settings repeat the sampler exactly.

A one-step student is linear in its noise and its network's output: ``x0 = A noise + B output(input noise, label)``.
Stock schedulers offer only a few ``(A, B')``, and their pipelines feed the noise itself at a whole timestep; what is
left is folded into the weights, exactly: the input scale into the first convolution, ``B / B'`` into the last
layer, the label into a bias of the time embedding.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils import logging
from torch import nn

from .backbones.conditioned import Conditioned, time_embeddings
from .backbones.plain import PLAIN
from .conditions import Cond
from .copies import on_cpu
from .decoder import Decoder
from .denoiser import Denoiser
from .errors import NotExported, first_line
from .hosting import Plan
from .lora import merged
from .own_code import code_of, runs_own_code, write_code
from .plain_student import plain_error, write_plain
from .process import NoiseProcess
from .samplers import SampleNoise, StudentSampler
from .sources import DESCRIPTION, components, pipeline_class
from .teacher import Teacher


@dataclass(frozen=True)
class Host:
    """The teacher, whose pipeline the student's network and scheduler go into."""

    teacher: Teacher
    call: dict[str, Any]
    """Arguments of a stock call beside its steps; lists have one entry per sample of the check."""


@torch.no_grad()
def stock_network(denoiser: Denoiser, sampler: StudentSampler, hosted: Plan) -> Any:  # noqa: ANN401
    """A stock network that does the student's work under the plan's scheduler."""
    told = replace(sampler, target_time=None) if hosted.is_map else sampler
    network: Any = single_time(merged(denoiser.network), denoiser.process, told).requires_grad_(True).eval()
    scale = hosted.map.output / hosted.output
    if not math.isclose(scale, 1.0, rel_tol=1e-6):
        for parameter in network.get_submodule(hosted.family.output).parameters():
            parameter.mul_(scale)
    if not math.isclose(hosted.map.input, 1.0, rel_tol=1e-12):
        network.conv_in.weight.mul_(hosted.map.input)
    if abs(hosted.map.label - hosted.label) > 1e-6:
        _relabel(network, wanted=hosted.map.label, told=hosted.label)
    return hosted.family.hosted(network, hosted.guidance)


def _relabel(network: Any, *, wanted: float, told: float) -> None:  # noqa: ANN401
    """Change biases so that a network that is told ``told`` does what it did for ``wanted``."""
    labels = torch.tensor([wanted, told], device=network.device)
    for place in time_embeddings(network):
        ours, theirs = network.get_submodule(place.rpartition(".")[0]).time_proj(labels)
        first = network.get_submodule(place).linear_1
        first.bias.add_(first.weight @ (ours - theirs))


def single_time(network: nn.Module, process: NoiseProcess, sampler: StudentSampler) -> nn.Module:
    """The stock network of a student; a target time that it is told, the sampler's, and a scale are folded in."""
    if not isinstance(network, Conditioned):
        return network
    target = sampler.target_time
    return network.folded(None if target is None else process.label(torch.tensor([target])).item())


def export(
    denoiser: Denoiser,
    sampler: StudentSampler,
    hosted: Plan,
    folder: Path,
    *,
    shape: tuple[int, ...],
    cond: Cond,
    host: Host | None = None,
    own_code: bool = False,
    check: bool = True,
) -> None:
    """Write the student's pipeline to ``folder`` (a temporary name first), and check it against the sampler.

    Args:
        denoiser: the trained student.
        sampler: how it generates.
        hosted: from ``plan``.
        folder: created or replaced.
        shape: ``(C, H, W)`` of one sample.
        cond: conditions of the samples of the check, four of them or those of ``host.call``.
        host: where the student is what its teacher is: a pipeline, whose other files are copied, or a plain network.
        own_code: also write the student's own pipeline file, with which a plain call is right.
        check: ``False`` leaves the check out.

    Raises:
        NotExported: see ``accept``.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    network = stock_network(denoiser, sampler, hosted)
    if host and hosted.family is PLAIN:
        write_plain(network, sampler, host.teacher, temporary)
        compare = partial(plain_error, denoiser, sampler, host.teacher, temporary, cond)
        accept(temporary, folder, compare if check else None)
        return
    if host:
        _replace(host, network, hosted, temporary)
    else:
        kind: Any = hosted.pipeline
        kind(unet=network, scheduler=hosted.scheduler).save_pretrained(temporary)
    description = description_of(sampler, hosted, host)
    if hosted.grid or own_code:
        stock = hosted.pipeline.__name__ if hosted.pipeline else cast(Host, host).teacher.index["_class_name"]
        call = {"num_inference_steps": hosted.steps, **description.get("call", {})}
        target = cast(Conditioned, denoiser.network).embeddings["target_label"] if hosted.is_map else None
        write_code(temporary, stock=stock, call=call, grid=hosted.grid, target=target)
        description |= {"stock": stock, "sole": hosted.grid is not None}
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    compare = partial(export_error, denoiser, sampler, temporary, shape=shape, cond=cond, host=host)
    accept(temporary, folder, compare if check else None)


def description_of(sampler: StudentSampler, hosted: Plan, host: Host | None) -> dict[str, Any]:
    """How a student generates, which is kept beside it."""
    told = {"sampler": asdict(sampler), "map": asdict(hosted.map), "label": hosted.label, "steps": hosted.steps}
    if host:
        told["call"] = {key: value for key, value in host.call.items() if not isinstance(value, list)}
    return told


def accept(temporary: Path, folder: Path, compare: Callable[[], float] | None) -> None:
    """Give the complete folder ``temporary`` its name, in place of an older one; it is kept whatever happens.

    Args:
        temporary: what was written.
        folder: its name.
        compare: says by how much it differs from the sampler; ``None`` where that is not asked.

    Raises:
        NotExported: it differs by more than 1e-4, or the comparison broke off.
    """
    if compare is not None:
        try:
            error = compare()
        except Exception as broken:
            raise NotExported(
                f"the student in {temporary} is complete, but comparing it with its sampler broke off: "
                f"{first_line(broken)}; `stepdistill export RUN export.check=false` does without"
            ) from broken
        if not error < 1e-4:
            raise NotExported(
                f"the exported pipeline differs from the student's sampler by {error:.2g}; kept {temporary}"
            )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def empty_parts(index: dict[str, Any]) -> dict[str, None]:
    """What loading a pipeline must be told to do without: SD3 saved without its T5 does not load otherwise."""
    optional = pipeline_class(index)._optional_components
    return {name: None for name, kind in components(index).items() if kind is None and name not in optional}


def _replace(host: Host, network: Any, hosted: Plan, folder: Path) -> None:  # noqa: ANN401
    """The teacher's pipeline with another network and scheduler; every other file is copied as it is.

    Tokenizers and encoders that one version of transformers writes again, another may not read.
    """
    teacher, component = host.teacher, host.teacher.family.component
    folder.mkdir(parents=True)
    for name, kind in components(teacher.index).items():
        if kind and name not in (component, "scheduler"):
            shutil.copytree(teacher.folder / name, folder / name)
    network.save_pretrained(folder / component)
    index = dict(teacher.index)
    if hosted.pipeline:
        index["_class_name"] = hosted.pipeline.__name__
    if hosted.scheduler is None:
        shutil.copytree(teacher.folder / "scheduler", folder / "scheduler")
    else:
        hosted.scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(hosted.scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def export_error(
    denoiser: Denoiser,
    sampler: StudentSampler,
    folder: Path,
    *,
    shape: tuple[int, ...],
    cond: Cond,
    host: Host | None = None,
) -> float:
    """Largest difference in [0, 1] between the reloaded pipeline's pictures and the sampler's, over the samples."""
    student, told = for_cpu(denoiser, cond)
    logging.disable_progress_bar()
    empty = empty_parts(host.teacher.index) if host else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **empty, **_consent(folder))
    pipeline.set_progress_bar_config(disable=True)
    calls = len(sampler.times)
    if host is None:
        noise = SampleNoise(range(4), shape)
        images = sampler(student, noise(), told, renoise=noise)
        generators = SampleNoise(range(4), shape).generators
        told = {key: value for key, value in told.items() if key != "guidance_scale"}  # folded in
        output = pipeline(
            batch_size=4, num_inference_steps=calls, generator=generators, output_type="np", **told
        ).images
        return (torch.from_numpy(output).permute(0, 3, 1, 2) - (images / 2 + 0.5).clamp(0, 1)).abs().max().item()
    return error_in_place(pipeline, student, told, sampler, host, shape)


def _consent(folder: Path) -> dict[str, Any]:
    """Arguments that load a folder by the pipeline file that was written into it just now, where there is one."""
    code = code_of(folder)
    return {} if code is None else {"custom_pipeline": code.stem, "trust_remote_code": True}


def for_cpu(denoiser: Denoiser, cond: Cond) -> tuple[Denoiser, Cond]:
    """Copies for a comparison on the CPU: a GPU's TF32 convolutions differ by more than a wrong fold would."""
    network = on_cpu(denoiser.network)
    for module in network.modules():
        if isinstance(module, AttentionModuleMixin):
            cast(Any, module).set_attention_backend("native")  # a GPU's own would not run
    return replace(denoiser, network=network), {key: value.cpu() for key, value in cond.items()}


def error_in_place(
    pipeline: Any,  # noqa: ANN401
    student: Denoiser,
    cond: Cond,
    sampler: StudentSampler,
    host: Host,
    shape: tuple[int, ...],
) -> float:
    """Sample by sample: some stock pipelines draw the noise of later steps from torch's global generator."""
    decode, errors = Decoder(replace(host.teacher, parts_dtype="float32")), []
    call: dict[str, Any] = {"num_inference_steps": len(sampler.times), **host.call}
    if runs_own_code(pipeline):  # which knows what to say
        call = {key: value for key, value in call.items() if isinstance(value, list)}
    if "safety_checker" in pipeline.components:  # it would blacken what is compared
        pipeline.safety_checker = None
    for k in range(len(next(iter(cond.values())))):
        one = {key: value[k : k + 1] if isinstance(value, list) else value for key, value in call.items()}
        torch.manual_seed(k)
        with attention_backend("native"):
            made = pipeline(output_type="np", **one).images
        torch.manual_seed(k)
        noise, mine = torch.randn(1, *shape), {key: value[k : k + 1] for key, value in cond.items()}
        drawn = sampler(student, noise, mine, renoise=lambda: host.teacher.family.later_noise(torch.randn(1, *shape)))
        expected = (decode(drawn) / 2 + 0.5).clamp(0, 1)
        errors.append((torch.from_numpy(made).permute(0, 3, 1, 2) - expected).abs().max())
    return torch.stack(errors).max().item()  # that of Python would pass over what is no number
