"""FreeFlow's equations on Gaussians, where the map is affine, and what its students learn."""

import copy
import math
from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler, UNet2DModel
from oracles import PROCESSES, TARGETS, Mixture, Told, call, flow_map, gaussian, monotone_map, scattered
from test_learning import MLP, learn
from test_sid import at
from torch import Tensor, nn

from stepdistill.backbones import conditioned, unet2d
from stepdistill.conditions import Cond
from stepdistill.denoiser import Denoiser, Prediction, Target
from stepdistill.export import export, export_error
from stepdistill.hosting import plan
from stepdistill.methods import Batch, FreeFlow, Loss
from stepdistill.methods._shared import UniformTimes
from stepdistill.methods.freeflow import FLOW, correction, descent, velocity
from stepdistill.process import VE, VP, Flow, NoiseProcess

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LAW = gaussian(MEAN, COV)
LINE_MEAN, LINE_VARIANCE = 0.7, 0.3
LINE = gaussian(*(torch.tensor(value, dtype=torch.float64) for value in ([LINE_MEAN], [[LINE_VARIANCE]])))

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", TARGETS)


def line(mean: float, std: float) -> Mixture:
    """``N(mean, std^2)`` in one dimension."""
    return gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64))


def method_for(process: NoiseProcess, **fields) -> FreeFlow:
    return FreeFlow(**{"init_ratio": 9.0, "input": "sigma" if isinstance(process, VE) else "unit", **fields})


class Map(Told):
    """The student whose mean velocity is that of the exact map of a Gaussian ``law``, plus ``offset``."""

    def __init__(self, law: Mixture, process: NoiseProcess, offset: float = 0.0) -> None:
        super().__init__()
        self.law, self.process, self.offset = law, process, offset

    def expectations(self, x: Tensor, a: Tensor, s: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """``x0`` and ``eps`` on the straight line from ``x`` to the state at time ``then``."""
        z, t_0 = x / (a + s), s / (a + s)
        end = self.process.sigma(then) / (self.process.alpha(then) + self.process.sigma(then))
        mean = (flow_map(self.law, FLOW, z, t_0[:, 0], end) - z) / (t_0 - end[:, None]) + self.offset
        return z + t_0 * mean, z - (1 - t_0) * mean


def exact_student(law: Mixture, process: NoiseProcess, target: Target = "x0", offset: float = 0.0) -> Denoiser:
    return Map(law, process, offset).denoiser(process, target)


def exact_nets(process: NoiseProcess, target: Target = "x0", law: Mixture = LAW, offset: float = 0.0):
    student = exact_student(law, process, target, offset)
    teacher = law.denoiser(process, target)
    return {"teacher": teacher, "student": student, "still": student, "fake": teacher}


def residual(method: FreeFlow, nets, noise: Tensor, s: Tensor) -> Tensor:
    z, t = method.starts(nets["student"], noise, 0, {})
    told = method.told(nets["student"], z, t, s, {})
    return method.residual(nets, z, t, told.x0, told.eps, s, {})


def led(method: FreeFlow, student: Denoiser, noise: Tensor, s: Tensor) -> Prediction:
    """What the student says where noise enters when told to go to ``s``."""
    return method.told(student, *method.starts(student, noise, 0, {}), s, {})


def inside(method: FreeFlow, process: NoiseProcess, count: int) -> Tensor:
    """Times of the map, away from its ends."""
    start, end = method.ends(process)
    return torch.linspace(end + 0.02, start - 0.02, count, dtype=torch.float64)


@every_process
@every_target
def test_residual_of_the_exact_map_is_zero(process, target):
    torch.manual_seed(0)
    method, noise = method_for(process, derivative="exact"), torch.randn(9, 2, dtype=torch.float64)
    s = inside(method, process, 9)
    assert residual(method, exact_nets(process, target), noise, s).abs().max() < 1e-10
    wrong = residual(method, exact_nets(process, target, offset=0.1), noise, s)
    assert wrong.abs().min(0).values.max() > 1e-3


@every_process
def test_residual_of_the_exact_map_is_zero_from_where_it_has_itself_led(process):
    """And a difference that does not cross its start is that of forward mode."""
    torch.manual_seed(0)
    noise, nets = torch.randn(9, 2, dtype=torch.float64), exact_nets(process)
    method = method_for(process, derivative="exact", start_share=0.9)
    start, end = method.ends(process)
    z, t = method.starts(nets["student"], noise, 6, {})
    assert ((t < start - 1e-3) == (torch.arange(9) < 6)).all()
    where = flow_map(LAW, FLOW, method.starts(nets["student"], noise, 0, {})[0], torch.full_like(t, start), t)
    torch.testing.assert_close(z, where, rtol=1e-9, atol=1e-9)
    s = end + (t - end) * 0.6
    told = method.told(nets["student"], z, t, s, {})
    assert method.residual(nets, z, t, told.x0, told.eps, s, {}).abs().max() < 1e-9
    fine = replace(method, derivative="finite", difference=1e-4)
    slopes = [each.slope(nets["still"], z, t, s, {}) for each in (method, fine)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)


@every_process
def test_the_exact_map_makes_the_same_sample_in_any_number_of_steps(process):
    torch.manual_seed(0)
    noise, student = torch.randn(5, 2, dtype=torch.float64), exact_student(LAW, process)
    sampler = method_for(process, start_share=0.5).sampler(process)
    assert sampler.any_steps
    assert not method_for(process).sampler(process).any_steps
    end = torch.zeros(5, dtype=torch.float64)
    states = []
    for steps in (1, 2, 3, 7):
        *earlier, last = sampler.in_steps(steps).trace(student, noise)
        assert len(earlier) == steps - 1
        states.append(process.add_noise(last.x0, last.eps, end))  # where the table ends, which is not quite the sample
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-8, atol=1e-8)


