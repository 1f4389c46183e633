"""A one- or few-step student as a folder that plain diffusers loads, equal to the student's sampler.

A one-step student is a linear map round one network call: ``x0 = A noise + B network(C noise, label)``, with
numbers ``A``, ``B``, ``C`` that follow from process, prediction type and input scale.  A stock scheduler in a
stock pipeline also computes ``x0 = A' noise + B' network(noise, label')``.  The scheduler is chosen so that
``A' = A``; ``B / B'`` and ``C`` are folded into the last and first convolution, a label that no integer
timestep can name into a bias.  What a plain pipeline then runs is the student, exactly.

A student of several steps has one such map per call.  LCM's scheduler re-noises between the entries of a DDPM
table, DDIM's goes back with the predicted noise, and the Euler scheduler of rectified flow does either.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from diffusers.utils import logging
from torch import Tensor, nn

from .backbones.unet2d import TargetTimeUNet
from .conditions import Cond
from .denoiser import Denoiser
from .errors import UserError
from .lora import merged
from .process import VP, Flow, NoiseProcess
from .samplers import SampleNoise, StudentSampler

DESCRIPTION = "stepdistill.json"
"""How a student generates, beside its pipeline."""


@dataclass(frozen=True)
class OneStepMap:
    """``x0 = direct noise + output network(input noise, label)``, float64."""

    direct: float
    output: float
    input: float
    label: float


def one_step_map(denoiser: Denoiser, sampler: StudentSampler) -> OneStepMap:
    """The linear map of a one-step student, read off the sampler itself with a network that returns a constant."""
    seen, sampler = [], replace(sampler, clip_sample=False)

    def constant(value: float) -> Denoiser:
        def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
            seen.append((x.item(), label.item()))
            return torch.full_like(x, value)

        return replace(denoiser, call=call)

    one = torch.ones(1, 1, dtype=torch.float64)
    direct = sampler(constant(0.0), one).item()
    output = sampler(constant(1.0), 0 * one).item()
    return OneStepMap(direct=direct, output=output, input=seen[0][0], label=seen[0][1])


@dataclass(frozen=True)
class Plan:
    """How a student will be hosted by stock diffusers; made before training, so that nothing is trained in vain."""

    pipeline: type[DiffusionPipeline]
    scheduler: LCMScheduler | DDIMScheduler | FlowMatchEulerDiscreteScheduler
    steps: int
    """Network calls."""
    map: OneStepMap
    """Of the first call."""
    output: float
    """``B'``, the factor that the scheduler puts before the network's output."""
    label: int
    """The timestep that the pipeline tells the network."""


def plan(denoiser: Denoiser, sampler: StudentSampler, *, classes: int | None) -> Plan:
    """Choose pipeline and scheduler for a student.

    Raises:
        UserError: stock diffusers has no place for this student.
    """
    if len(sampler.times) > 1:
        return _few_step_plan(denoiser, sampler, classes=classes)
    student = one_step_map(denoiser, sampler)
    if not math.isclose(student.input, 1.0, rel_tol=1e-12):
        _refuse_unscalable(denoiser.network)
    nearest = round(student.label)
    label = nearest if nearest >= 1 and math.isclose(nearest, student.label, abs_tol=1e-6) else 1
    if abs(student.direct - 1) < 1e-6:  # x0 = noise - output: no DDPM table has alpha = 1, a flow step does this
        if classes is not None:
            raise UserError(
                "no stock pipeline runs a class-conditional flow step from t = 1; set a smaller method.t_max or "
                "method.init_ratio"
            )
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=label, shift=1.0)
        return Plan(DDPMPipeline, flow, 1, student, -1.0, label)
    kind = "epsilon" if student.direct > 1 else "v_prediction"
    alpha = 1 / student.direct if student.direct > 1 else student.direct
    sigma = math.sqrt(1 - alpha**2)
    output = -sigma * student.direct if student.direct > 1 else -sigma
    scheduler = LCMScheduler(
        num_train_timesteps=label + 1,
        trained_betas=_betas(denoiser, label, alpha),
        prediction_type=kind,
        original_inference_steps=1,
        timestep_scaling=1e10,  # LCM's skip connection vanishes: c_skip < 1e-19
        clip_sample=sampler.clip_sample,
        set_alpha_to_one=True,
    )
    return Plan(ConsistencyModelPipeline, scheduler, 1, student, output, label)


def _few_step_plan(denoiser: Denoiser, sampler: StudentSampler, *, classes: int | None) -> Plan:
    """Schedulers whose own grid for ``steps`` calls is the sampler's, so that plain lines are right."""
    steps, first = len(sampler.times), one_step_map(denoiser, replace(sampler, times=sampler.times[:1]))
    refusal = f"no stock scheduler runs this student in {steps} steps"
    if sampler.renoising == "fixed":
        raise UserError(f"{refusal}: it re-uses its first noise; set method.renoising=fresh or ddim")
    if sampler.target_time is not None:
        raise UserError(f"{refusal}: its network is told one target time only")
    if isinstance(denoiser.process, VP):
        scheduler = _table_scheduler(denoiser, sampler, first, refusal)
        return Plan(ConsistencyModelPipeline, scheduler, steps, first, first.output, round(first.label))
    if sampler.clip_sample:
        raise UserError(f"{refusal}: that of rectified flow does not clip; set method.clip_sample=false")
    scheduler = _flow_scheduler(denoiser, sampler, refusal)
    if classes is not None:
        raise UserError(f"{refusal}: no stock pipeline runs a class-conditional flow")
    return Plan(DDPMPipeline, scheduler, steps, first, first.output, round(first.label))


