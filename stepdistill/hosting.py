"""How a student will be hosted by stock diffusers: which pipeline and scheduler repeat its sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SanaSprintPipeline,
    SCMScheduler,
)
from torch import nn

from .backbones import Family
from .backbones.conditioned import Conditioned
from .backbones.dit import DIT
from .backbones.plain import PLAIN
from .backbones.sana import SANA, SPRINT
from .backbones.unet2d import UNET2D
from .denoiser import Denoiser
from .errors import UserError
from .linear_map import OneStepMap, betas, grid_settings, map_settings, one_step_map, stock_output
from .process import VP, Flow
from .samplers import StudentSampler

if TYPE_CHECKING:
    from diffusers import FlowMapEulerDiscreteScheduler

    _Scheduler = (
        LCMScheduler | DDIMScheduler | FlowMatchEulerDiscreteScheduler | FlowMapEulerDiscreteScheduler | SCMScheduler
    )


@dataclass(frozen=True)
class Plan:
    """How a student will be hosted by stock diffusers; made before training, so that nothing is trained in vain."""

    pipeline: type[DiffusionPipeline] | None
    """``None`` is the teacher's own; a plain network has none."""
    scheduler: _Scheduler | None
    """``None`` is the teacher's own, which a student with a ``grid`` does not use."""
    steps: int
    """Network calls."""
    map: OneStepMap
    """Of the first call."""
    output: float
    """``B'``, the factor that the scheduler puts before the network's output."""
    label: float
    """The timestep that the pipeline tells the network."""
    grid: dict[str, Any] | None = None
    """Settings of the student's own scheduler, where no stock one runs it; of a flow map they have ``levels``."""
    family: Family = UNET2D
    """Of the pipeline that hosts it: how that is called, and what its network must be."""
    guidance: float | None = None
    """The one scale that the student was ever told, which is folded into its network."""

    @property
    def is_map(self) -> bool:
        """The network goes on being told where to go."""
        return "levels" in (self.grid or {})

    @property
    def scheduler_name(self) -> str:
        """Class of the scheduler."""
        return "its own StudentScheduler" if self.grid else type(self.scheduler).__name__


def plan(
    denoiser: Denoiser,
    sampler: StudentSampler,
    *,
    classes: int | None,
    family: Family = UNET2D,
    own_code: bool = False,
    sana_sprint: bool = False,
    guidance: float | None = None,
) -> Plan:
    """Choose pipeline and scheduler for a student of a teacher in ``family`` with so many ``classes``.

    Args:
        denoiser: the student, or its teacher.
        sampler: how the student generates.
        classes: of a class-conditional teacher.
        family: of the teacher.
        own_code: where stock diffusers has no place for the student, or for a whole flow map, let it travel with its
            own pipeline file.
        sana_sprint: put a student of Sana into Sana-Sprint's pipeline.
        guidance: the one scale that the student is told, of a teacher that is told one.

    Raises:
        UserError: stock diffusers has no place for it.
    """
    if family is UNET2D and not isinstance(size := _config(denoiser.network)["sample_size"], int):
        raise UserError(f"unet/config.json has sample_size={list(size)}; ConsistencyModelPipeline takes one number")
    first = one_step_map(denoiser, replace(sampler, times=sampler.times[:1]))
    if family is PLAIN:
        if own_code:
            raise UserError("export.own_code writes a diffusers pipeline, which a plain network has not; remove it")
        return Plan(  # its own sampler runs it: nothing is folded
            None, None, len(sampler.times), replace(first, input=1.0), first.output, first.label, family=family
        )
    if sana_sprint:
        return _sprint_plan(denoiser, sampler, first, family)
    whole_map = own_code and sampler.any_steps
    own = (map_settings if whole_map else grid_settings)(denoiser, sampler)
    try:
        stock = _stock_plan(denoiser, sampler, first, classes=classes, family=family)
        if not whole_map:
            return replace(stock, family=family, guidance=guidance)
    except UserError as error:
        fed = {own["start"], *(call["input"] for call in own["levels" if whole_map else "calls"])}
        if (sampler.target_time is not None and len(sampler.times) > 1) or (fed != {1.0} and not family.scales_input):
            raise
        if not own_code:
            raise UserError(f"{error}; or set export.own_code=true, to load it with trust_remote_code=True") from None
    first = replace(first, input=1.0)  # the scheduler scales what the network is fed
    hosts = (ConsistencyModelPipeline, LCMScheduler()) if family is UNET2D else (None, None)
    return Plan(*hosts, len(sampler.times), first, first.output, first.label, own, family, guidance)