@every_process
def test_the_map_begins_with_the_teachers_velocity_and_ends_with_the_sample(process):
    torch.manual_seed(0)
    method, noise = method_for(process), torch.randn(4, 2, dtype=torch.float64)
    start, end = method.ends(process)
    student, teacher = exact_student(LAW, process), LAW.denoiser(process)
    t = noise.new_full((4,), method.sampler(process).times[0])
    x = process.student_input(noise, t, method.input)
    told = led(method, student, noise, torch.full_like(t, start - 1e-7))
    torch.testing.assert_close(velocity(told), velocity(teacher(x, t)), rtol=1e-5, atol=1e-5)
    a, s = process.coefficients(t, x)
    state = flow_map(LAW, FLOW, x / (a + s), torch.full_like(t, start), torch.full_like(t, end))
    sample = method.sampler(process)(student, noise)
    told = led(method, student, noise, torch.full_like(t, end))
    torch.testing.assert_close(told.x0, sample, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FLOW.add_noise(told.x0, told.eps, torch.full_like(t, end)), state)


def test_mean_velocity_under_rectified_flow_is_the_known_one():
    """From pure noise ``F*(z, d) = m + ((v - 1) / d) z`` with ``v^2 = d^2 l + (1 - d)^2``, and ``F*(z, 0) = m - z``."""
    noise = torch.tensor([[-1.3], [0.2], [2.0]], dtype=torch.float64)
    method, student = FreeFlow(), exact_student(LINE, Flow())
    for d in (1e-6, 0.3, 0.8, 1.0):
        spread = math.sqrt(d * d * LINE_VARIANCE + (1 - d) ** 2)
        told = led(method, student, noise, torch.full((3,), 1 - d, dtype=torch.float64))
        torch.testing.assert_close(velocity(told), LINE_MEAN + (spread - 1) / d * noise, rtol=1e-8, atol=1e-8)
    told = led(method, student, noise, torch.full((3,), 1 - 1e-6, dtype=torch.float64))
    torch.testing.assert_close(velocity(told), LINE_MEAN - noise, rtol=1e-5, atol=1e-5)


