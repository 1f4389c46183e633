"""TBCM's equations on Gaussians, where the consistency function is known; its trajectories; and that it learns."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from numpy.polynomial import legendre
from oracles import PROCESSES, Mixture, call, cubature, flow_map, gaussian, monotone_map
from test_learning import FLOW, MLP, learn
from torch import Tensor, nn

from stepdistill.backbones import unet2d
from stepdistill.denoiser import Denoiser
from stepdistill.methods import TBCM, Batch
from stepdistill.methods._trigflow import Points, exact_change, finite_change, rotated, slope, tangent
from stepdistill.process import VE, VP, Flow, Trig
from stepdistill.samplers import ode_steps

SIGMA = 0.6
VIEW = Trig(noise_std=SIGMA)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LAW = gaussian(torch.tensor([0.7, -0.4], dtype=torch.float64), COV)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", TBCM.targets)


class End(Mixture):
    """The consistency function of a Gaussian in the place of its denoiser: where the ODE from ``x`` ends."""

    def expectations(self, x, a, s):
        (mean,), (spread,), (axes,) = self.means, self.spreads, self.axes
        f = mean + ((x - a * mean) @ axes * (spread / (a.square() * spread + s.square())).sqrt()) @ axes.T
        return f, (x - a * f) / s


END = End(LAW.weights, LAW.means, COV[None])


def states(teacher: Denoiser, count: int = 12) -> Points:
    """States between ``theta`` 0.12 and 1.45, which every process of the tests reaches, with the teacher's slope."""
    torch.manual_seed(0)
    x, t = torch.randn(count, 2, dtype=torch.float64), torch.linspace(0.08, 0.92, count, dtype=torch.float64)
    return Points(x, t, slope(teacher.under(VIEW)(x, t)), torch.zeros(len(x), dtype=torch.long), {})


def angles(points: Points) -> tuple[Tensor, Tensor]:
    theta = points.t[:, None] * math.pi / 2
    return torch.cos(theta), torch.sin(theta)


@every_process
@every_target
def test_slope_is_written_three_ways_and_f_is_the_x0_reading(process, target):
    points = states(LAW.denoiser(process, target))
    found = LAW.denoiser(process, target).under(VIEW)(points.x, points.t)
    cos, sin = angles(points)
    torch.testing.assert_close(points.slope, SIGMA * cos * found.eps - sin * found.x0)
    torch.testing.assert_close(points.slope, (cos * points.x - found.x0) / sin)
    torch.testing.assert_close(found.x0, cos * points.x - sin * points.slope)
    exact = LAW.expectations(points.x, cos, SIGMA * sin)
    torch.testing.assert_close((found.x0, found.eps), exact)


def test_slope_of_a_rectified_flow_is_sana_sprints_formula():
    """``F = [(1 - 2 t) x + (1 - 2 t + 2 t^2) v] / k`` at ``t = sin / (sin + cos)``, for noise of std 1."""
    teacher, view = LAW.denoiser(Flow(), "flow"), Trig()
    points = states(teacher)
    cos, sin = angles(points)
    t = sin / (sin + cos)
    k = (t.square() + (1 - t).square()).sqrt()
    x0, eps = LAW.expectations(points.x * k, 1 - t, t)
    formula = ((1 - 2 * t) * points.x * k + (1 - 2 * t + 2 * t.square()) * (eps - x0)) / k
    torch.testing.assert_close(slope(teacher.under(view)(points.x, points.t)), formula)


def test_rotation_is_a_ddim_step():
    points = states(LAW.denoiser(Flow()))
    found, then = LAW.denoiser(Flow()).under(VIEW)(points.x, points.t), points.t / 3
    step = rotated(points.x, points.slope, (then - points.t) * math.pi / 2)
    torch.testing.assert_close(step, VIEW.add_noise(found.x0, found.eps, then))


@every_process
@every_target
def test_tangent_vanishes_at_the_consistency_function(process, target):
    points = states(LAW.denoiser(process, target))
    student = END.denoiser(process, target).under(VIEW)
    found = slope(student(points.x, points.t))
    g = tangent(found, exact_change(student, points), points, 1.0)
    torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-11)
    shifted = tangent(found + 0.1, exact_change(student, points), points, 1.0)
    assert shifted.abs().amax() > 1e-2


