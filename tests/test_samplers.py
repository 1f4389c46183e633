"""Samplers against diffusers' own on the same network, against closed forms, and against hand-written loops."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import tiny_unet
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from oracles import PROCESSES, cubature, flow_map, gaussian
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.backbones import unet2d
from stepdistill.denoiser import Denoiser, Guidance, Target
from stepdistill.process import VP, Flow, Trig
from stepdistill.samplers import (
    SampleNoise,
    Solver,
    StudentSampler,
    ode_steps,
    sample_ode,
    teacher_grid,
)
from stepdistill.schedulers import read_scheduler

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SOLVERS: tuple[Solver, ...] = ("euler", "heun", "dpmpp_2m")
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def noise(batch=2):
    return SampleNoise(range(batch), (1, 8, 8))()


@pytest.fixture(scope="module")
def network():
    return tiny_unet().requires_grad_(False)


def theirs(scheduler, network, x: Tensor) -> Tensor:
    """Diffusers' own loop from state ``x`` in the scheduler's coordinates."""
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(model_input, t.float(), return_dict=False)[0], t, x, return_dict=False)[0]
    return x


def last(steps) -> Tensor:
    return list(steps)[-1].x


def table_denoiser(scheduler, network) -> Denoiser:
    """The denoiser of a DDPM-family scheduler, Heun's included, which teachers do not come with."""
    target = PREDICTIONS[scheduler.config.prediction_type]
    return Denoiser(network, VP(scheduler.alphas_cumprod.double()), target, unet2d.call)


def times_of(scheduler, process) -> list[float]:
    """The distinct times of a scheduler; Heun's lists every one but the first twice."""
    return sorted(process.time_of_label(scheduler.timesteps.unique().double()).tolist(), reverse=True)


def same_images(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("to_one", [True, False])
def test_euler_is_the_ddim_of_diffusers(network, prediction, spacing, steps, to_one):
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=to_one,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    denoiser = table_denoiser(scheduler, network)
    grid = times_of(scheduler, denoiser.process)
    ours = last(ode_steps(denoiser, noise(), grid, end=None if to_one else 0.0))
    same_images(ours, theirs(scheduler, network, noise()))
    if spacing == "trailing" and to_one:
        same_images(sample_ode(denoiser, noise(), steps), ours)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 300, 999, 1000])
@pytest.mark.parametrize("entries", [1000, 50])
def test_teacher_grid_of_a_table_is_the_trailing_spacing_of_ddim(entries, steps):
    scheduler = DDIMScheduler(num_train_timesteps=entries, timestep_spacing="trailing")
    process = VP(scheduler.alphas_cumprod)
    if steps > entries:
        with pytest.raises(ValueError, match="50 entries"):
            teacher_grid(process, steps)
        return
    scheduler.set_timesteps(steps)
    labels = process.label(torch.tensor(teacher_grid(process, steps), dtype=torch.float64))
    torch.testing.assert_close(labels, scheduler.timesteps.double(), rtol=1e-12, atol=1e-10)


@every_process
def test_a_grid_needs_a_step_and_starts_at_pure_noise(process):
    with pytest.raises(ValueError, match="at least 1"):
        teacher_grid(process, 0)
    grid = teacher_grid(process, 4)
    assert grid[0] == 1.0
    assert len(grid) == 4
    assert all(later < earlier for earlier, later in pairwise(grid))


@every_prediction
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (10, {}),  # linspace over 0..999 has integer labels for ten steps
        (8, {"timestep_spacing": "trailing"}),
        (8, {"timestep_spacing": "leading", "steps_offset": 1}),
        (9, {"use_karras_sigmas": True}),
        (8, {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_euler_is_that_of_diffusers(network, prediction, steps, settings):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type=prediction, **settings)
    scheduler.set_timesteps(steps)
    denoiser = table_denoiser(scheduler, network)
    grid = times_of(scheduler, denoiser.process)
    end = 0.0 if "final_sigmas_type" in settings else None
    start, final = (denoiser.process.alpha(torch.tensor(t)).item() for t in (grid[0], 0.0))
    expected = theirs(scheduler, network, noise() / start)  # their states are x / alpha
    same_images(last(ode_steps(denoiser, noise(), grid, end=end)), expected if end is None else final * expected)


@every_prediction
@pytest.mark.parametrize(
    ("steps", "settings"), [(10, {}), (1, {}), (5, {"timestep_spacing": "trailing"}), (6, {"use_karras_sigmas": True})]
)
def test_heun_is_that_of_diffusers(network, prediction, steps, settings):
    scheduler = HeunDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, **{"timestep_spacing": "linspace", **settings}
    )
    scheduler.set_timesteps(steps)
    denoiser = table_denoiser(scheduler, network)
    grid = times_of(scheduler, denoiser.process)
    assert len(grid) == steps
    start = denoiser.process.alpha(torch.tensor(grid[0])).item()
    expected = theirs(scheduler, network, noise() / start)
    same_images(last(ode_steps(denoiser, noise(), grid, solver="heun")), expected)