def squared_floor(process: NoiseProcess, target: Target, difference: float, s: float) -> float:
    method = method_for(process, difference=difference)
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    times = torch.full((2,), s, dtype=torch.float64)
    return residual(method, exact_nets(process, target, line(LINE_MEAN, 0.8)), noise, times).square().mean().item()


@every_process
@every_target
@pytest.mark.parametrize("power", [4, 2])
def test_floor_of_the_difference_falls_with_its_fourth_power_and_its_second_where_it_is_one_sided(
    process, target, power
):
    s = 0.45 if power == 4 else method_for(process).ends(process)[1] + 1e-5
    coarse, fine = (squared_floor(process, target, difference, s) for difference in (0.02, 0.01))
    assert math.log2(coarse / fine) == pytest.approx(power, abs=0.05)


def test_floor_of_the_central_difference_is_the_formula():
    """``(d h^2 / 6)^2 E|F'''|^2``, where ``F = (v - 1) / d`` is differentiated automatically."""
    d = torch.tensor(0.55, dtype=torch.float64, requires_grad=True)
    slope = ((d.square() * LINE_VARIANCE + (1 - d).square()).sqrt() - 1) / d
    for _ in range(3):
        (slope,) = torch.autograd.grad(slope, d, create_graph=True)
    method = FreeFlow(difference=0.01)
    noise, s = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.full((2,), 0.45, dtype=torch.float64)
    found = residual(method, exact_nets(Flow(), law=LINE), noise, s).square().mean().item()
    assert found == pytest.approx((0.55 * 0.01**2 / 6 * slope.item()) ** 2, rel=0.01)


@every_process
@every_target
def test_finite_derivative_is_the_exact_one(process, target):
    torch.manual_seed(0)
    noise, student = torch.randn(7, 2, dtype=torch.float64), exact_student(LAW, process, target)
    exact, finite = (method_for(process, derivative=kind, difference=1e-4) for kind in ("exact", "finite"))
    s = inside(exact, process, 7)
    slopes = [method.slope(student, *method.starts(student, noise, 0, {}), s, {}) for method in (exact, finite)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-6)
    assert slopes[0].abs().max() > 0.1


def test_difference_stays_between_the_ends_of_the_map():
    told = []

    class Watched(FreeFlow):
        def told(self, student, z, t, s, cond):
            told.append(s)
            return super().told(student, z, t, s, cond)

    method, process = Watched(init_ratio=9.0, difference=0.3), PROCESSES["vp"]
    start, end = method.ends(process)
    noise, s = torch.randn(3, 2, dtype=torch.float64), torch.tensor([end, 0.5, start], dtype=torch.float64)
    student = exact_student(LAW, process)
    z, t = method.starts(student, noise, 0, {})
    method.slope(student, z, t, s.clamp(end + 1e-9, start - 1e-9), {})
    torch.testing.assert_close(told[0], torch.tensor([end, 0.2, start - 0.3, end + 0.3, 0.8, start]).double())


def matched(teacher: Mixture, student: Mixture, process: NoiseProcess, target: Target = "x0"):
    return {"teacher": teacher.denoiser(process, target), "fake": student.denoiser(process, target)}


@every_process
@every_target
def test_correction_vanishes_only_where_the_laws_agree(process, target):
    torch.manual_seed(0)
    x0, r = torch.randn(6, 2, dtype=torch.float64), torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    assert correction(matched(LAW, LAW, process, target), x0, r, {}).abs().max() == 0
    for other in (gaussian(MEAN + 0.1, COV), gaussian(MEAN, 1.2 * COV)):
        assert correction(matched(LAW, other, process, target), x0, r, {}).abs().min() > 1e-4