@every_process
@every_target
def test_tangent_at_the_consistency_function_before_the_end_of_the_warmup(process, target):
    """``g = -(1 - r) cos^2 (sigma_d F - dx/dtheta)``: a student that leans towards the teacher's velocity."""
    points = states(LAW.denoiser(process, target))
    student = END.denoiser(process, target).under(VIEW)
    found, change = slope(student(points.x, points.t)), exact_change(student, points)
    for ramp in (0.0, 0.5, 0.75):
        g = tangent(found, change, points, ramp)
        torch.testing.assert_close(g, -(1 - ramp) * angles(points)[0].square() * (found - points.slope))


class Leaning(Mixture):
    """Where the tangent of a centred Gaussian vanishes at a given ``r``: ``f = (cos - sin phi) x``.

    ``phi' = -1 - phi kappa - cot(theta) (phi - kappa) / r`` for the teacher's ``kappa = v' / v`` has the solution
    ``phi v sin^(1 / r) = int_0^theta (cos^2 (sigma_d^2 - l) / (r v^2) - 1) v sin^(1 / r)``, by Gauss' rule.
    """

    def __init__(self, variance: float, ramp: float, sigma_data: float = SIGMA) -> None:
        nn.Module.__init__(self)
        self.variance, self.ramp, self.sigma_data = variance, ramp, sigma_data
        nodes, weights = (torch.from_numpy(part) for part in legendre.leggauss(30))
        self.nodes, self.shares = ((nodes + 1) / 2) ** 3, weights * 1.5 * ((nodes + 1) / 2) ** 2

    def expectations(self, x, a, s):
        theta, gap = torch.atan2(s, a * self.sigma_data), self.sigma_data**2 - self.variance
        at = theta * self.nodes

        def growth(u):
            v2 = self.variance + gap * u.sin().square()
            return v2, v2.sqrt() * u.sin() ** (1 / self.ramp)

        (v2, inside), (_, outside) = growth(at), growth(theta)
        pushed = (at.cos().square() * gap / (self.ramp * v2) - 1) * inside
        phi = theta * (self.shares * pushed).sum(1, keepdim=True) / outside
        f = (theta.cos() - theta.sin() * phi) * x / (a.square() + (s / self.sigma_data).square()).sqrt()
        return f, (x - a * f) / s


@every_process
@every_target
def test_warmup_and_calm_down_hold_the_student_at_the_fixed_point_of_their_ramp(process, target):
    """Steps of the warm-up and of the calm-down at which ``r = 0.6`` ask for it, those at which it is 1 do not."""
    law = gaussian(torch.zeros(2, dtype=torch.float64), 0.25 * torch.eye(2, dtype=torch.float64))
    teacher, student = law.denoiser(process, target), Leaning(0.25, 0.6).denoiser(process, target)
    tilt = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    nets = {"teacher": teacher, "still": student}
    nets["student"] = replace(student, call=lambda *told: call(*told) + tilt)
    method = TBCM(sigma_data=SIGMA, start_ratio=6.0, t_min=0.1, route_points=4, warmup_steps=100)
    calm = replace(method, calm_down=(200, 50, 0.6))
    for each, step, still in ((method, 60, True), (calm, 60, True), (calm, 250, True), (calm, 200, False)):
        torch.manual_seed(0)
        (turn,) = each.turns(step)
        loss = turn.loss(nets, Batch(torch.randn(4, 2, dtype=torch.float64)))
        (gradient,) = torch.autograd.grad(loss.value, tilt)
        assert (loss.log["tangent"] < 1e-8) == (gradient.abs().max() < 1e-8) == still, step