def _stock_plan(
    denoiser: Denoiser, sampler: StudentSampler, first: OneStepMap, *, classes: int | None, family: Family
) -> Plan:
    make = _one_step_plan if len(sampler.times) == 1 else _few_step_plan
    scaled = not math.isclose(first.input, 1.0, rel_tol=1e-12)
    if family is UNET2D:
        if scaled and len(sampler.times) == 1:
            _refuse_unscalable(denoiser.network)
        return make(denoiser, sampler, first, classes=classes)
    if scaled:
        raise UserError(f"the input scale cannot be folded into {family.network.__name__}; set method.input=unit")
    if family is DIT and isinstance(denoiser.process, Flow):
        return _class_flow_plan(denoiser, sampler, first)
    if first.label < 1 or abs(first.label - round(first.label)) > 1e-6:
        raise UserError(
            f"the stock scheduler counts its timesteps, this student enters at {first.label:.4g}; choose "
            "method.init_ratio or method.t_max at a whole one"
        )
    return replace(make(denoiser, sampler, first, classes=None), pipeline=None)


def _one_step_plan(denoiser: Denoiser, sampler: StudentSampler, student: OneStepMap, *, classes: int | None) -> Plan:
    nearest = round(student.label)
    label = nearest if nearest >= 1 and math.isclose(nearest, student.label, abs_tol=1e-6) else 1
    output = stock_output(student.direct)
    if abs(student.direct - 1) < 1e-6:  # x0 = noise - output: no DDPM table has alpha = 1, a flow step does this
        if classes is not None:
            raise UserError(
                "no stock pipeline runs a class-conditional flow step from t = 1; set a smaller method.t_max or "
                "method.init_ratio"
            )
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=label, shift=1.0)
        return Plan(DDPMPipeline, flow, 1, student, output, label)
    alpha = 1 / student.direct if student.direct > 1 else student.direct
    scheduler = LCMScheduler(
        num_train_timesteps=label + 1,
        trained_betas=betas(denoiser, label, alpha),
        prediction_type="epsilon" if student.direct > 1 else "v_prediction",
        original_inference_steps=1,
        timestep_scaling=1e10,  # LCM's skip connection vanishes: c_skip < 1e-19
        clip_sample=sampler.clip_sample,
        set_alpha_to_one=True,
        steps_offset=1,  # without a use here, but Stable Diffusion's pipeline calls others outdated
    )
    return Plan(ConsistencyModelPipeline, scheduler, 1, student, output, label)


def _few_step_plan(denoiser: Denoiser, sampler: StudentSampler, first: OneStepMap, *, classes: int | None) -> Plan:
    """Schedulers whose own grid for ``steps`` calls is the sampler's, so that plain lines are right."""
    steps = len(sampler.times)
    refusal = f"no stock scheduler runs this student in {steps} steps"
    if sampler.renoising == "fixed":
        raise UserError(f"{refusal}: it re-uses its first noise; set method.renoising=fresh or ddim")
    if sampler.target_time is not None:
        raise UserError(f"{refusal}: its network is told one target time only")
    if isinstance(denoiser.process, VP):
        scheduler = _table_scheduler(denoiser, sampler, first, refusal)
        return Plan(ConsistencyModelPipeline, scheduler, steps, first, first.output, round(first.label))
    scheduler = _flow_scheduler(denoiser, sampler, refusal)
    if sampler.clip_sample:
        raise UserError(f"{refusal}: that of rectified flow does not clip; set method.clip_sample=false")
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
        "trained_betas": betas(denoiser, label, denoiser.process.alpha(times[:1]).item()),
        "prediction_type": kind,
        "clip_sample": sampler.clip_sample,
        "set_alpha_to_one": True,
        "steps_offset": 1,
    }
    if sampler.renoising == "ddim":
        return DDIMScheduler(**settings, timestep_spacing="trailing")
    if round(labels[-1]) == 0:
        raise UserError(f"{refusal}: LCM's scheduler passes timestep 0 through; set fewer method.steps")
    return LCMScheduler(**settings, original_inference_steps=steps, timestep_scaling=1e10)