def _table_scheduler(
    denoiser: Denoiser, sampler: StudentSampler, first: OneStepMap, refusal: str
) -> LCMScheduler | DDIMScheduler:
    """LCM's scheduler or DDIM's on the teacher's table up to the first level."""
    times, steps, label = torch.tensor(sampler.times, dtype=torch.float64), len(sampler.times), round(first.label)
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}.get(denoiser.target)
    if kind is None:
        raise UserError(f"{refusal}: its network predicts {denoiser.target!r} under a DDPM table")
    if not math.isclose(first.input, 1.0, rel_tol=1e-12):
        raise UserError(f"{refusal}: its first call is fed sigma times the noise; set method.input=unit")
    labels = denoiser.process.label(times).tolist()
    if any(abs(told - ((label + 1) * (steps - k) / steps - 1)) > 1e-6 for k, told in enumerate(labels)):
        raise UserError(f"{refusal}: timesteps {[round(x, 2) for x in labels]} are not evenly spaced down to -1")
    settings = {
        "num_train_timesteps": label + 1,
        "trained_betas": _betas(denoiser, label, denoiser.process.alpha(times[:1]).item()),
        "prediction_type": kind,
        "clip_sample": sampler.clip_sample,
        "set_alpha_to_one": True,
    }
    if sampler.renoising == "ddim":
        return DDIMScheduler(**settings, timestep_spacing="trailing")
    if round(labels[-1]) == 0:
        raise UserError(f"{refusal}: LCM's scheduler passes timestep 0 through; set fewer method.steps")
    return LCMScheduler(**settings, original_inference_steps=steps, timestep_scaling=1e10)


def _flow_scheduler(denoiser: Denoiser, sampler: StudentSampler, refusal: str) -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler of rectified flow from pure noise in even steps of sigma."""
    process, times, steps = denoiser.process, torch.tensor(sampler.times, dtype=torch.float64), len(sampler.times)
    levels, told = process.sigma(times).tolist(), process.label(times[:1]).item()
    even = all(math.isclose(level, 1 - k / steps, rel_tol=1e-9) for k, level in enumerate(levels))
    # The scheduler counts its timesteps, so the network must be told a whole multiple of sigma.
    counted = isinstance(process, Flow) and not process.reversed_label and told > 1.5 and abs(told - round(told)) < 1e-6
    if not counted or not even or denoiser.target != "flow":
        raise UserError(
            f"{refusal}: it takes a DDPM table, or a rectified flow at sigma 1, {1 - 1 / steps:.4g}, ... "
            "(method.init_ratio=.inf) that is told a whole multiple of sigma, at least 2"
        )
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=round(told),
        shift=1.0,
        shift_terminal=1 / steps,
        stochastic_sampling=sampler.renoising == "fresh",
    )


def _betas(denoiser: Denoiser, label: int, alpha: float) -> list[float]:
    """``label + 1`` betas that end at ``alpha``: the teacher's own table where it does, else one last step."""
    if isinstance(denoiser.native, VP):
        table = denoiser.native.alphas_cumprod.double()[: label + 1]
        if len(table) == label + 1 and math.isclose(table[-1].sqrt().item(), alpha, rel_tol=1e-6):
            return (1 - table / torch.cat([table.new_ones(1), table[:-1]])).tolist()
    return [0.0] * label + [1 - alpha**2]


