"""What is read from a diffusers scheduler, against what that scheduler itself computes."""

from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
)
from oracles import call
from torch import nn

from stepdistill.denoiser import Denoiser, Target
from stepdistill.errors import UserError
from stepdistill.process import Flow
from stepdistill.samplers import teacher_grid
from stepdistill.schedulers import EDM, SUPPORTED, TABLE, read_scheduler

BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"num_train_timesteps": 50, "trained_betas": torch.linspace(0.02, 0.4, 50).square().tolist()},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
PREDICTIONS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Wave(nn.Module):
    """A network that depends on both of its inputs."""

    def forward(self, x, label):
        return torch.sin(3 * x) + 0.1 * torch.cos(label.to(x.dtype)).reshape(-1, 1, 1, 1)


def noisy(scale=1.0):
    return scale * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def reader(scheduler):
    return Denoiser(Wave(), call=call, **read_scheduler(scheduler))


def at(scheduler, k, process):
    """The ``k``-th time of a scheduler for a batch of two."""
    return process.time_of_label(scheduler.timesteps[k].double()).expand(2)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", TABLE)
def test_every_table_scheduler_adds_the_noise_that_was_read(kind, betas):
    known = signature(kind).parameters
    if not BETAS[betas].keys() <= known.keys():
        pytest.skip("it has no zero-SNR tables")
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in known else {}  # integer labels
    scheduler: Any = kind(**BETAS[betas], **spacing)
    process = read_scheduler(scheduler)["native"]
    table = scheduler.alphas_cumprod.double()
    t = process.time_of_label(torch.arange(len(table)))
    torch.testing.assert_close(process.alpha(t), table.sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.sigma(t), (1 - table).sqrt(), rtol=1e-12, atol=1e-12)

    scheduler.set_timesteps(5)
    if kind in (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler):
        return  # their grids have timesteps twice, or between those of the table
    labels = scheduler.timesteps[[1, 3]]
    t = process.time_of_label(labels)
    x0, eps = noisy(), noisy().flip(0)
    added = scheduler.add_noise(x0, eps, labels)
    if kind in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler):  # states are x / alpha
        added = process.coefficients(t, added)[0] * added
    torch.testing.assert_close(process.add_noise(x0, eps, t), added, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler])
