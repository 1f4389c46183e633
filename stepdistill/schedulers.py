"""Reads diffusers scheduler settings: which noise process, and what the network beside it predicts."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .denoiser import Target
from .errors import UserError
from .process import VE, VP, Flow, NoiseProcess

TABLE = (
    DDPMScheduler,
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
SUPPORTED = (*TABLE, *EDM, FlowMatchEulerDiscreteScheduler, CMStochasticIterativeScheduler)

_TARGETS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Reading(TypedDict):
    """The fields of a ``Denoiser`` that a scheduler determines."""

    native: NoiseProcess
    target: Target
    negated: bool
    sigma_data: float
    sigma_boundary: float


def read_scheduler(scheduler: SchedulerMixin, *, tokens: int | None = None) -> Reading:
    """Process and prediction type of a diffusers scheduler.

    Args:
        scheduler: any of ``SUPPORTED``; DDPM-family tables are taken from the scheduler itself, so every beta
            schedule and the zero-terminal-SNR rescaling are read exactly.
        tokens: image sequence length, needed where a flow scheduler shifts dynamically.

    Raises:
        UserError: a scheduler or a setting that is not supported.
    """
    if not isinstance(scheduler, SUPPORTED):
        known = ", ".join(sorted(kind.__name__ for kind in SUPPORTED))
        raise UserError(f"scheduler {type(scheduler).__name__} is not supported; supported are {known}")
    config: dict[str, Any] = dict(scheduler.config)
    if flow := _flow(scheduler, config, tokens):
        return _reading(flow, "flow", negated=flow.reversed_label)
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        process = VE(max(config["sigma_min"], 1e-3), config["sigma_max"], config["rho"], label_scale=250.0)
        target: Target = "consistency" if config["sigma_min"] > 0 else "edm"
        return _reading(process, target, sigma_data=config["sigma_data"], sigma_boundary=config["sigma_min"])
    prediction = config["prediction_type"]
    if isinstance(scheduler, EDM):
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"an EDM scheduler with prediction_type {prediction!r} is not supported")
        process = VE(config["sigma_min"], config["sigma_max"], config["rho"])
        negated = prediction == "v_prediction"
        return _reading(process, "edm", negated=negated, sigma_data=config["sigma_data"])
    if prediction not in _TARGETS:
        raise UserError(f"prediction_type must be one of {', '.join(_TARGETS)}, got {prediction!r}")
    if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        raise UserError(f"{type(scheduler).__name__} with timestep_type=continuous is not supported; use EDMEuler")
    if config.get("use_flow_sigmas"):
        raise UserError(f"{type(scheduler).__name__} with use_flow_sigmas=true is not supported; use FlowMatchEuler")
    alphas_cumprod: torch.Tensor = scheduler.alphas_cumprod
    return _reading(VP(alphas_cumprod.double()), _TARGETS[prediction])


def _flow(scheduler: SchedulerMixin, config: dict[str, Any], tokens: int | None) -> Flow | None:
    """Rectified flow, of its own scheduler or of a DPM-Solver told so (Sana's); ``None`` for everything else."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        inverted = config["invert_sigmas"]  # time runs from noise to data, and the velocity with it (SiT)
        return Flow(_flow_shift(config, tokens), config["num_train_timesteps"], reversed_label=inverted)
    if config.get("use_flow_sigmas") and config["prediction_type"] == "flow_prediction":
        return Flow(config["flow_shift"], label_scale=config["num_train_timesteps"])
    return None


def _flow_shift(config: dict[str, Any], tokens: int | None) -> float:
    """The constant ``shift``, or ``exp(mu)`` / ``mu`` with ``mu`` linear in the sequence length (SD3, Flux)."""
    if not config["use_dynamic_shifting"]:
        return config["shift"]
    if tokens is None:
        raise UserError("this scheduler shifts by image size (use_dynamic_shifting); the sequence length is needed")
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = torch.tensor(config["base_shift"] + slope * (tokens - low), dtype=torch.float64)
    return mu.exp().item() if config["time_shift_type"] == "exponential" else mu.item()


def _reading(
    process: NoiseProcess,
    target: Target,
    *,
    negated: bool = False,
    sigma_data: float = 0.5,
    sigma_boundary: float = 0.0,
) -> Reading:
    return Reading(native=process, target=target, negated=negated, sigma_data=sigma_data, sigma_boundary=sigma_boundary)