@torch.no_grad()
def stock_network(denoiser: Denoiser, sampler: StudentSampler, hosted: Plan) -> UNet2DModel:
    """A stock ``UNet2DModel`` that does the student's work under the plan's scheduler."""
    network = single_time(merged(denoiser.network), denoiser.process, sampler).requires_grad_(True).eval()
    scale = hosted.map.output / hosted.output
    for parameter in network.conv_out.parameters():
        parameter.mul_(scale)
    if not math.isclose(hosted.map.input, 1.0, rel_tol=1e-12):
        network.conv_in.weight.mul_(hosted.map.input)
    if abs(hosted.map.label - hosted.label) > 1e-6:
        labels = torch.tensor([hosted.map.label, hosted.label], device=network.device, dtype=torch.float64)
        wanted, told = network.time_proj(labels.float())
        first = network.time_embedding.linear_1
        first.bias.add_(first.weight @ (wanted - told))
    return network


def single_time(network: nn.Module, process: NoiseProcess, sampler: StudentSampler) -> UNet2DModel:
    """The stock network of a student; where it is told a target time, the sampler's is folded in."""
    if not isinstance(network, TargetTimeUNet):
        return cast(UNet2DModel, network)
    assert sampler.target_time is not None
    return network.folded(process.label(torch.tensor([sampler.target_time])).item())


def _refuse_unscalable(network: nn.Module) -> None:
    config = cast(UNet2DModel, network.unet if isinstance(network, TargetTimeUNet) else network).config
    if config["center_input_sample"] or any("Skip" in block for block in config["down_block_types"]):
        raise UserError(
            "this UNet uses its input beside the first convolution (center_input_sample or Skip blocks), so the "
            "input scale cannot be folded; set method.input=unit"
        )


def export(
    denoiser: Denoiser, sampler: StudentSampler, hosted: Plan, folder: Path, *, shape: tuple[int, ...], cond: Cond
) -> None:
    """Write the student's pipeline to ``folder`` (a temporary name first), and check it against the sampler.

    Args:
        denoiser: the trained student.
        sampler: how it generates.
        hosted: from ``plan``.
        folder: created or replaced.
        shape: ``(C, H, W)`` of one sample.
        cond: conditions of four samples, used by the check.

    Raises:
        RuntimeError: the reloaded pipeline differs from the sampler by more than 1e-4.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    network = stock_network(denoiser, sampler, hosted)
    pipeline = hosted.pipeline(unet=network, scheduler=hosted.scheduler)  # type: ignore[call-arg]
    pipeline.save_pretrained(temporary)
    description = {"sampler": asdict(sampler), "map": asdict(hosted.map), "label": hosted.label, "steps": hosted.steps}
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    error = export_error(denoiser, sampler, temporary, shape=shape, cond=cond)
    if not error < 1e-4:
        raise RuntimeError(f"the exported pipeline differs from the student's sampler by {error:.2g}; kept {temporary}")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.no_grad()
def export_error(
    denoiser: Denoiser, sampler: StudentSampler, folder: Path, *, shape: tuple[int, ...], cond: Cond
) -> float:
    """Largest difference in [0, 1] between the reloaded pipeline's images and the sampler's, over four samples."""
    # Both sides on the CPU: a GPU's TF32 convolutions differ by more than a wrong fold would.
    student = replace(denoiser, network=copy.deepcopy(denoiser.network).cpu())
    labels = {key: value.cpu() for key, value in cond.items()}
    noise = SampleNoise(range(4), shape)
    images = sampler(student, noise(), labels, renoise=noise)
    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = SampleNoise(range(4), shape).generators
    output = pipeline(  # type: ignore[operator]
        batch_size=4, num_inference_steps=len(sampler.times), generator=generators, output_type="np", **labels
    ).images
    return (torch.from_numpy(output).permute(0, 3, 1, 2) - (images / 2 + 0.5).clamp(0, 1)).abs().max().item()