@every_prediction
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp_2m_is_that_of_diffusers(network, prediction, steps, final):
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, prediction_type=prediction, final_sigmas_type=final)
    scheduler.set_timesteps(steps)
    denoiser = table_denoiser(scheduler, network)
    grid, end = times_of(scheduler, denoiser.process), None if final == "zero" else 0.0
    ours = last(ode_steps(denoiser, noise(), grid, solver="dpmpp_2m", end=end))
    same_images(ours, theirs(scheduler, network, noise()))


@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize(
    ("kind", "solver"), [(EDMEulerScheduler, "euler"), (EDMDPMSolverMultistepScheduler, "dpmpp_2m")]
)
def test_solvers_on_the_karras_ramp_are_those_of_edm_schedulers(network, kind, solver, steps):
    scheduler = kind(sigma_max=8.0, sigma_min=0.02)
    scheduler.set_timesteps(steps)
    denoiser = Denoiser(network, call=unet2d.call, **read_scheduler(scheduler))
    expected = theirs(scheduler, network, scheduler.sigmas[0] * noise())
    same_images(sample_ode(denoiser, noise(), steps, solver=solver), expected)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"invert_sigmas": True, "num_train_timesteps": 1},  # SiT
        {"invert_sigmas": True, "shift": 3.0},
        {"num_train_timesteps": 1},  # REPA
    ],
)
def test_euler_is_the_flow_matching_of_diffusers(network, steps, settings):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    mu = 0.5 if settings.get("use_dynamic_shifting") else None  # that of an image of 256 tokens
    denoiser = Denoiser(network, call=unet2d.call, **read_scheduler(scheduler, tokens=256))
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=mu)
    same_images(sample_ode(denoiser, noise(), steps), theirs(scheduler, network, noise()))
    if scheduler.config["num_train_timesteps"] == 1:
        return
    scheduler.set_timesteps(steps + 1, mu=mu)  # its default grid ends at 1 / 1000 before the shift
    ours = last(ode_steps(denoiser, noise(), times_of(scheduler, denoiser.process)))
    same_images(ours, theirs(scheduler, network, noise()))


def error(process, solver, steps, start=0.9, end=0.1):
    """Largest distance to the closed-form map of a Gaussian law after ``steps`` uniform steps in log-SNR."""
    law, x = gaussian(MEAN, COV), cubature(2)
    ends = process.log_snr(torch.tensor([start, end]))
    levels = torch.linspace(ends[0].item(), ends[1].item(), steps + 1, dtype=torch.float64)
    *times, final = process.time_at_log_snr(levels).tolist()
    exact = flow_map(law, process, x, torch.full((4,), start).double(), torch.full((4,), end).double())
    return (last(ode_steps(law.denoiser(process), x, times, solver=solver, end=final)) - exact).abs().max().item()


@every_process
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_at_their_order(process, solver, order):
    coarse, fine = error(process, solver, 40), error(process, solver, 80)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("process", [Flow(), Trig(), VP(torch.tensor([0.999, 0.98, 0.9, 0.7, 0.4, 0.1, 0.01, 0.0]))])
def test_second_order_solvers_beat_euler_from_pure_noise(process):
    law, x = gaussian(MEAN, COV), cubature(2)
    denoiser = law.denoiser(process, "v")
    exact = flow_map(law, process, x, torch.ones(4).double(), torch.zeros(4).double())
    errors = {solver: (sample_ode(denoiser, x, 8, solver=solver) - exact).abs().max().item() for solver in SOLVERS}
    assert max(errors["heun"], errors["dpmpp_2m"]) < errors["euler"]