@pytest.mark.parametrize("ramp", [1.0, 0.75, 0.5])
@pytest.mark.parametrize(("variance", "known"), [(0.25, (1, 0.9107, 0.785)), (0.09, (0.6, 0.514)), (1.0, (2, 1.919))])
def test_one_step_after_a_calm_down_is_narrower_by_the_known_ratio(ramp, variance, known):
    """The specification's; for ``l = sigma_d^2`` it is ``sqrt(pi) / 2 Gamma((1 / r + 1) / 2) / Gamma(1 / 2r + 1)``."""
    noise = torch.linspace(-2, 2, 4, dtype=torch.float64).view(2, 2)
    student = Leaning(variance, ramp, 0.5).denoiser(Flow(), "flow")
    ratio = TBCM(sigma_data=0.5).sampler(Flow())(student, noise) / (0.5 * noise)
    torch.testing.assert_close(ratio, ratio[:1, :1].expand(2, 2))
    for value, wanted in zip((1.0, 0.75, 0.5), known, strict=False):
        if value == ramp:
            assert ratio[0, 0].item() == pytest.approx(wanted, abs=6e-4)
    if variance == 0.25:
        gamma = math.gamma((1 / ramp + 1) / 2) / math.gamma(1 / (2 * ramp) + 1)
        assert ratio[0, 0].item() == pytest.approx(math.pi**0.5 / 2 * gamma, abs=1e-9)


@every_process
@every_target
@pytest.mark.parametrize("variance", [0.09, 0.36, 1.0])
def test_tangent_of_a_student_that_is_its_teacher(process, target, variance):
    """``sigma_d F = kappa x`` and ``g = -sin cos (1 + kappa' + kappa^2) x``, for ``kappa`` as below."""
    law = gaussian(torch.zeros(2, dtype=torch.float64), variance * torch.eye(2, dtype=torch.float64))
    teacher = law.denoiser(process, target).under(VIEW)
    points = states(law.denoiser(process, target))
    cos, sin = angles(points)
    gap, v2 = SIGMA**2 - variance, cos.square() * variance + SIGMA**2 * sin.square()
    kappa = sin * cos * gap / v2
    rise = (cos.square() - sin.square()) * gap / v2 - 2 * kappa.square()
    torch.testing.assert_close(points.slope, kappa * points.x)
    g = tangent(points.slope, exact_change(teacher, points), points, 1.0)
    torch.testing.assert_close(g, -sin * cos * (1 + rise + kappa.square()) * points.x)
    h = torch.full_like(points.t, 1e-5)
    ends = [teacher(rotated(points.x, points.slope, k * h), points.t + k * h / (math.pi / 2)).x0 for k in (-1, 1)]
    torch.testing.assert_close(g, cos * (ends[1] - ends[0]) / 2e-5, rtol=1e-6, atol=1e-7)
    zero = tangent(points.slope, exact_change(teacher, points), points, 0.0)
    torch.testing.assert_close(zero, torch.zeros_like(zero))