def test_sigmas_of_table_schedulers_are_noise_over_signal(kind):
    scheduler: Any = kind(**BETAS["scaled_linear"], timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    process = read_scheduler(scheduler)["native"]
    t = process.time_of_label(scheduler.timesteps)
    rho = process.sigma(t) / process.alpha(t)
    torch.testing.assert_close(rho, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_karras_sigmas_of_euler_lie_between_entries_as_they_do_here():
    scheduler = EulerDiscreteScheduler(**BETAS["scaled_linear"], use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    process = read_scheduler(scheduler)["native"]
    t = process.time_of_label(scheduler.timesteps)
    assert not bool((scheduler.timesteps[1:-1] == scheduler.timesteps[1:-1].round()).any())
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)


def test_half_way_label_of_stable_diffusion_is_the_published_noise_level():
    process = read_scheduler(DDPMScheduler(**BETAS["scaled_linear"]))["native"]
    t = process.time_of_label(torch.tensor([625.0]))
    rho = (process.sigma(t) / process.alpha(t)).item()
    signal = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)[625]
    assert rho == pytest.approx(((1 - signal) / signal).sqrt().item(), rel=1e-5)
    assert rho == pytest.approx(2.5017, abs=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_table_schedulers_read_the_network_output_alike(kind, prediction):
    scheduler: Any = kind(**BETAS["scaled_linear"], prediction_type=prediction, timestep_spacing="trailing")
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(5)
    denoiser, x, label = reader(scheduler), noisy(), scheduler.timesteps[2]
    assert denoiser.target == PREDICTIONS[prediction]
    t = at(scheduler, 2, denoiser.process)
    state = x / denoiser.process.coefficients(t, x)[0] if kind is EulerDiscreteScheduler else x
    x0 = scheduler.step(Wave()(x, label), label, state).pred_original_sample
    torch.testing.assert_close(denoiser(x, t).x0, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("kind", EDM)
def test_edm_schedulers_precondition_as_they_are_read(kind, schedule, prediction):
    scheduler: Any = kind(
        sigma_min=0.01, sigma_max=30, sigma_data=0.7, sigma_schedule=schedule, prediction_type=prediction
    )
    scheduler.set_timesteps(6)
    denoiser = reader(scheduler)
    assert denoiser.negated == (prediction == "v_prediction")
    for k, sigma in enumerate(scheduler.sigmas[:-1]):
        t, x = at(scheduler, k, denoiser.process), noisy(sigma)
        torch.testing.assert_close(denoiser.process.sigma(t).float(), sigma.expand(2), rtol=1e-5, atol=0)
        label = scheduler.precondition_noise(sigma)
        torch.testing.assert_close(denoiser.process.label(t).float(), label.expand(2), rtol=1e-5, atol=1e-5)
        output = Wave()(scheduler.precondition_inputs(x, sigma), label)
        expected = scheduler.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(denoiser(x, t).x0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EDM)
def test_teacher_grid_is_the_ramp_of_edm_schedulers(kind):
    scheduler: Any = kind(sigma_min=0.01, sigma_max=30)
    scheduler.set_timesteps(7)
    process = read_scheduler(scheduler)["native"]
    grid = process.sigma(torch.tensor(teacher_grid(process, 7)))
    torch.testing.assert_close(grid, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])  # the ends and the middle
def test_dynamic_shift_is_that_of_the_image_size(kind, tokens, mu):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    process = read_scheduler(scheduler, tokens=tokens)["native"]
    grid = torch.tensor(teacher_grid(process, 4), dtype=torch.float64)
    torch.testing.assert_close(process.sigma(grid), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.label(grid), scheduler.timesteps.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entries", [1000, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_static_shift_and_labels_are_those_of_the_flow_scheduler(shift, entries):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=entries, shift=shift)
    reading = read_scheduler(scheduler)
    process = reading["native"]
    assert reading["target"] == "flow"
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    grid = torch.tensor(teacher_grid(process, 4), dtype=torch.float64)
    torch.testing.assert_close(process.sigma(grid), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.label(grid), scheduler.timesteps.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
def test_consistency_scheduler_scales_as_it_is_read(sigma_min):
    scheduler: Any = CMStochasticIterativeScheduler(sigma_min=sigma_min, sigma_max=2.5, clip_denoised=False)
    scheduler.set_timesteps(1)
    denoiser, x, label = reader(scheduler), noisy(2.5), scheduler.timesteps[0]
    t = torch.ones(2)
    torch.testing.assert_close(denoiser.process.label(t), label.expand(2))
    x0 = scheduler.step(Wave()(scheduler.scale_model_input(x, label), label), label, x).prev_sample
    torch.testing.assert_close(denoiser(x, t).x0, x0, rtol=1e-5, atol=1e-5)


def test_consistency_network_is_the_identity_at_its_boundary():
    denoiser, x = reader(CMStochasticIterativeScheduler(sigma_min=0.05)), noisy()
    torch.testing.assert_close(denoiser(x, torch.zeros(2)).x0, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [diffusers.RePaintScheduler, diffusers.UnCLIPScheduler])
def test_an_unsupported_scheduler_is_refused_with_the_list(kind):
    with pytest.raises(UserError) as refusal:
        read_scheduler(kind())
    assert all(name in str(refusal.value) for name in [kind.__name__, *(known.__name__ for known in SUPPORTED)])


def test_a_solver_told_to_follow_a_flow_is_one():
    """Sana's own scheduler."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    reading = read_scheduler(scheduler)
    assert (reading["native"], reading["target"]) == (Flow(3.0, label_scale=1000), "flow")
    scheduler.set_timesteps(4)
    sigmas = reading["native"].sigma(reading["native"].time_of_label(scheduler.timesteps.double()))
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1].double(), atol=2e-3, rtol=0)  # timesteps are whole


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (LCMScheduler(prediction_type="original"), "prediction_type"),
        (EDMDPMSolverMultistepScheduler(prediction_type="sample"), "prediction_type"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type"),
        (EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"), "timestep_type"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(scheduler, names):
    with pytest.raises(UserError, match=names):
        read_scheduler(scheduler)