@every_process
@every_target
def test_mean_correction_has_the_closed_form_and_its_descent_approaches_the_teacher(monkeypatch, process, target):
    """``E[D_N z] = (1 - r) c (k_q - k_p)``, ``k = ((1 - r) v - r) / ((1 - r)^2 v + r^2)``, for samples ``m_q + c z``.

    ``E[D_N]`` is the difference of the means times ``1 - (1 - r) k_p``.  A student too narrow has a negative product
    with its noise and one too low a negative mean, so descent widens and lifts it.
    """
    students = [(LINE_MEAN, 0.3), (LINE_MEAN, 0.8), (0.2, 0.3), (0.2, math.sqrt(0.3)), (LINE_MEAN, math.sqrt(0.3))]
    products = []
    for r, (mean, std) in product((0.3, 0.6, 0.9), students):
        x0, eps, weight = scattered(mean, std**2, 1 - r, r)
        monkeypatch.setattr(torch, "randn_like", lambda like, eps=eps: eps)
        nets = matched(LINE, line(mean, std), process, target)
        found = correction(nets, x0, torch.full((len(x0),), r, dtype=torch.float64), {})

        def gain(variance: float, r: float = r) -> float:
            return ((1 - r) * variance - r) / ((1 - r) ** 2 * variance + r**2)

        along = (1 - r) * std * (gain(std**2) - gain(LINE_VARIANCE))
        offset = (mean - LINE_MEAN) * (1 - (1 - r) * gain(LINE_VARIANCE))
        products.append((weight * found * (x0 - mean) / std).sum().item())
        assert products[-1] == pytest.approx(along, abs=1e-9)
        assert (weight * found).sum().item() == pytest.approx(offset, abs=1e-9)
        assert along * (std - math.sqrt(LINE_VARIANCE)) >= 0
        assert offset * (mean - LINE_MEAN) >= 0
    assert products[::5] == pytest.approx([-0.289, -0.039, -0.001], abs=3e-3), "the specification's, of samples"


@every_process
@every_target
def test_both_gradients_are_those_of_the_closed_forms(monkeypatch, process, target):
    """A map whose velocity is off by ``o`` has ``D_G = (1 - delta k(s)) o`` for the slope ``k`` of ``u``.

    The gradient reaches ``F``, whatever the network predicts of it, decayed by its size, and in the rows of the
    correction, of ``(E_fake[x0] - E_teacher[x0]) / r``, in the ratio of norms that was asked for.
    """
    torch.manual_seed(0)
    noise, eps, tilt = torch.randn(8, 2).double(), torch.randn(2, 2).double(), torch.zeros(8, 2).double()
    method = method_for(process, derivative="exact", eps=0.05, correction_ratio=0.7, times=at(0.5))
    (start, end), other = method.ends(process), gaussian(MEAN + 0.4, 2 * COV)
    nets = {**exact_nets(process, target, offset=0.1), "fake": other.denoiser(process, target)}
    tilt.requires_grad_()
    nets["student"] = replace(nets["still"], call=lambda network, x, label, cond: call(network, x, label, cond) + tilt)
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(method.student_loss(nets, Batch(noise)).value, tilt)

    torch.manual_seed(1)
    s = start - (start - end) * UniformTimes(low=0.0, high=1.0).draw(FLOW, noise[:6])
    z, t = method.starts(nets["still"], noise, 0, {})
    told = method.told(nets["student"], z, t, torch.cat([s, s.new_full((2,), end)]), {})
    spread, axes = torch.linalg.eigh(COV)
    at_s = s[:, None]
    slope = ((1 - at_s) * spread - at_s) / ((1 - at_s).square() * spread + at_s.square())
    wrong = (0.1 * torch.ones(2).double() @ axes * (1 - (start - at_s) * slope)) @ axes.T
    wrong = wrong / (wrong.square().mean(1, keepdim=True) + 0.05)
    r = torch.full((2, 1), 0.5 * start, dtype=torch.float64)
    x_r = (1 - r) * told.x0[6:].detach() + r * eps
    gap = (other.expectations(x_r, 1 - r, r)[0] - LAW.expectations(x_r, 1 - r, r)[0]) / r
    gap = gap * 0.7 * wrong.norm(dim=1).mean() / (gap.norm(dim=1).mean() + 0.05)
    moved = torch.cat([wrong / wrong.numel(), gap / gap.numel()])
    (expected,) = torch.autograd.grad((velocity(told) * moved).sum(), tilt)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_correction_equals_the_difference_of_denoisers_over_the_noise():
    torch.manual_seed(0)
    nets, r = matched(LAW, gaussian(MEAN, 2 * COV), PROCESSES["vp"], "eps"), torch.tensor([0.3, 0.6]).double()
    x0 = torch.randn(2, 2, dtype=torch.float64)
    torch.manual_seed(1)
    found = correction(nets, x0, r, {})
    torch.manual_seed(1)
    x_r = (1 - r[:, None]) * x0 + r[:, None] * torch.randn_like(x0)
    fake, real = (law.expectations(x_r, 1 - r[:, None], r[:, None])[0] for law in (gaussian(MEAN, 2 * COV), LAW))
    torch.testing.assert_close(found, (fake - real) / r[:, None])


