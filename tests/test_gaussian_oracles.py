"""The closed-form teachers agree with an ODE solver, with each other under every head, and with TrigFlow's algebra."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import PROCESSES, TARGETS, Mixture, cdf, cubature, flow_map, gaussian, monotone_map, quantile
from scipy.integrate import solve_ivp

from stepdistill.process import VP, Flow, NoiseProcess, Trig
from stepdistill.samplers import ode_steps

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LINE = Mixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-1.0], [1.5]], dtype=torch.float64),
    torch.tensor([0.2, 0.5], dtype=torch.float64).square().reshape(2, 1, 1),
)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(t: float, like: torch.Tensor) -> torch.Tensor:
    return like.new_full((len(like),), t)


def solve(law: Mixture, process: NoiseProcess, x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """Integrate ``dx/dt`` of the law's denoiser by Dormand and Prince's eighth-order pair."""
    denoiser = law.denoiser(process)

    def velocity(time: float, state):
        state = torch.as_tensor(state).reshape(x.shape)
        return denoiser(state, times(time, state)).velocity.flatten().numpy()

    jumps = [k / 8 for k in range(7, 0, -1) if s < k / 8 < t and isinstance(process, VP)]  # of the table's slopes
    state = x.flatten().numpy()
    for start, end in pairwise([t, *jumps, s]):
        state = solve_ivp(velocity, (start - 1e-12, end), state, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.as_tensor(state).reshape(x.shape)


@every_process
def test_gaussian_flow_map_solves_the_probability_flow_ode(process):
    law, x = gaussian(MEAN, COV), 1.3 * cubature(2)
    exact = flow_map(law, process, x, times(0.95, x), times(0.1, x))
    torch.testing.assert_close(solve(law, process, x, 0.95, 0.1), exact, rtol=1e-10, atol=1e-10)


@every_process
def test_gaussian_flow_maps_compose(process):
    law, x = gaussian(MEAN, COV), cubature(2)
    t, s, r = (times(time, x) for time in (0.9, 0.45, 0.05))
    both = flow_map(law, process, flow_map(law, process, x, t, s), s, r)
    torch.testing.assert_close(both, flow_map(law, process, x, t, r), rtol=1e-12, atol=1e-12)


@every_process
def test_one_dimensional_mixture_keeps_its_quantiles_along_the_ode(process):
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None] * process.sigma(torch.tensor(0.9)).clamp_min(1)
    exact = monotone_map(LINE, process, x, times(0.9, x), times(0.1, x))
    torch.testing.assert_close(solve(LINE, process, x, 0.9, 0.1), exact, rtol=1e-10, atol=1e-10)


@every_process
def test_monotone_and_affine_maps_agree_on_a_gaussian(process):
    law = gaussian(MEAN[:1], COV[:1, :1])
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t, s = times(0.8, x), times(0.2, x)
    torch.testing.assert_close(monotone_map(law, process, x, t, s), flow_map(law, process, x, t, s))


def test_quantile_inverts_the_distribution_function_of_samples():
    torch.manual_seed(0)
    process, samples = Flow(), LINE.sample(200_000)
    p = torch.tensor([0.05, 0.29, 0.31, 0.5, 0.9], dtype=torch.float64)[:, None]
    x = quantile(LINE, process, p, times(0.0, p))
    torch.testing.assert_close(cdf(LINE, process, x, times(0.0, p)), p)
    share = (samples[:, 0] <= x).double().mean(1, keepdim=True)
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / len(samples)).sqrt()).all())


@every_process
def test_mixture_expectations_are_the_score_of_its_density(process):
    torch.manual_seed(1)
    law = Mixture(torch.tensor([0.4, 0.6]).double(), torch.stack([MEAN, -MEAN]), torch.stack([COV, 0.3 * COV]))
    x, t = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    a, s = process.coefficients(t, x)
    covs = a[..., None, None].square() * torch.stack([COV, 0.3 * COV]) + s[..., None, None].square() * torch.eye(2)
    normal = torch.distributions.MultivariateNormal(a[..., None] * law.means, covs.reshape(6, 2, 2, 2))
    density = (law.weights.log() + normal.log_prob(x[:, None])).logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), x)
    prediction = law.denoiser(process)(x.detach(), t)
    torch.testing.assert_close(prediction.score, score)
    torch.testing.assert_close(a * prediction.x0 + s * prediction.eps, x.detach())


@every_process
@pytest.mark.parametrize("target", TARGETS)
def test_every_head_says_the_same(process, target):
    torch.manual_seed(0)
    law = gaussian(MEAN, COV)
    x, t = torch.randn(8, 2, dtype=torch.float64), torch.linspace(0.15, 0.85, 8, dtype=torch.float64)
    expected = law.expectations(x, *process.coefficients(t, x))
    prediction = law.denoiser(process, target)(x, t)
    torch.testing.assert_close((prediction.x0, prediction.eps), expected, rtol=1e-12, atol=1e-12)


def test_sit_and_repa_conventions_say_the_same():
    x, t = cubature(2), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    sit = gaussian(MEAN, COV).denoiser(Flow(label_scale=1.0, reversed_label=True), "flow", negated=True)
    repa = gaussian(MEAN, COV).denoiser(Flow(label_scale=1.0), "flow")
    raw = [net.call(net.network, x, net.native.label(t), {}) for net in (sit, repa)]
    torch.testing.assert_close(raw[0], -raw[1])
    torch.testing.assert_close(sit(x, t).x0, repa(x, t).x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sit(x, t).velocity, raw[1], rtol=1e-12, atol=1e-12)


@every_process
@pytest.mark.parametrize("noise_std", [1.0, 0.5])
def test_trigflow_view_follows_the_rotation_algebra(process, noise_std):
    law, x, t = gaussian(MEAN, COV), cubature(2), torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    trig, native = Trig(noise_std), law.denoiser(process)
    alpha, sigma = process.coefficients(t, x)
    angle = torch.atan2(sigma, alpha * noise_std)
    x_trig = x / (alpha.square() + (sigma / noise_std).square()).sqrt()
    viewed = native.under(trig)(x_trig, angle[:, 0] / (math.pi / 2))
    torch.testing.assert_close(viewed.x0, native(x, t).x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(viewed.eps, native(x, t).eps, rtol=1e-10, atol=1e-10)

    slope = viewed.velocity / (math.pi / 2)
    f = torch.cos(angle) * viewed.eps - torch.sin(angle) / noise_std * viewed.x0
    torch.testing.assert_close(slope, noise_std * f)
    torch.testing.assert_close((torch.cos(angle) * x_trig - viewed.x0) / (noise_std * torch.sin(angle)), f)
    torch.testing.assert_close(torch.cos(angle) * x_trig - torch.sin(angle) * noise_std * f, viewed.x0)


@every_process
def test_two_views_undo_each_other(process):
    x, t = cubature(2), torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    native = gaussian(MEAN, COV).denoiser(process)
    back = native.under(Trig(0.5)).under(process)
    torch.testing.assert_close(back(x, t).x0, native(x, t).x0, rtol=1e-12, atol=1e-12)


def test_euler_step_of_trigflow_is_a_rotation():
    trig, x, start, end = Trig(0.5), cubature(2), 0.8, 0.55
    denoiser = gaussian(MEAN, COV).denoiser(trig)
    slope = denoiser(x, times(start, x)).velocity / (math.pi / 2)
    turn = (start - end) * math.pi / 2
    (step,) = ode_steps(denoiser, x, [start], end=end)
    torch.testing.assert_close(step.x, math.cos(turn) * x - math.sin(turn) * slope, rtol=1e-12, atol=1e-12)