@every_process
@every_solver
def test_captured_trajectory_links_every_state_to_its_prediction(process, solver):
    times, x = [0.9, 0.6, 0.4, 0.2], cubature(2)
    denoiser = gaussian(MEAN, COV).denoiser(process)
    steps = list(ode_steps(denoiser, x, times, solver=solver))
    states = [x, *(step.x for step in steps)]
    for k, (step, time) in enumerate(zip(steps, times, strict=True)):
        prediction = step.prediction
        assert torch.equal(prediction.x_t, states[k])
        assert prediction.t.tolist() == [time] * len(x)
        together = process.add_noise(prediction.x0, prediction.eps, prediction.t)
        torch.testing.assert_close(together, states[k], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[-1], steps[-1].prediction.x0)  # the last step ends at the clean sample
    first = last(ode_steps(denoiser, x, times[:1], end=times[1]))
    if solver != "heun":
        torch.testing.assert_close(states[1], first)
    half = list(ode_steps(denoiser, states[2], times[2:], solver="euler"))
    if solver == "euler":
        torch.testing.assert_close(half[-1].x, states[-1])


@every_process
def test_sampling_starts_from_the_prior_of_the_process(process):
    denoiser, z = gaussian(MEAN, COV).denoiser(process), cubature(2)
    step = next(ode_steps(denoiser, process.prior_scale * z, teacher_grid(process, 3)))
    captured = []
    watched = Denoiser(denoiser.network, process, "x0", lambda net, x, label, cond: captured.append(x) or net(x, label))
    sample_ode(watched, z, 3)
    torch.testing.assert_close(captured[0], step.prediction.x_t)
    assert len(captured) == 3


def test_noise_of_a_sample_is_the_same_in_every_batch():
    shape = (1, 4, 4)
    together = SampleNoise(range(6), shape)
    first, second = together(), together()
    for ids in ([0, 1, 2, 3, 4, 5], [5, 2], [3], [4, 0, 1]):
        source = SampleNoise(ids, shape)
        assert torch.equal(source(), first[ids])
        assert torch.equal(source(), second[ids])
    shards = [SampleNoise(range(rank, 6, 2), shape)() for rank in range(2)]
    assert torch.equal(torch.stack(shards, 1).flatten(0, 1), first)


@pytest.mark.parametrize("k", [0, 7, 123_456])
def test_noise_of_seed_zero_is_what_a_pipeline_draws_for_the_id(k):
    generator, source = torch.Generator().manual_seed(k), SampleNoise([k], (1, 8, 8))
    for _ in range(2):
        assert torch.equal(source(), torch.randn((1, 1, 8, 8), generator=generator))


def test_noise_of_different_ids_and_seeds_is_independent():
    draws = torch.cat([SampleNoise(range(8), (1, 32, 32), seed=seed)() for seed in (0, 1, 2, 2**32 - 1)]).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 32  # six standard errors of 32 * 32 draws


@every_process
@pytest.mark.parametrize("scale", ["unit", "sigma"])
def test_one_step_student_is_the_denoiser_of_its_scaled_noise(process, scale):
    denoiser, z, t = gaussian(MEAN, COV).denoiser(process), cubature(2), torch.full((4,), 0.7, dtype=torch.float64)
    fed = z if scale == "unit" else process.sigma(t)[:, None] * z
    expected = denoiser(fed, t).x0
    torch.testing.assert_close(StudentSampler((0.7,), scale)(denoiser, z), expected, rtol=1e-12, atol=1e-12)


@every_process
def test_few_step_student_renoises_with_fresh_noise(process):
    denoiser, ids, shape = gaussian(MEAN, COV).denoiser(process), [4, 1, 3], (2,)
    source = SampleNoise(ids, shape)
    images = StudentSampler((0.9, 0.6, 0.3))(denoiser, source().double(), renoise=lambda: source().double())

    generators = [torch.Generator().manual_seed(k) for k in ids]
    draws = [torch.stack([torch.randn(2, generator=g) for g in generators]).double() for _ in range(3)]
    x0 = torch.zeros(3, 2, dtype=torch.float64)  # the first input, sigma times noise, is a clean zero made noisy
    for time, eps in zip((0.9, 0.6, 0.3), draws, strict=True):
        t = torch.tensor(time, dtype=torch.float64)
        alpha = 0.0 if time == 0.9 else process.alpha(t)
        x0 = denoiser(alpha * x0 + process.sigma(t) * eps, t.expand(3)).x0
    torch.testing.assert_close(images, x0, rtol=1e-12, atol=1e-12)