class TwoTimes(nn.Module):
    """A small network of the state, its label and the target label."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor, label: Tensor, target_label: Tensor | None = None) -> Tensor:
        told = label if target_label is None else target_label
        return self.layers(torch.cat([x, label[:, None] / 1000, told[:, None] / 1000], 1))


def learning_nets(process: NoiseProcess, target: Target = "flow") -> dict[str, Denoiser]:
    torch.manual_seed(0)
    teacher = LAW.denoiser(process, target)
    nets = {role: replace(teacher, network=TwoTimes()) for role in ("student", "fake")}
    return {"teacher": teacher, "still": nets["student"], **nets}


def student_gradients(method: FreeFlow, nets: dict[str, Denoiser], noise: Tensor) -> tuple[Loss, list[Tensor]]:
    torch.manual_seed(1)
    loss = method.student_loss(nets, Batch(noise))
    return loss, list(torch.autograd.grad(loss.value, list(nets["student"].network.parameters())))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_gradient_is_the_papers_surrogate_written_plainly(decay):
    nets, noise = learning_nets(Flow()), torch.randn(8, 2, dtype=torch.float64)
    method = FreeFlow(derivative="exact", decay=decay, eps=0.05, correction_ratio=0.7)
    loss, found = student_gradients(method, nets, noise)
    net, fake = nets["student"].network, nets["fake"].network

    def mean_velocity(z: Tensor, d: Tensor) -> Tensor:
        return -net(z, 1000 * torch.ones_like(d), 1000 * (1 - d))

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        x0, eps = LAW.expectations(x, 1 - t[:, None], t[:, None])
        return x0 - eps

    torch.manual_seed(1)
    z, d = noise[:6], UniformTimes(low=0.0, high=1.0).draw(FLOW, noise[:6])
    mean = mean_velocity(z, d)
    step = mean.detach(), torch.func.jvp(lambda at: mean_velocity(z, at), (d,), (torch.ones_like(d),))[1].detach()
    residual = step[0] + d[:, None] * step[1] - teacher(z + d[:, None] * step[0], 1 - d)
    direction = residual / (residual.square().mean(1, keepdim=True) + 0.05) ** decay
    z, ones = noise[6:], torch.ones(2, dtype=torch.float64)
    end = mean_velocity(z, ones)
    x0 = (z + end).detach()
    r = method.times.draw(FLOW, x0)
    x_r = (1 - r[:, None]) * x0 + r[:, None] * torch.randn_like(x0)
    gap = -fake(x_r, 1000 * r).detach() - teacher(x_r, r)
    scale = 0.7 * direction.norm(dim=1).mean() / (gap.norm(dim=1).mean() + 0.05)
    surrogate = (mean * direction).mean() + (end * scale * gap).mean()
    expected = torch.autograd.grad(surrogate, list(net.parameters()))
    torch.testing.assert_close(found, list(expected))
    torch.testing.assert_close(loss.log["residual"], residual.square().mean())
    torch.testing.assert_close(loss.log["correction"], gap.norm(dim=1).mean())


@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_balance_makes_both_norms_stand_in_the_wanted_ratio(ratio):
    nets, noise = learning_nets(Flow()), torch.randn(64, 2, dtype=torch.float64)
    method = FreeFlow(correction_ratio=ratio, decay=0, eps=1e-12)
    log = student_gradients(method, nets, noise)[0].log
    torch.manual_seed(1)
    s = 1 - UniformTimes(low=0.0, high=1.0).draw(FLOW, noise[:48])
    prediction = residual(method, nets, noise[:48], s).norm(dim=1).mean()
    torch.testing.assert_close(log["balance"] * log["correction"], ratio * prediction)


def test_descent_has_the_direction_as_its_gradient():
    x, direction = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4)
    (found,) = torch.autograd.grad(descent(x, direction), x)
    torch.testing.assert_close(found, direction / (3 * 32), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "share", "count"), [(64, 0.75, 48), (4, 0.75, 3), (2, 0.75, 1), (3, 0.9, 2), (9, 0.01, 1)]
)
def test_batch_is_split_into_prediction_and_correction_and_conditions_follow(size, share, count):
    """Rows of the student, of the two ends of the difference, then of the teacher, the fake network and it again."""
    heard, ends = [], []

    def numbered(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        assert len(x) == len(label) == len(cond["number"])
        heard.append(cond["number"].tolist())
        if "target_label" in cond:
            ends.append(int((cond["target_label"] < 1e-6).sum()))
            return network(x, label, cond["target_label"])
        return network(x, label)

    nets = {role: replace(net, call=numbered) for role, net in learning_nets(PROCESSES["vp"], "v").items()}
    batch = Batch(torch.randn(size, 2, dtype=torch.float64), {"number": torch.arange(size)})
    FreeFlow(init_ratio=9.0, prediction_share=share).student_loss(nets, batch)
    everyone, first, second = list(range(size)), list(range(count)), list(range(count, size))
    assert heard == [everyone, first + first, first, second, second]
    assert ends[0] == size - count


@every_process
def test_noise_of_the_correction_and_of_the_fake_network_ends_where_the_map_begins(process):
    """Times of the law are multiples of ``t_0``: 0.98 to 1 of it here, a little less than the start."""
    torch.manual_seed(0)
    method = method_for(process, init_ratio=1.5, times=UniformTimes(low=0.98, high=1.0))
    labels = []

    def watched(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        labels.append(label)
        return call(network, x, label, cond)

    nets = learning_nets(process, "v")
    nets["fake"] = replace(nets["fake"], call=watched)
    for loss in (method.student_loss, method.fake_loss):
        loss(nets, Batch(torch.randn(64, 2, dtype=torch.float64)))
        t = process.time_of_label(labels.pop())
        r = process.sigma(t) / (process.alpha(t) + process.sigma(t))
        low, high = (share * method.ends(process)[0] for share in (0.98, 1.0))
        assert low - 1e-9 < r.min() < r.max() < high + 1e-9


@pytest.mark.parametrize("derivative", ["finite", "exact"])
def test_gradients_reach_only_the_learner(derivative):
    nets, method = learning_nets(Flow()), FreeFlow(derivative=derivative)
    nets["still"] = replace(nets["student"], network=copy.deepcopy(nets["student"].network))
    batch = Batch(torch.randn(8, 2, dtype=torch.float64))
    assert [turn.role for turn in FreeFlow(fake_updates=2).turns(0)] == ["fake", "fake", "student"]
    for role, loss, _ in method.turns(0):
        loss(nets, batch).value.backward()
        for other in ("student", "fake", "still"):
            touched = any(p.grad is not None for p in nets[other].network.parameters())
            assert touched == (other == role), (role, other)
        for parameter in nets[role].network.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
            parameter.grad = None


def test_directions_are_computed_without_a_graph():
    nets, noise, r = learning_nets(Flow()), torch.randn(3, 2, dtype=torch.float64), torch.full((3,), 0.5).double()
    assert not residual(FreeFlow(), nets, noise, r).requires_grad
    assert not correction(nets, noise, r, {}).requires_grad


@every_process
@every_target
def test_fake_loss_is_least_at_the_students_own_law(process, target):
    """Among Gaussians of several widths; the student's samples are linear in its input."""
    method, root = method_for(process, times=UniformTimes(low=0.2, high=0.9)), torch.linalg.cholesky(COV)
    start = torch.full((1,), method.sampler(process).times[0], dtype=torch.float64)
    scale = process.student_input(torch.ones(1, 1).double(), start, method.input)

    def linear(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        return x / scale @ root.T

    law, losses = gaussian(torch.zeros(2, dtype=torch.float64), COV), []
    for factor in (0.6, 1.0, 1.7):
        torch.manual_seed(0)
        fake = gaussian(torch.zeros(2, dtype=torch.float64), factor * COV).denoiser(process, target)
        student = Denoiser(nn.Identity(), process, "x0", linear)
        nets = {"teacher": law.denoiser(process, target), "student": student, "fake": fake}
        losses.append(method.fake_loss(nets, Batch(torch.randn(4096, 2, dtype=torch.float64))).value.item())
    assert losses[1] < min(losses[0], losses[2])


@every_process
@every_target
def test_map_of_an_untrained_student_is_the_teachers_own_prediction(process, target):
    """A network that does not listen to the target time: ``F(z, delta) = u(z, t_0)`` for every ``delta``."""
    torch.manual_seed(0)
    method, teacher, noise = method_for(process), LAW.denoiser(process, target), torch.randn(5, 2, dtype=torch.float64)
    deaf = replace(teacher, call=lambda network, x, label, cond: network(x, label))
    t = noise.new_full((5,), method.sampler(process).times[0])
    first = teacher(process.student_input(noise, t, method.input), t)
    told = led(method, deaf, noise, inside(method, process, 5))
    torch.testing.assert_close(velocity(told), velocity(first))
    torch.testing.assert_close(method.sampler(process)(deaf, noise), first.x0)
    nets = {"teacher": teacher, "student": deaf, "still": deaf}
    near = torch.full((5,), method.ends(process)[0] - 1e-6, dtype=torch.float64)
    assert residual(method, nets, noise, near).abs().max() < 1e-4


def test_check_names_what_a_teacher_lacks():
    method = FreeFlow()
    method.check(LAW.denoiser(PROCESSES["vp"], "eps"))
    method.check(LAW.denoiser(Flow(), "flow"))
    with pytest.raises(ValueError, match="consistency function is not a posterior mean"):
        method.check(LAW.denoiser(Flow(), "consistency"))
    with pytest.raises(ValueError, match=r"set method\.input=sigma"):
        method.check(LAW.denoiser(PROCESSES["ve"], "edm"))
    FreeFlow(input="sigma").check(LAW.denoiser(PROCESSES["ve"], "edm"))
    linear = LAW.denoiser(VP(DDPMScheduler().alphas_cumprod.double()), "eps")
    for teacher in (linear, LAW.denoiser(Flow(), "eps")):
        with pytest.raises(ValueError, match=r"set method\.init_ratio=20 or less"):
            method.check(teacher)
        FreeFlow(init_ratio=20.0).check(teacher)


@pytest.mark.parametrize(
    "values",
    [
        {"prediction_share": 1.0},
        {"prediction_share": 0.0},
        {"correction_ratio": -1.0},
        {"decay": -0.1},
        {"eps": 0.0},
        {"difference": 0.0},
        {"init_ratio": 0.0},
        {"fake_updates": 0},
    ],
)
def test_impossible_hyper_parameters_are_refused(values):
    with pytest.raises(ValueError, match="|".join(values)):
        FreeFlow(**values)


LINEAR = VP(DDPMScheduler().alphas_cumprod.double())
SCALED = VP(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double())
SHAPE = (1, 8, 8)


def two_time_unet(spread: float) -> conditioned.Conditioned:
    """A tiny network with attention whose last new layer has weights of ``spread``."""
    network = conditioned.Conditioned(cast(UNet2DModel, tiny_unet(seed=3)))
    torch.nn.init.normal_(cast(Any, network.embeddings["target_label"]).linear_2.weight, std=spread)
    return network.eval()


@pytest.mark.parametrize(
    ("process", "target", "fields"),
    [
        (LINEAR, "eps", {"init_ratio": 10.0}),
        (SCALED, "eps", {}),
        (SCALED, "v", {"init_ratio": 2.5, "input": "sigma"}),
        (SCALED, "x0", {}),
        (Flow(), "flow", {}),
        (Flow(shift=3.0), "flow", {"init_ratio": 4.0}),
        (VE(), "edm", {"input": "sigma"}),
    ],
)
def test_exported_student_is_its_sampler_and_the_end_of_its_map(process, target, fields, tmp_path):
    method, denoiser = FreeFlow(**fields), Denoiser(two_time_unet(0.3), process, target, unet2d.call)
    method.check(denoiser)
    sampler = method.sampler(process)
    hosted = plan(denoiser, sampler, classes=None)
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond={}) < 1e-5
    noise, end = torch.randn(3, *SHAPE), torch.full((3,), method.ends(process)[1], dtype=torch.float64)
    with torch.no_grad():
        trained = led(method, denoiser, noise, end).x0
        torch.testing.assert_close(trained, sampler(denoiser, noise), rtol=1e-4, atol=1e-4)
        elsewhere = led(method, denoiser, noise, end + 0.4).x0
    assert (elsewhere - trained).abs().max() > 1e-2