def _flow_scheduler(denoiser: Denoiser, sampler: StudentSampler, refusal: str) -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler of rectified flow from pure noise in even steps of sigma."""
    told, steps = denoiser.process.label(torch.tensor(sampler.times[:1])).item(), len(sampler.times)
    # The scheduler counts its timesteps, so the network must be told a whole multiple of sigma.
    counted = told > 1.5 and abs(told - round(told)) < 1e-6
    if not counted or not _evenly_told(denoiser, sampler) or denoiser.target != "flow":
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


def _class_flow_plan(denoiser: Denoiser, sampler: StudentSampler, first: OneStepMap) -> Plan:
    """DiT's pipeline has its scheduler scale the input, which one alone of the flow schedulers can."""
    steps = len(sampler.times)
    if steps > 1 and not (sampler.renoising == "ddim" and _evenly_told(denoiser, sampler)):
        needs = "method.renoising=ddim and a network told a multiple of sigma, from sigma 1 (method.init_ratio=.inf)"
        raise UserError(f"no stock scheduler runs this class-conditional flow in {steps} steps: it takes {needs}")
    if "FlowMapEulerDiscreteScheduler" not in dir(diffusers):
        raise UserError("a class-conditional flow student needs FlowMapEulerDiscreteScheduler; upgrade diffusers")
    label = max(1, round(first.label))
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=label, shift=1.0)
    return Plan(None, scheduler, steps, first, -1.0, label)


def _sprint_plan(denoiser: Denoiser, sampler: StudentSampler, first: OneStepMap, family: Family) -> Plan:
    """SCM's angles in equal parts are sigma 1 and, of two, 1/2; the pipeline tells the network sigma itself."""
    steps, told = len(sampler.times), first.label * _config(denoiser.network).get("timestep_scale", math.nan)
    if family is not SANA:
        raise UserError("export.sana_sprint is for students of Sana; remove it")
    if steps > 2 or not _evenly_told(denoiser, sampler) or (steps == 2 and sampler.renoising != "fresh"):
        raise UserError(
            "export.sana_sprint: its scheduler runs one step from sigma 1, or two with new noise at sigma 1/2; set "
            "method.init_ratio (start_ratio, t_max) to pure noise, method.steps to 1 or 2 and renoising=fresh, or "
            "remove it"
        )
    if not math.isclose(first.input, 1.0, rel_tol=1e-12):
        raise UserError("export.sana_sprint: the pipeline feeds the noise itself; set method.input=unit, or remove it")
    if steps == 2 and not math.isclose(told, 1.0, rel_tol=1e-6):
        raise UserError(
            f"export.sana_sprint: its pipeline tells the network sigma, this one was told {told:g} sigma, which can be "
            "folded in for one step only; take a teacher whose timestep_scale is 0.001, method.steps=1, or remove it"
        )
    return Plan(SanaSprintPipeline, SCMScheduler(), steps, replace(first, label=told), -1.0, 1.0, family=SPRINT)


def _config(network: nn.Module) -> Any:  # noqa: ANN401
    """The settings of a stock network, also of a wrapped one."""
    stock: Any = network.network if isinstance(network, Conditioned) else network
    return stock.config


def _evenly_told(denoiser: Denoiser, sampler: StudentSampler) -> bool:
    """Whether a flow is entered at sigma 1 and left in even steps, and the network told a multiple of sigma."""
    process, steps = denoiser.process, len(sampler.times)
    levels = process.sigma(torch.tensor(sampler.times, dtype=torch.float64)).tolist()
    even = all(math.isclose(level, 1 - k / steps, rel_tol=1e-9) for k, level in enumerate(levels))
    return even and isinstance(process, Flow) and not process.reversed_label


def _refuse_unscalable(network: nn.Module) -> None:
    config = _config(network)
    if config["center_input_sample"] or any("Skip" in block for block in config["down_block_types"]):
        raise UserError(
            "this UNet uses its input beside the first convolution (center_input_sample or Skip blocks), so the "
            "input scale cannot be folded; set method.input=unit"
        )