def test_few_step_student_draws_its_own_noise_when_given_none():
    denoiser, z = gaussian(MEAN, COV).denoiser(Flow()), cubature(2)
    torch.manual_seed(3)
    images = StudentSampler((0.9, 0.5))(denoiser, z)
    torch.manual_seed(3)
    torch.testing.assert_close(StudentSampler((0.9, 0.5))(denoiser, z, renoise=lambda: torch.randn_like(z)), images)
    assert not torch.equal(StudentSampler((0.9, 0.5))(denoiser, z), images)


def test_a_student_with_two_times_is_told_the_label_of_the_target_time():
    told = []
    denoiser = Denoiser(nn.Identity(), Flow(), "x0", lambda net, x, label, cond: told.append(cond) or x)
    cond = {"class_labels": torch.tensor([3, 1])}
    StudentSampler((1.0,), target_time=0.25)(denoiser, torch.zeros(2, 1), cond)
    assert torch.equal(told[0]["class_labels"], cond["class_labels"])
    torch.testing.assert_close(told[0]["target_label"], torch.tensor([250.0] * 2, dtype=torch.float64))
    StudentSampler((1.0,))(denoiser, torch.zeros(2, 1), cond)
    assert set(told[1]) == {"class_labels"}


class NoCopies(TorchDispatchMode):
    """Refuses operators that move a tensor between devices or read a value back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {tensor.device for tensor in (*args, result) if isinstance(tensor, Tensor) and tensor.ndim > 0}
        assert len(devices) < 2, f"{func} moves data between devices"
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back"
        return result


class NoNewConstants(TorchFunctionMode):
    """Refuses calls that build a tensor from Python numbers, which a device would have to wait for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


class Watch:
    """A network call that lets nothing wait for the device from its first use on."""

    def __init__(self):
        self.calls, self.modes = 0, (NoCopies(), NoNewConstants())

    def __call__(self, network, x, label, cond):
        self.calls += 1
        if self.calls == 1:
            for mode in self.modes:
                mode.__enter__()
        return x * label.to(x.dtype)[:, None]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for mode in reversed(self.modes[: 2 * min(self.calls, 1)]):
            mode.__exit__(None, None, None)


VIEWS = {"native": None, "viewed": Trig()}
META = torch.device("meta")
"""A device without values: reading one back, or branching on one, is an error."""


@every_process
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(("target", "guidance"), [("flow", None), ("edm", 2.0)])
def test_no_sampler_waits_for_the_device_between_network_calls(process, view, guidance, target):
    cond = {"c": torch.zeros(2, 1, device=META)}
    scale = None if guidance is None else Guidance(guidance, {"c": torch.zeros(1, 1, device=META)}, (0.2, 0.8))
    x = torch.zeros(2, 3, device=META)
    for run in (
        lambda d: last(ode_steps(d, x, [1.0, 0.7, 0.4], cond, solver="heun")),
        lambda d: last(ode_steps(d, x, [1.0, 0.7, 0.4], cond, solver="dpmpp_2m")),
        lambda d: StudentSampler((1.0, 0.5, 0.2))(d, x, cond),
    ):
        with Watch() as watch:
            result = run(Denoiser(nn.Identity(), process, target, watch, guidance=scale, view=view))
        assert result.device == META
        assert watch.calls >= 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.to("cpu"),
        lambda x: torch.ones(3).to(META),
        lambda x: torch.as_tensor(2.0, device=META),
        lambda x: x[x > 0],
    ],
)
def test_the_watch_notices_what_makes_a_host_wait(wait):
    with Watch() as watch:
        x = watch(None, torch.zeros(2, 3, device=META), torch.zeros(2, device=META), {})
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wait(x)


def test_gradients_flow_through_the_steps_of_a_solver():
    law, process = gaussian(MEAN, COV), Flow()
    x = cubature(2).requires_grad_()
    run = lambda x: last(ode_steps(law.denoiser(process), x, [0.9, 0.6, 0.3], solver="dpmpp_2m"))  # noqa: E731
    assert torch.autograd.gradcheck(run, x)