@pytest.mark.parametrize(("process", "target"), [(LINEAR, "eps"), (Flow(), "flow")])
def test_exact_derivative_passes_through_attention(process, target):
    torch.manual_seed(0)
    student, noise = Denoiser(two_time_unet(0.3).double(), process, target, unet2d.call), torch.randn(3, *SHAPE)
    exact, finite = (FreeFlow(derivative=kind, difference=1e-4, init_ratio=9.0) for kind in ("exact", "finite"))
    s = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    with torch.no_grad():
        z, t = exact.starts(student, noise.double(), 0, {})
        slopes = [method.slope(student, z, t, s, {}) for method in (exact, finite)]
    assert (slopes[1] - slopes[0]).abs().max() < 0.01 * slopes[0].abs().max()


def learn_beside(method: FreeFlow, nets: dict[str, Denoiser], *schedule) -> None:
    """``learn`` with the student's frozen face in place."""
    learn(method, {**nets, "still": nets["student"]}, *schedule)


@pytest.mark.slow
def test_freeflow_learns_the_map_of_a_mixture():
    torch.manual_seed(0)
    variances = torch.tensor([0.2, 0.5]).square().reshape(2, 1, 1)
    law = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), variances)
    flow, method = Flow(label_scale=1.0), FreeFlow()
    nets = {"teacher": law.denoiser(flow, "flow")}
    for role, times in (("student", 2), ("fake", 1)):
        nets[role] = Denoiser(MLP(1, 64, times=times), flow, "flow", call)
    learn_beside(method, nets, 2000, 256, 1, 2e-3)
    noise = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    exact = monotone_map(law.double(), flow, noise, torch.ones(2000), torch.zeros(2000))
    with torch.no_grad():
        found = method.sampler(flow)(nets["student"], noise.float())
    error = (found - exact).square().mean().sqrt()
    assert error < 0.25