class Smooth(nn.Module):
    """A small network without any structure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x, label):
        return self.layers(torch.cat([x, label[:, None].to(x.dtype) / 8], 1))


@every_process
@every_target
@torch.no_grad()
def test_exact_and_finite_derivatives_agree(process, target):
    points = states(LAW.denoiser(process))
    process = replace(process, label_scale=8.0) if isinstance(process, Flow) else process
    student = Denoiser(Smooth(), process, target, call).under(VIEW)
    exact = exact_change(student, points)
    errors = [(finite_change(student, points, step) - exact).abs().max() for step in (2e-3, 1e-3)]
    assert errors[1] < 1e-4 * exact.abs().max()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) or isinstance(process, VP)  # its levels have kinks


@pytest.mark.parametrize("process", [PROCESSES["vp"], PROCESSES["ve"]], ids=["vp", "ve"])
@torch.no_grad()
def test_the_difference_is_one_sided_at_the_ends_of_what_the_network_knows(process):
    ends = VIEW.time_at_log_snr(process.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    inside = ends + torch.tensor([1e-9, -1e-9])
    x = torch.randn(2, 2, dtype=torch.float64)
    points = Points(
        x, inside, slope(LAW.denoiser(process).under(VIEW)(x, inside)), torch.zeros(len(x), dtype=torch.long), {}
    )
    student = Denoiser(Smooth(), process, "v", call).under(VIEW)
    torch.testing.assert_close(
        finite_change(student, points, 1e-4), exact_change(student, points), rtol=2e-3, atol=1e-4
    )


def test_route_of_the_reference_code():
    """16 sigmas of a flow of shift 2.5 whose lower end is shifted twice."""
    route = TBCM(t_min=2.5 * 0.001 / (1 + 1.5 * 0.001)).route(Flow(shift=2.5))
    theta = torch.atan2(Flow(shift=2.5).sigma(route), Flow(shift=2.5).alpha(route))
    expected = (
        "1.5708 1.5423 1.5095 1.4714 1.4268 1.3741 1.3112 1.2356 1.1440 1.0331 .8997 .7425 .5642 .3734 .1832 .0063"
    )
    torch.testing.assert_close(theta, torch.tensor([float(x) for x in expected.split()]).double(), rtol=0, atol=6e-5)


@every_process
def test_trajectories_are_ddim_chains_of_the_teacher(process):
    torch.manual_seed(0)
    method, noise = TBCM(sigma_data=SIGMA, route_points=6, start_ratio=9.0), torch.randn(5, 2, dtype=torch.float64)
    teacher = LAW.denoiser(process, "v")
    points = method.trajectory(teacher, noise, {})
    times = process.time_at_log_snr(VIEW.log_snr(points.t)).view(5, 5)
    torch.testing.assert_close(times, times[:, :1].expand(5, 5))  # shared by the batch
    start = method.sampler(process).times[0]
    x = process.student_input(noise, torch.full((5,), start), "sigma")
    a, s = process.coefficients(process.time_at_log_snr(VIEW.log_snr(points.t)), points.x)
    native = points.x * (a.square() + (s / SIGMA).square()).sqrt()
    chain = ode_steps(teacher, x, [start, *times[:-1, 0].tolist()], end=times[-1, 0].item())
    torch.testing.assert_close(native.view(5, 5, 2), torch.stack([step.x for step in chain]))
    torch.testing.assert_close(points.slope, slope(teacher.under(VIEW)(points.x, points.t)))
    route = method.route(process)
    assert ((times[:, 0] < route[:-1]) & (times[:, 0] > route[1:])).all()
    assert not torch.equal(method.trajectory(teacher, noise, {}).t, points.t)


def growth(variance: float, sigma_data: float, theta: Tensor) -> Tensor:
    """What DDIM steps from angle to angle multiply a state of a centred Gaussian by, from the first one on."""
    v2 = theta.cos().square() * variance + theta.sin().square() * sigma_data**2
    kappa = theta.sin() * theta.cos() * (sigma_data**2 - variance) / v2
    turn = theta.diff()
    return torch.cat([theta.new_ones(1), (turn.cos() + turn.sin() * kappa[:-1]).cumprod(0)])


@every_process
@every_target
def test_trajectories_take_one_time_in_each_interval_and_grow_by_the_closed_form(monkeypatch, process, target):
    """A uniform number is the share of the interval that is passed; the first time has none."""
    share = torch.tensor([0.1, 0.95, 0.5, 0.02, 0.7], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: share)
    law = gaussian(torch.zeros(2, dtype=torch.float64), 0.25 * torch.eye(2, dtype=torch.float64))
    method, noise = TBCM(sigma_data=SIGMA, route_points=6, start_ratio=9.0), torch.randn(3, 2, dtype=torch.float64)
    points, route = method.trajectory(law.denoiser(process, target), noise, {}), method.route(process)
    times = torch.cat([route[:1], (1 - share) * route[:-1] + share * route[1:]])
    torch.testing.assert_close(process.time_at_log_snr(VIEW.log_snr(points.t[::3])), times[1:])
    assert points.interval[::3].tolist() == [0, 1, 2, 3, 4]
    theta = torch.atan2(process.sigma(times), SIGMA * process.alpha(times))
    torch.testing.assert_close(points.t[::3], theta[1:] / (math.pi / 2))
    states = theta[0].sin() * SIGMA * growth(0.25, SIGMA, theta)[1:, None, None] * noise
    torch.testing.assert_close(points.x.view(5, 3, 2), states)


@every_target
def test_the_reference_route_loses_the_known_spread(monkeypatch, target):
    """Of the specification, at the end of its 16 DDIM steps over the exact standard deviation.

    Its data of variance ``l`` are latents times 0.5: the flow has them at variance ``4 l``, beside noise of 1.
    """
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    start = 1e6 if target == "eps" else math.inf  # which says nothing of the data at pure noise
    method = TBCM(sigma_data=1.0, t_min=2.5 * 0.001 / (1 + 1.5 * 0.001), start_ratio=start)
    variance = torch.tensor([0.25, 0.09, 0.0225], dtype=torch.float64)
    law, noise = gaussian(torch.zeros(3, dtype=torch.float64), (4 * variance).diag()), torch.ones(1, 3).double()
    points = method.trajectory(law.denoiser(Flow(shift=2.5, label_scale=1.0), target), noise, {})
    end = rotated(points.x, points.slope, -points.t * math.pi / 2)[-1] / (4 * variance).sqrt()
    torch.testing.assert_close(end, torch.tensor([0.897, 0.862, 0.775]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "process", [Flow(), Trig(), VE(sigma_max=200.0), PROCESSES["vp"]], ids=["flow", "trig", "ve", "vp"]
)
def test_states_have_the_marginal_variance(process):
    """``cos^2 lambda + sin^2 sigma_d^2`` up to the error of the first-order solver."""
    variance = torch.tensor([0.09, 0.36, 1.0], dtype=torch.float64)
    law = gaussian(torch.zeros(3, dtype=torch.float64), variance.diag())
    method, noise = TBCM(sigma_data=SIGMA, route_points=200, trained_points=199), cubature(3)
    points = method.trajectory(law.denoiser(process), noise, {})
    cos, sin = angles(points)
    wanted = (cos.square() * variance + sin.square() * SIGMA**2)[::6]
    found = points.x.square().view(-1, 6, 3).mean(1)
    torch.testing.assert_close(found, wanted, rtol=0.06, atol=0)


def test_a_step_trains_on_so_many_points_of_different_intervals():
    method, noise = TBCM(route_points=9, trained_points=4), torch.randn(3, 2, dtype=torch.float64)
    cond = {"class_labels": torch.arange(3)}
    route, visited = method.route(Flow()), set()
    for _ in range(30):
        points = method.trajectory(Conditioned.denoiser(), noise, cond)
        assert points.x.shape == (12, 2)
        assert points.cond["class_labels"].tolist() == [0, 1, 2] * 4
        times = Flow().time_at_log_snr(Trig(noise_std=0.5).log_snr(points.t))[::3].contiguous()
        inside = (8 - torch.searchsorted(route.flip(0), times)).tolist()
        assert len(set(inside)) == 4
        visited |= set(inside)
    assert visited == set(range(8))


class Conditioned(nn.Module):
    """A network that moves with its class."""

    def forward(self, x, label, class_labels):
        return class_labels[:, None] - x

    @classmethod
    def denoiser(cls) -> Denoiser:
        return Denoiser(cls(), Flow(), "flow", call)


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("jvp", ["exact", "finite"])
def test_loss_and_gradient_are_the_papers_equations_written_plainly(norm, jvp):
    """On a flow, with the derivative of ``f`` by autograd; gradients reach the learner alone."""
    method = TBCM(sigma_data=1.0, tangent_norm=norm, tangent_constant=0.3, jvp=jvp, finite_step=1e-4, route_points=5)
    process, noise = Flow(label_scale=1.0), torch.randn(4, 2, dtype=torch.float64)
    nets = {role: Denoiser(Smooth(), process, "flow", call) for role in ("student", "still")}
    nets["teacher"] = Denoiser(copy.deepcopy(LAW.denoiser(process, "flow").network), process, "flow", call)
    torch.manual_seed(5)
    loss = method.student_loss(nets, Batch(noise), ramp=0.7)
    loss.value.backward()
    assert all(parameter.grad is None for parameter in nets["still"].network.parameters())
    torch.manual_seed(5)
    points = method.trajectory(nets["teacher"], noise, {})
    cos, sin = angles(points)
    net, total = nets["student"].network, {"l2": 2, "rms": 1}[norm]

    def velocity(x, theta):
        """SANA-Sprint's formula of ``F``."""
        cos, sin = torch.cos(theta), torch.sin(theta)
        t, k = sin / (sin + cos), 1 / (sin + cos)
        return ((1 - 2 * t) * x * k + (1 - 2 * t + 2 * t * t) * net(x * k, t[:, 0])) / k

    theta = points.t[:, None] * math.pi / 2
    change = torch.func.jvp(velocity, (points.x, theta), (points.slope, torch.ones_like(theta)))[1].detach()
    found = velocity(points.x, theta)
    g = -cos.square() * (found - points.slope) - 0.7 * sin * cos * (points.x + change)
    size = (total * g.square().mean(1, keepdim=True)).sqrt()
    error = found - (found + g / (size + 0.3)).detach()
    plain = total * error.square().mean()
    torch.testing.assert_close(loss.value, plain, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(plain, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
@pytest.mark.parametrize("trained", [4, 6])
def test_points_in_parts_give_the_gradient_of_all_at_once_and_one_update(at_once, trained):
    """Over two micro-batches with trajectories of their own, as gradient accumulation asks for them."""
    nets = {role: Denoiser(Smooth(), Flow(), "flow", call) for role in ("teacher", "student", "still")}
    network, gradients = nets["student"].network, []
    method = TBCM(route_points=7, trained_points=trained, jvp="finite")
    for asked in (method, replace(method, points_at_once=at_once)):
        torch.manual_seed(3)
        turns = list(asked.turns(5000))
        for turn in turns:
            for _ in range(2):
                turn.loss(nets, Batch(torch.randn(4, 2, dtype=torch.float64))).value.backward()
        assert [turn.update for turn in turns] == [False] * (len(turns) - 1) + [True]
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.zero_grad()
    assert len(turns) == -(-trained // at_once)
    torch.testing.assert_close(*gradients)


def test_a_learned_variance_is_the_mean_loss_of_its_interval():
    """``e^-l loss + l`` is least there; the intervals that no point was drawn from stay."""
    losses = torch.tensor([0.3, 2.0, 1.0, 5.0, 0.1], dtype=torch.float64)
    interval, memory = torch.tensor([0, 3, 0, 3, 1]), {}
    for _ in range(1000):
        TBCM(route_points=5, log_variance_rate=0.1).variance(losses, interval, memory)
    (found,) = memory.values()
    torch.testing.assert_close(found.exp(), torch.tensor([0.65, 0.1, 1.0, 3.5], dtype=torch.float64))


def test_a_learned_variance_divides_the_losses_of_its_interval():
    nets = {role: Denoiser(Smooth(), Flow(), "flow", call) for role in ("student", "still")}
    nets["teacher"], noise = LAW.denoiser(Flow(), "flow"), torch.randn(4, 2, dtype=torch.float64)
    method = TBCM(route_points=5, trained_points=3, jvp="finite", log_variance_rate=1e-12)
    learned = torch.tensor([0.5, -1.0, 0.2, 2.0], dtype=torch.float64)
    torch.manual_seed(0)
    found = method.student_loss(nets, Batch(noise, memory={"tbcm_log_variance": learned}), ramp=0.5).value
    torch.manual_seed(0)
    points, alone = method.trajectory(nets["teacher"], noise, {}), replace(method, log_variance_rate=0.0)
    parts = [points.part(slice(4 * k, 4 * k + 4)) for k in range(3)]
    plain = [alone.loss_at(part, nets, {}, 0.5).value / learned[part.interval[0]].exp() for part in parts]
    torch.testing.assert_close(found, torch.stack(plain).mean())


def test_ramp_rises_once_and_may_fall_later():
    def ramps(method: TBCM, *steps: int) -> list[float]:
        return [next(method.turns(step)).loss.keywords["ramp"] for step in steps]  # type: ignore[attr-defined]

    assert ramps(TBCM(warmup_steps=100), 0, 25, 100, 10**6) == [0.0, 0.25, 1.0, 1.0]
    assert ramps(TBCM(warmup_steps=0), 0) == [1.0]
    calm = TBCM(warmup_steps=100, calm_down=(200, 50, 0.6))
    assert ramps(calm, 50, 200, 225, 250, 10**6) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.6])


@every_process
def test_one_step_of_the_consistency_function_is_the_end_of_the_ode(process):
    noise = torch.randn(6, 2, dtype=torch.float64)
    sampler = TBCM().sampler(process)
    start = torch.full((6,), sampler.times[0], dtype=torch.float64)
    found = sampler(END.denoiser(process, "v"), noise)
    x = process.student_input(noise, start, "sigma")
    torch.testing.assert_close(found, END.expectations(x, *process.coefficients(start, x))[0])
    low = torch.full_like(start, 0.0)
    state, (a, s) = flow_map(LAW, process, x, start, low), process.coefficients(low, x)
    torch.testing.assert_close(found, END.expectations(state, a, s.clamp_min(1e-12))[0])


def test_few_steps_renoise_afresh():
    sampler = TBCM(steps=3, start_ratio=10.0).sampler(PROCESSES["vp"])
    assert len(sampler.times) == 3
    assert sampler.renoising == "fresh"
    first = TBCM(steps=3, start_ratio=10.0).route(PROCESSES["vp"])[0]
    assert first == sampler.times[0]  # trained from where it is asked to start


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_derivatives_pass_the_attention_of_a_stock_network(checkpointing):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    student = Denoiser(unet, Flow(), "flow", unet2d.call)
    x, t = torch.randn(4, 1, 4, 4), torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    with torch.no_grad():
        points = Points(x, t, slope(student.under(VIEW)(x, t)), torch.zeros(len(x), dtype=torch.long), {})
        exact = exact_change(student.under(VIEW), points)
        finite = finite_change(student.under(VIEW), points, 2e-4)
    assert exact.dtype == torch.float32
    assert (exact - finite).norm() < 0.03 * exact.norm()


def test_derivative_is_of_the_still_network_in_full_precision():
    seen = []

    def watched(network: nn.Module, x: Tensor, label: Tensor, cond) -> Tensor:
        seen.append(
            (next(role for role, net in nets.items() if net.network is network), torch.is_autocast_enabled("cpu"))
        )
        return network(x)

    nets = {role: Denoiser(nn.Linear(2, 2), Flow(), "flow", watched) for role in ("teacher", "student", "still")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        TBCM(route_points=3, jvp="finite").student_loss(nets, Batch(torch.randn(2, 2)))
    assert seen == [("teacher", True)] * 3 + [("still", False)] * 2 + [("student", True)]


def test_check_names_what_a_teacher_lacks():
    for target in ("eps", "v", "flow", "edm"):
        TBCM(start_ratio=5.0).check(LAW.denoiser(Flow(), target))
    with pytest.raises(ValueError, match=r"f\(x, 0\) = x"):
        TBCM().check(LAW.denoiser(Flow(), "x0"))
    with pytest.raises(ValueError, match="consistency function is not a posterior mean"):
        TBCM().check(LAW.denoiser(Flow(), "consistency"))
    with pytest.raises(ValueError, match=r"set method\.start_ratio=20 or less"):
        TBCM().check(LAW.denoiser(Flow(), "eps"))
    TBCM(start_ratio=19.9).check(LAW.denoiser(Flow(), "eps"))
    with pytest.raises(ValueError, match=r"not above t_min=0\.9"):
        TBCM(start_ratio=1.0, t_min=0.9).check(LAW.denoiser(Flow(), "flow"))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"start_ratio": 0.0},
        {"t_min": 0.0},
        {"route_points": 1},
        {"trained_points": 0},
        {"sigma_data": 0.0},
        {"tangent_constant": 0.0},
        {"warmup_steps": -1},
        {"calm_down": (10, 0, 0.5)},
        {"calm_down": (10, 5, 1.5)},
        {"finite_step": 0.0},
        {"points_at_once": 0},
        {"log_variance_rate": -1.0},
    ],
)
def test_impossible_hyper_parameters_are_refused(values):
    with pytest.raises(ValueError, match="|".join(values)):
        TBCM(**values)


@pytest.mark.slow
def test_tbcm_learns_the_map_of_a_mixture():
    """The exact map of one-dimensional noise keeps quantiles; the error is averaged over the noise."""
    torch.manual_seed(0)
    variances = torch.tensor([0.2, 0.5]).square().reshape(2, 1, 1)
    law = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), variances)
    student = Denoiser(MLP(1, 64), FLOW, "flow", call)
    method = TBCM(warmup_steps=100, jvp="finite", tangent_norm="rms", tangent_constant=1.0)
    learn(method, {"teacher": law.denoiser(FLOW), "student": student, "still": student}, 400, 32, 1, 5e-3)
    noise = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    exact = monotone_map(law.double(), FLOW, noise, torch.ones(2000), torch.zeros(2000))
    with torch.no_grad():
        found = method.sampler(FLOW)(student, noise.float())
    assert (found - exact).square().mean().sqrt() < 0.25
