"""Noise processes against diffusers' tables, automatic differentiation and their own inverses."""

import math
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.process import VE, VP, Flow, NoiseProcess, Trig

TABLES = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "trained_betas": DDPMScheduler(trained_betas=torch.linspace(0.01, 0.3, 20).square().tolist()),
    "zero_snr": DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
}
TABLE_PROCESSES = {name: VP(scheduler.alphas_cumprod) for name, scheduler in TABLES.items()}
PROCESSES: dict[str, NoiseProcess] = {
    **TABLE_PROCESSES,
    "flow": Flow(),
    "flow_shift_3": Flow(shift=3.0),
    "sit": Flow(shift=3.0, label_scale=1.0, reversed_label=True),
    "ve": VE(),
    "ve_consistency": VE(label_scale=250.0),
    "trig": Trig(),
    "trig_half": Trig(noise_std=0.5),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_table = pytest.mark.parametrize("name", TABLES)

INSIDE = torch.linspace(0.003, 0.997, 241, dtype=torch.float64)
"""Times off the entries of every table above, where coefficients are smooth."""


def exactly(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_table
def test_vp_equals_the_diffusers_table_at_integer_labels(name):
    table, process = TABLES[name].alphas_cumprod.double(), TABLE_PROCESSES[name]
    t = process.time_of_label(torch.arange(len(table)))
    exactly(process.alpha(t), table.sqrt())
    exactly(process.sigma(t), (1 - table).sqrt())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_equals_the_diffusers_table(shift):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    process, unshifted = Flow(shift), torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    exactly(process.sigma(unshifted), scheduler.sigmas.double(), 1e-7)  # diffusers keeps this table in float32
    exactly(process.label(unshifted), scheduler.timesteps.double(), 1e-4)  # ... up to 1000
    exactly(process.sigma(process.time_of_label(torch.arange(1001))), torch.arange(1001).double() / 1000)
    exactly(process.alpha(unshifted) + process.sigma(unshifted), torch.ones(1000, dtype=torch.float64))


def test_reversed_label_counts_from_noise_to_data():
    data_to_noise = Flow(shift=3.0, label_scale=1.0).label(INSIDE)
    exactly(PROCESSES["sit"].label(INSIDE), 1 - data_to_noise)


def test_ve_equals_the_ramp_and_labels_of_consistency_models():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    ramp = torch.linspace(1, 0, 40, dtype=torch.float64)
    torch.testing.assert_close(VE().sigma(ramp), scheduler.sigmas, rtol=1e-12, atol=0)
    exactly(VE(label_scale=250.0).label(ramp), scheduler.timesteps, 1e-10)
    exactly(VE().alpha(ramp), torch.ones(40, dtype=torch.float64))


def test_ve_level_of_time_0_8_is_the_published_one():
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = VE().sigma(torch.tensor(0.8)).item()
    assert sigma == pytest.approx((low + 0.8 * (high - low)) ** 7, rel=1e-6)
    assert sigma == pytest.approx(24.408, abs=1e-3)


@pytest.mark.parametrize("noise_std", [1.0, 0.5])
def test_trig_is_a_rotation_by_a_quarter_turn(noise_std):
    process, angle = Trig(noise_std), INSIDE * math.pi / 2
    exactly(torch.atan2(process.sigma(INSIDE) / noise_std, process.alpha(INSIDE)), angle)
    exactly(process.alpha(INSIDE).square() + (process.sigma(INSIDE) / noise_std).square(), torch.ones_like(INSIDE))
    exactly(process.label(INSIDE), angle)


@every_process
def test_signal_falls_and_noise_rises(process):
    assert bool((process.alpha(INSIDE).diff() <= 0).all())
    assert bool((process.sigma(INSIDE).diff() > 0).all())
    assert bool((process.log_snr(INSIDE).diff() < 0).all())


def test_a_flow_snaps_to_whole_labels_where_it_counts_them():
    t = torch.tensor([0.2, 0.71428, 1.0], dtype=torch.float64)
    for process in (Flow(), Flow(shift=3.0), Flow(reversed_label=True)):
        exactly(process.label(process.snap(t)), process.label(t).round(), 1e-9)
    assert torch.equal(Flow(label_scale=1.0).snap(t), t)


@every_process
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_slopes_equal_automatic_differentiation(process, name):
    t = INSIDE.clone().requires_grad_()
    value = getattr(process, name)(t)
    expected = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
    torch.testing.assert_close(getattr(process, f"{name}_slope")(INSIDE), expected, rtol=1e-10, atol=1e-10)


@every_process
def test_log_snr_is_that_of_the_coefficients_and_its_inverse_returns_the_time(process):
    direct = 2 * (process.alpha(INSIDE) / process.sigma(INSIDE)).log()
    exactly(process.log_snr(INSIDE), direct, 1e-10)
    exactly(process.time_at_log_snr(process.log_snr(INSIDE)), INSIDE, 1e-10)
    exactly(process.log_snr(process.time_at_log_snr(direct)), direct, 1e-10)


@every_process
def test_time_at_log_snr_stays_between_data_and_noise(process):
    ends = process.time_at_log_snr(torch.tensor([1e4, -1e4]))
    exactly(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


@every_process
def test_label_and_time_are_inverses(process):
    t = torch.cat([INSIDE, torch.tensor([0.0, 1.0])])
    exactly(process.time_of_label(process.label(t)), t, 1e-10)
    exactly(process.label(process.time_of_label(process.label(t))), process.label(t), 1e-10)


@every_table
def test_vp_is_linear_in_log_snr_between_entries(name):
    process, entries = TABLE_PROCESSES[name], len(TABLES[name].alphas_cumprod)
    i, inside = torch.arange(entries - 1), torch.linspace(0.1, 0.9, 5)[:, None]
    left, right = process.log_snr(process.time_of_label(i)), process.log_snr(process.time_of_label(i + 1))
    between = process.time_of_label(i + inside.double())
    exactly(process.log_snr(between), left + inside.double() * (right - left), 1e-10)
    exactly(process.alpha(between).square() + process.sigma(between).square(), torch.ones_like(between))


@every_table
def test_vp_snaps_to_the_nearest_entry(name):
    process, last = TABLE_PROCESSES[name], len(TABLES[name].alphas_cumprod) - 1
    nearest = torch.tensor([0, 0, 1, 1, last, last], dtype=torch.float64)
    snapped = process.snap(process.time_of_label(torch.tensor([0, 0.4, 0.6, 1.4, last - 0.4, last])))
    exactly(process.label(snapped), nearest, 1e-10)


@pytest.mark.parametrize("process", [Flow(3.0, label_scale=1.0), VE(), Trig()])
def test_continuous_times_are_not_snapped(process):
    assert torch.equal(process.snap(INSIDE), INSIDE)


@every_process
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_are_float64_whatever_the_time_is_stored_in(process, dtype):
    t = torch.tensor([0.25, 0.75], dtype=dtype)  # exact in every one of them
    maps = [process.alpha, process.sigma, process.alpha_slope, process.sigma_slope, process.log_snr]
    for evaluate in [*maps, process.label, process.time_of_label, process.time_at_log_snr, process.snap]:
        assert evaluate(t).dtype == torch.float64
        exactly(evaluate(t), evaluate(t.double()))


@every_process
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
def test_noise_is_added_sample_by_sample(process, shape):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    rows = [process.alpha(time) * x + process.sigma(time) * e for time, x, e in zip(t, x0, eps, strict=True)]
    exactly(process.add_noise(x0, eps, t), torch.stack(rows))
    slopes = process.slopes(t, x0)
    assert [slope.shape for slope in slopes] == [(3, *[1] * (len(shape) - 1))] * 2
    exactly(
        torch.stack([slope.flatten() for slope in slopes]),
        torch.stack([process.alpha_slope(t), process.sigma_slope(t)]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_sample_is_promoted_to_float32(dtype):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 4, 1, 2, 2).to(dtype)
    t = torch.full((4,), 0.3)
    noisy = Flow().add_noise(x0, eps, t)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, Flow().add_noise(x0.float(), eps.float(), t))


@every_process
def test_student_input_is_the_noise_or_sigma_times_the_noise(process):
    noise, t = torch.ones(2, 1, 2, 2, dtype=torch.float64), torch.tensor([0.4, 0.9], dtype=torch.float64)
    assert torch.equal(process.student_input(noise, t, "unit"), noise)
    exactly(process.student_input(noise, t, "sigma")[:, 0, 0, 0], process.sigma(t))


@pytest.mark.parametrize("process", [Flow(3.0), VE(sigma_max=25.0), Trig(0.5), TABLE_PROCESSES["zero_snr"]])
def test_sampling_starts_at_the_noise_level_of_time_one(process):
    assert process.prior_scale == pytest.approx(process.sigma(torch.tensor(1.0)).item(), rel=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VP(torch.tensor([0.5, 0.9])),
        lambda: VP(torch.tensor([0.9, 0.5, 0.5])),
        lambda: VP(torch.tensor([0.9])),
        lambda: VP(torch.tensor([[0.9, 0.5]])),
        lambda: VP(torch.tensor([1.0, 0.5])),
        lambda: VP(torch.tensor([0.5, -0.1])),
        lambda: VP(torch.tensor([0.9, float("nan")])),
        lambda: Flow(shift=0.0),
        lambda: Flow(shift=-1.0),
        lambda: VE(sigma_min=0.0),
        lambda: VE(sigma_min=2.0, sigma_max=1.0),
        lambda: Trig(noise_std=0.0),
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(ValueError, match="got"):
        build()
