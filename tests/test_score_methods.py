"""The score-distillation family: closed forms on Gaussians, few-step students, guidance, and that each learns."""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from oracles import PROCESSES, SIGMA_DATA, TARGETS, Mixture, Particles, Targeted, call, cubature, gaussian, scattered
from test_learning import FLOW
from test_sid import (
    COV,
    EYE,
    GAIN,
    MEAN,
    SHIFT,
    Constant,
    Table,
    at,
    expected_gradient,
    gradients,
    level,
    minimise,
    networks,
    precisions,
)
from torch import nn

from stepdistill.denoiser import Denoiser, Guidance, Target
from stepdistill.methods import DMD, AnyMethod, Batch, SiD, SwiftBrush
from stepdistill.methods._score import ScoreDistillation, dropped, fake_guided, matching_gradient, steered
from stepdistill.methods._shared import UniformTimes
from stepdistill.methods.sid import identity_loss
from stepdistill.process import VE, Trig

SCORE = [kind for kind in get_args(AnyMethod) if issubclass(kind, ScoreDistillation)]
"""Every method of the family; one that is added to the union is tested here without a change."""
every_method = pytest.mark.parametrize("kind", SCORE, ids=lambda kind: kind.__name__)
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", TARGETS)

TIME = 0.45
"""A time at which no process is nearly clean or nearly noise."""
BY_TIME = {
    "dmd": (DMD(weight="one", student_times=at(TIME)), lambda a, s: 1.0),
    "dmd kl": (DMD(weight="kl", student_times=at(TIME)), lambda a, s: a**2 / s**2),
    "swiftbrush": (SwiftBrush(student_times=at(TIME)), lambda a, s: a * s),
}
"""Methods whose weight is a function of time, and that function."""


def plainly(kind: type[ScoreDistillation], **options) -> ScoreDistillation:
    """A method whose weight depends on time alone, as expectations in closed form ask for."""
    weight = {"weight": "one"} if "weight" in kind.__dataclass_fields__ else {}
    return kind(student_times=at(TIME), **weight, **options)


def test_the_family_is_collected_from_the_union_and_has_its_closed_forms_here():
    assert {SiD, DMD, SwiftBrush} <= set(SCORE)
    assert {SiD, *(type(method) for method, _ in BY_TIME.values())} == set(SCORE), "BY_TIME lacks a method's weight"


# The gradient of a difference of denoisers


@every_process
@every_target
@pytest.mark.parametrize(("method", "weight"), BY_TIME.values(), ids=BY_TIME)
def test_matching_gradient_on_gaussians_is_the_closed_form(monkeypatch, process, target, method, weight):
    a, s = level(process, TIME)
    p, r = precisions(a, s, COV, GAIN)
    teacher, critic = Targeted(gaussian(MEAN, COV), target), Targeted(gaussian(SHIFT, GAIN @ GAIN.T), target)
    grad_b, grad_a, log = expected_gradient(monkeypatch, method, process, teacher, (GAIN, SHIFT), critic)

    torch.testing.assert_close(grad_b, weight(a, s) * s**2 * p @ (SHIFT - MEAN))
    torch.testing.assert_close(grad_a, weight(a, s) * s**2 * (p - r) @ GAIN)
    c_f = torch.linalg.inv(r)
    fisher = s**4 * (p @ (SHIFT - MEAN)).square().sum() + (s**4 / a**2) * ((r - p) @ c_f @ (r - p)).trace()
    torch.testing.assert_close(log["score_gap"] * 3, fisher)
    torch.testing.assert_close(log["loss"], weight(a, s) ** 2 * fisher / 6)


@every_process
def test_the_kl_weight_gives_the_gradient_of_the_divergence(monkeypatch, process):
    a, s = level(process, TIME)
    gain, shift = GAIN.clone().requires_grad_(), SHIFT.clone().requires_grad_()
    noised = torch.distributions.MultivariateNormal(a * shift, a**2 * gain @ gain.T + s**2 * EYE)
    target = torch.distributions.MultivariateNormal(a * MEAN, a**2 * COV + s**2 * EYE)
    whole = torch.autograd.grad(torch.distributions.kl_divergence(noised, target), (shift, gain))

    method = DMD(weight="kl", student_times=at(TIME))
    grad_b, grad_a, _ = expected_gradient(monkeypatch, method, process, gaussian(MEAN, COV), (GAIN, SHIFT))
    torch.testing.assert_close((grad_b, grad_a), whole)


@every_method
@every_process
@every_target
def test_the_gradient_of_every_method_vanishes_at_the_teachers_law(monkeypatch, kind, process, target):
    law = Targeted(gaussian(MEAN, COV), target)
    student = torch.linalg.cholesky(COV), MEAN
    grad_b, grad_a, log = expected_gradient(monkeypatch, kind(), process, law, student, law)
    assert log["score_gap"] < 1e-20
    torch.testing.assert_close(grad_b, torch.zeros_like(grad_b), rtol=0, atol=1e-9)
    torch.testing.assert_close(grad_a, torch.zeros_like(grad_a), rtol=0, atol=1e-9)


@every_method
@every_process
def test_every_method_pulls_a_student_that_is_beside_the_teacher_towards_it(monkeypatch, kind, process):
    gain = torch.linalg.cholesky(COV)
    for shift in (MEAN + 1, MEAN - torch.tensor([0.1, -2.0, 0.5])):
        grad_b, _, _ = expected_gradient(monkeypatch, kind(), process, gaussian(MEAN, COV), (gain, shift.double()))
        assert grad_b @ (shift - MEAN) > 0


@every_method
@every_process
def test_a_student_that_is_one_point_stands_still_and_is_left_at_the_least_spread(monkeypatch, kind, process):
    """``A = 0`` is stationary, but P < R there, so that descent stretches any A beside it."""
    method, teacher = plainly(kind), gaussian(MEAN, COV)
    grad_a = expected_gradient(monkeypatch, method, process, teacher, (0 * GAIN, SHIFT))[1]
    torch.testing.assert_close(grad_a, torch.zeros_like(GAIN), rtol=0, atol=1e-9)
    for gain in (1e-3 * GAIN, 1e-3 * EYE, -1e-3 * GAIN):
        grad_a = expected_gradient(monkeypatch, method, process, teacher, (gain, SHIFT))[1]
        assert (grad_a * gain).sum() < 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@every_process
def test_sid_with_detached_networks_is_dmd(process, alpha):
    """The networks' own dependence on ``x_g`` is what SiD adds; without it every alpha is DMD."""
    torch.manual_seed(0)
    laws = {"teacher": gaussian(MEAN, COV), "fake": gaussian(SHIFT, GAIN @ GAIN.T)}
    live = {role: law.denoiser(process, "eps") for role, law in laws.items()}
    detached = {role: replace(net, target="x0", call=silent(net)) for role, net in live.items()}
    x_g, found = torch.randn(20, 3, dtype=torch.float64), {}
    for name, method, nets in [
        ("sid", SiD(alpha=alpha), live),
        ("detached", SiD(alpha=alpha), detached),
        ("dmd", DMD(), live),
    ]:
        torch.manual_seed(1)
        found[name], _ = method.gradient(nets, x_g, {})
    torch.testing.assert_close(found["detached"], found["dmd"])
    assert not torch.allclose(found["sid"], found["dmd"])


def silent(net: Denoiser):
    """The network's reading of the sample as its output, without a graph."""
    return lambda network, x, label, cond: net(x, net.process.time_of_label(label), cond).x0.detach()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DMD(), [0.4 / 0.45, -0.5 / 0.45]),
        (SwiftBrush(), [0.192, -0.24]),
        (DMD(weight="kl"), [0.4 / 0.5625, -0.5 / 0.5625]),
    ],
    ids=["dmd", "swiftbrush", "kl"],
)
def test_single_sample_by_hand(monkeypatch, method, expected):
    """``D_psi - D_phi = (.4, -.5)``; mean|x_g - D_phi| = .45; a s = .48; (s / a)^2 = .5625."""
    process, t = Trig(), float(torch.asin(torch.tensor(0.6, dtype=torch.float64)) / (torch.pi / 2))
    x_g, eps, real, fake = torch.tensor([[[0.5, -1.0]], [[1.0, 0.25]], [[0.2, -0.4]], [[0.6, -0.9]]]).double()
    nets = {
        role: Denoiser(Constant(value), process, "x0", call) for role, value in {"teacher": real, "fake": fake}.items()
    }
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    gradient, _ = replace(method, student_times=at(t)).gradient(nets, x_g, {})
    torch.testing.assert_close(gradient, torch.tensor([expected]).double())


def test_swiftbrush_is_the_difference_of_the_noise_predictions():
    """``sigma^2 (eps_phi - eps_psi)``, eq. 8, at a level per sample."""
    torch.manual_seed(0)
    process, x_g = PROCESSES["vp"], torch.randn(9, 3, dtype=torch.float64)
    nets = {"teacher": gaussian(MEAN, COV).denoiser(process), "fake": gaussian(SHIFT, COV).denoiser(process)}
    torch.manual_seed(1)
    gradient, _ = SwiftBrush().gradient(nets, x_g, {})
    torch.manual_seed(1)
    t = SwiftBrush().student_times.draw(process, x_g)
    x_t = process.add_noise(x_g, torch.randn_like(x_g), t)
    difference = nets["teacher"](x_t, t).eps - nets["fake"](x_t, t).eps
    torch.testing.assert_close(9 * gradient, process.sigma(t)[:, None].square() * difference)


def test_adaptive_weight_is_bounded_where_the_teacher_agrees_with_the_sample():
    process, x_g = FLOW, torch.ones(2, 3)
    nets = {
        "teacher": Denoiser(Constant(x_g), process, "x0", call),
        "fake": Denoiser(Constant(0 * x_g), process, "x0", call),
    }
    gradient, _ = DMD().gradient(nets, x_g, {})
    torch.testing.assert_close(gradient, torch.full((2, 3), -0.5e5))


THRESHOLDS = {
    **{
        name: (method, lambda a, s, p, weight=weight: weight(a, s) * s**2 * p, 2.0)
        for name, (method, weight) in BY_TIME.items()
    },
    **{
        f"sid {alpha}": (SiD(alpha=alpha, weight="one", student_times=at(TIME)), lambda a, s, p: (s**2 * p) ** 2, bound)
        for alpha, bound in ((0.5, 8.0), (1.0, 12.0), (1.2, 13.6))
    },
}
"""Of every method the unit of its gradient in the mean, and the speed that it needs at ``R = 3 P`` in that unit."""


@every_process
@pytest.mark.parametrize(("method", "unit", "threshold"), THRESHOLDS.values(), ids=THRESHOLDS)
def test_a_collapsed_student_needs_a_fake_network_faster_than_the_threshold(
    monkeypatch, process, method, unit, threshold
):
    """``db' = lambda (b - b')``, ``db = -eta g`` for the means: simulated at 0.95 and 1.05 of the critical lambda.

    It is ``R - P`` for a difference of denoisers, ``R (P + 2 alpha (R - P)) - P (2 P - R + 2 alpha (R - P))`` for SiD.
    """
    a, s = level(process, TIME)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    v_f = 1.5 * s**2
    p, gain = 1 / (3 * v_f), (one[:, None] * (v_f - s**2) / a**2).sqrt()
    teacher = gaussian(zero, one[:, None] * (3 * v_f - s**2) / a**2)

    def force(b, fake_mean):
        fake = gaussian(fake_mean, gain @ gain.T)
        grad_b, _, _ = expected_gradient(monkeypatch, method, process, teacher, (gain, b), fake)
        return grad_b.item() / unit(a, s, p)

    by_student, by_fake = force(one, zero), force(zero, one)
    assert -by_student == pytest.approx(threshold)

    def distance(speed):
        """How far means that start at 1 are from the teacher's after 40 units of time, in 40,000 Euler steps."""
        drift = torch.tensor([[-by_student, -by_fake], [speed, -speed]], dtype=torch.float64)
        steps = torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) + 1e-3 * drift, 40_000)
        return steps.sum(1).abs().sum().item()

    assert distance(0.95 * threshold) > 1.2 > 0.8 > distance(1.05 * threshold)


# The losses and where their gradients go


@every_method
def test_loss_of_the_student_has_the_methods_value_and_gradient(kind):
    torch.manual_seed(0)
    nets, batch, method = networks(), Batch(torch.randn(6, 8, dtype=torch.float64)), kind()
    torch.manual_seed(1)
    value, log = method.student_loss(nets, batch)
    value.backward()
    found = gradients(nets["student"])
    torch.manual_seed(1)
    x_g = method.generate(nets, batch, 0).x0
    gradient, expected = method.gradient(nets, x_g.detach(), {})
    x_g.backward(gradient)
    torch.testing.assert_close(value.detach(), expected["loss"])
    torch.testing.assert_close(found, gradients(nets["student"]))
    assert all(not scalar.requires_grad and scalar.ndim == 0 for scalar in log.values())
    assert {"loss", "score_gap", "x0_error", "std"} <= log.keys()


def test_dmd_is_its_surrogate_written_out():
    """``1/2 |x_g - sg[x_g - w (D_psi - D_phi)]|^2`` of a one-step student at ``sigma / alpha = 2.5`` of a flow."""
    torch.manual_seed(0)
    nets, batch = networks(), Batch(torch.randn(16, 8, dtype=torch.float64))
    torch.manual_seed(1)
    DMD().student_loss(nets, batch).value.backward()
    found = gradients(nets["student"])

    torch.manual_seed(1)
    sigma = 0.714  # 2.5 / 3.5 at the nearest whole label
    start = torch.full((16,), sigma, dtype=torch.float64)
    x_g = sigma * batch.noise - sigma * nets["student"].network(sigma * batch.noise, 1000 * start)
    with torch.no_grad():
        t = 0.02 + 0.96 * ((torch.arange(16, dtype=torch.float64) / 16 + torch.rand((), dtype=torch.float64)) % 1)
        x_t = (1 - t[:, None]) * x_g + t[:, None] * torch.randn_like(x_g)
        real, fake = (x_t - t[:, None] * nets[role].network(x_t, 1000 * t) for role in ("teacher", "fake"))
        wanted = x_g - (fake - real) / (x_g - real).abs().mean(1, keepdim=True)
    (0.5 * (x_g - wanted).square().sum(1).mean()).backward()
    torch.testing.assert_close(found, gradients(nets["student"]))


@every_method
@pytest.mark.parametrize("steps", [1, 3])
def test_each_loss_reaches_only_its_learner(kind, steps):
    torch.manual_seed(0)
    method, nets, batch = kind(steps=steps), networks(), Batch(torch.randn(4, 8, dtype=torch.float64))
    for step in range(4):
        for role, loss, _ in method.turns(step):
            loss(nets, batch).value.backward()
            arrived = {other: gradients(net) for other, net in nets.items()}
            assert len(arrived.pop(role)) == len(list(nets[role].network.parameters()))
            assert not any(arrived.values())


@every_method
def test_gradients_are_zero_until_the_fake_network_has_moved(kind):
    torch.manual_seed(0)
    nets = networks()
    nets["fake"] = copy.deepcopy(nets["teacher"])
    kind().student_loss(nets, Batch(torch.randn(4, 8, dtype=torch.float64))).value.backward()
    for grad in gradients(nets["student"]):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-10)


@every_method
def test_matching_needs_no_gradient_through_the_networks(kind):
    """Only SiD, which differentiates its denoisers, calls them with a graph."""
    torch.manual_seed(0)
    nets = networks()
    graphs = []
    for role in ("teacher", "fake"):
        nets[role] = replace(nets[role], call=lambda *told: (graphs.append(torch.is_grad_enabled()), call(*told))[1])
    kind().student_loss(nets, Batch(torch.randn(4, 8, dtype=torch.float64)))
    assert len(graphs) >= 2
    assert any(graphs) == (kind is SiD)


def test_steered_has_the_value_and_the_gradient_asked_for():
    x, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    value = steered(x, gradient, torch.tensor(7.0))
    value.backward()
    assert value.item() == 7.0
    torch.testing.assert_close(x.grad, gradient)


@every_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"fake_updates": 0}, "fake_updates must be at least 1, got 0"),
        ({"init_ratio": 0.0}, "init_ratio must be positive, got 0.0"),
        ({"init_ratio": float("nan")}, "init_ratio must be positive, got nan"),
        ({"uncond_share": 1.5}, r"uncond_share must lie in \[0, 1\], got 1.5"),
    ],
)
def test_settings_outside_their_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@every_method
@pytest.mark.parametrize("told", [{"init_ratio": float("inf")}, {"steps": 2, "levels": (30.0, 1.0)}], ids=str)
def test_eps_teachers_are_refused_where_they_say_nothing_of_the_sample(kind, told):
    """``x0 = (x - sigma eps) / alpha``: at ``sigma / alpha`` over 20 it is the noise of the network."""
    law, process = gaussian(MEAN, COV), PROCESSES["flow"]
    remedy = "levels" if "levels" in told else "init_ratio"
    with pytest.raises(ValueError, match=rf"{kind.__name__} reads x0 = .* set method\.{remedy}=20 or less"):
        kind(**told).check(law.denoiser(process, "eps"))
    for target in ("v", "x0", "flow", "edm"):
        kind(**told).check(law.denoiser(process, target))
    kind(init_ratio=14.6).check(law.denoiser(process, "eps"))  # the last entry of Stable Diffusion's table


@every_method
def test_unit_noise_is_refused_where_the_process_starts_louder(kind):
    teacher = gaussian(MEAN, COV).denoiser(PROCESSES["ve"], "edm")
    with pytest.raises(ValueError, match=r"sigma = 2\.\d+ where noise enters is not 1; set method\.input=sigma"):
        kind(init_ratio=2.5, input="unit").check(teacher)
    kind(init_ratio=2.5, input="sigma").check(teacher)


# Few-step students


@every_method
def test_turns_of_a_step_are_about_one_call_and_end_with_the_student(kind):
    method = kind(steps=3, fake_updates=4)
    for step in range(50):
        turns = list(method.turns(step))
        assert [turn.role for turn in turns] == ["fake"] * 4 + ["student"]
        assert len({called(turn) for turn in turns}) == 1


def called(turn) -> int:
    """The call of the student that a turn is about."""
    return turn.loss.keywords["call"]


def calls(method: ScoreDistillation, steps: int) -> list[int]:
    return [called(next(method.turns(step))) for step in range(steps)]


def test_processes_with_different_seeds_compare_the_same_calls():
    found = []
    for seed in range(2):
        random.seed(seed)
        torch.manual_seed(seed)
        found.append(calls(DMD(steps=4), 200))
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", [2, 4])
def test_calls_are_uniform_and_independent_of_the_call_before(steps):
    count, found = 8000, calls(DMD(steps=steps), 8001)
    for seen, cells in ((Counter(found[1:]), steps), (Counter(pairwise(found)), steps**2)):
        share = 1 / cells
        assert len(seen) == cells
        assert all(abs(n - count * share) < 4.5 * (count * share * (1 - share)) ** 0.5 for n in seen.values())


def test_final_matching_is_about_the_last_call():
    assert set(calls(DMD(steps=3, matched="final"), 100)) == {2}
    assert set(calls(DMD(steps=1), 100)) == {0}


class Gains(nn.Module):
    """An x0-network with one gain per level, so that the gradient says which call it came through."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__()
        self.labels, self.gain = labels, nn.Parameter(torch.full((len(labels),), 0.7, dtype=torch.float64))

    def forward(self, x, label):
        return self.gain[(label[:, None] - self.labels).abs().argmin(1)][:, None] * x


def unrolled(gains: Gains, process, sampler, noise, call: int):
    """What ``call`` says where no gradient stops between the calls; renoising draws what the sampler draws."""
    t, *levels = (torch.full((len(noise),), time, dtype=torch.float64) for time in sampler.times[: call + 1])
    x = process.student_input(noise, t, sampler.input)
    x0 = gains(x, process.label(t))
    for then in levels:
        a, s = process.coefficients(t, x)
        if sampler.renoising == "fresh":
            eps = torch.randn_like(noise)
        else:
            eps = noise if sampler.renoising == "fixed" else (x - a * x0) / s
        x, t = process.add_noise(x0, eps, then), then
        x0 = gains(x, process.label(t))
    return x0


@every_method
@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
def test_only_the_compared_call_learns(kind, process, renoising):
    """It learns what it would in an unrolled chain, in which the calls before it have a gradient too."""
    torch.manual_seed(0)
    method, noise = kind(steps=3, renoising=renoising), torch.randn(8, 3, dtype=torch.float64)
    sampler = method.sampler(process)
    gains = Gains(process.label(torch.tensor(sampler.times, dtype=torch.float64)))
    nets = {
        "teacher": gaussian(MEAN, COV).denoiser(process),
        "fake": gaussian(SHIFT, COV).denoiser(process),
        "student": Denoiser(gains, process, "x0", call),
    }
    for k in range(3):
        torch.manual_seed(k)
        method.student_loss(nets, Batch(noise), call=k).value.backward()
        (grad,) = gradients(nets["student"])
        assert grad.nonzero().flatten().tolist() == [k]
        torch.manual_seed(k)
        x_g = unrolled(gains, process, sampler, noise, k)
        x_g.backward(method.gradient(nets, x_g.detach(), {})[0])
        (whole,) = gradients(nets["student"])
        torch.testing.assert_close(whole[k], grad[k])
        assert whole.nonzero().flatten().tolist() == list(range(k + 1))


@every_method
def test_calls_before_the_compared_one_leave_no_graph(kind):
    nets, seen = networks(), []
    nets["student"] = replace(
        nets["student"], call=lambda *told: (seen.append(torch.is_grad_enabled()), call(*told))[1]
    )
    method = replace(kind(steps=4), **({"low_memory": False} if kind is SiD else {}))
    method.student_loss(nets, Batch(torch.randn(4, 8, dtype=torch.float64)), call=2)
    assert seen == [False, False, True]
    seen.clear()
    method.fake_loss(nets, Batch(torch.randn(4, 8, dtype=torch.float64)), call=2)
    assert seen == [False, False, False]


ENDS, SPREAD = (-1.0, 0.5), 0.25
"""Means and variance of the samples of two calls."""
BOTH = Mixture(*(torch.tensor(v).double() for v in ([0.5, 0.5], [[end] for end in ENDS], [[[SPREAD]], [[SPREAD]]])))
OTHER = Mixture(*(torch.tensor(v).double() for v in ([0.3, 0.7], [[-0.7], [1.2]], [[[0.2]], [[0.5]]])))


def by_call(monkeypatch, a: float, s: float):
    """Samples, their noise and their weights in the expectation of each call."""
    for mean in ENDS:
        x_g, eps, weight = scattered(mean, SPREAD, a, s)
        monkeypatch.setattr(torch, "randn_like", lambda like, eps=eps: eps)
        yield x_g, a * x_g + s * eps, weight


@every_method
@every_process
@every_target
def test_the_fake_network_learns_the_mixture_of_all_calls(monkeypatch, kind, process, target):
    """Its posterior mean makes ``E[u(x_t) (x_g - D)] = 0`` for any ``u``: over the calls, and for no call alone."""
    method, (a, s) = kind(steps=2, fake_times=at(TIME)), level(process, TIME)
    fake, slopes = BOTH.denoiser(process, target), []
    first = process.label(torch.tensor(method.sampler(process).times[:1], dtype=torch.float64))
    samples = [scattered(mean, SPREAD, a, s)[0] for mean in ENDS]
    for k, (x_g, x_t, weight) in enumerate(by_call(monkeypatch, a, s)):
        tilt = torch.zeros_like(x_g).requires_grad_()
        nets = {
            "teacher": fake,
            "fake": replace(fake, call=lambda *told, tilt=tilt: call(*told) + tilt),
            "student": Denoiser(
                nn.Identity(), process, "x0", lambda net, x, label, cond: samples[int(label[0] != first)]
            ),
        }
        (slope,) = torch.autograd.grad(method.fake_loss(nets, Batch(torch.zeros_like(x_g)), call=k).value, tilt)
        slopes.append(torch.stack([(len(x_g) * weight * slope * u).sum() for u in (1, x_t, x_t.sin() + x_t.square())]))
    torch.testing.assert_close(slopes[0], -slopes[1], rtol=1e-7, atol=1e-8)
    assert slopes[0].abs().min() > 0.01


def divergence(name: str, process, means: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler or Fisher divergence of the noised mixture of calls from that of ``OTHER``; scalar."""
    a, s = level(process, TIME)
    x = torch.linspace(-3 * a - 9 * s, 3 * a + 9 * s, 4001, dtype=torch.float64)[:, None].requires_grad_()

    def log_density(law: Mixture, means: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(a * means, (a**2 * law.spreads[:, 0] + s**2).sqrt())
        return (law.weights.log() + normal.log_prob(x)).logsumexp(1)

    mine, theirs = log_density(BOTH, means), log_density(OTHER, OTHER.means[:, 0])
    if name == "kl":
        integrand = mine - theirs
    else:
        (gap,) = torch.autograd.grad((mine - theirs).sum(), x, create_graph=True)
        integrand = (s**2 / a * gap[:, 0]).square()
    return torch.trapezoid(mine.exp() * integrand, x[:, 0])


@every_process
@pytest.mark.parametrize(
    ("method", "name", "scale"),
    [
        *((method, "kl", lambda a, s, w=weight: w(a, s) * s**2 / a**2) for method, weight in BY_TIME.values()),
        (SiD(weight="one", alpha=0.5, student_times=at(TIME)), "fisher", lambda a, s: 0.5),
    ],
    ids=[*BY_TIME, "sid"],
)
def test_every_call_descends_the_divergence_of_the_mixture_of_all_calls(monkeypatch, process, method, name, scale):
    """The gradients in the means of both calls, the fake network being the mixture's own denoiser."""
    a, s = level(process, TIME)
    nets, found = {"teacher": OTHER.denoiser(process), "fake": BOTH.denoiser(process)}, []
    for x_g, _, weight in by_call(monkeypatch, a, s):
        gradient, _ = method.gradient(nets, x_g, {})
        found.append((len(x_g) * weight * gradient).sum() / 2)
    means = torch.tensor(ENDS, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(divergence(name, process, means), means)
    torch.testing.assert_close(torch.stack(found), scale(a, s) * whole, rtol=1e-6, atol=1e-8)


@every_process
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sids_loss_is_one_minus_alpha_times_the_divergence_over_calls_and_not_for_each(monkeypatch, process, alpha):
    a, s = level(process, TIME)
    real, fake, values, gaps = OTHER.denoiser(process), BOTH.denoiser(process), [], []
    for x_g, x_t, weight in by_call(monkeypatch, a, s):
        t = torch.full((len(x_g),), TIME, dtype=torch.float64)
        told = real(x_t, t).x0, fake(x_t, t).x0
        values.append((weight[:, 0] * identity_loss(x_g, *told, alpha)).sum())
        gaps.append((weight * (told[0] - told[1]).square()).sum())
    torch.testing.assert_close(sum(gaps) / 2, divergence("fisher", process, torch.tensor(ENDS).double()).detach())
    torch.testing.assert_close(sum(values), (1 - alpha) * sum(gaps), rtol=1e-7, atol=1e-8)
    assert abs(values[0] - (1 - alpha) * gaps[0]) > 1e-3


# Guidance


class Classes(nn.Module):
    """One network per label, label 0 being none; remembers what it was asked."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts, self.asked = nn.ModuleList(parts), []

    def forward(self, x, label, class_labels):
        self.asked.append(class_labels.tolist())
        return torch.stack([part(x, label) for part in self.parts])[class_labels, torch.arange(len(x))]


def conditional(laws: list, process, target: Target = "x0", scale=None) -> Denoiser:
    """A denoiser of one law per label; ``scale`` of a guidance whose null label is 0."""
    network = Classes([law.denoiser(process, target).network for law in laws])
    guidance = None if scale is None else Guidance(scale, {"class_labels": torch.tensor([0])})
    return Denoiser(network, process, target, call, sigma_data=SIGMA_DATA, guidance=guidance)


NULL = torch.tensor([-0.2, 0.3, 0.1], dtype=torch.float64)


@every_method
@every_process
@every_target
def test_laws_of_equal_covariance_are_matched_at_the_guided_mean(monkeypatch, kind, process, target):
    """``D_0 + k (D_c - D_0)`` is then the denoiser of ``N(m_0 + k (m_c - m_0), S)``, and students go there.

    Their gradient is affine in their mean: one Newton step ends at its zero, and descent does where its slope is
    positive.
    """
    scale, (z, eps) = 2.5, cubature(6).split(3, dim=1)
    teacher = conditional([gaussian(NULL, COV), gaussian(MEAN, COV)], process, target, scale)
    cond, gain = {"class_labels": torch.ones(12, dtype=torch.long)}, torch.linalg.cholesky(COV)
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)

    def pull(shift):
        nets = {"teacher": teacher, "fake": conditional([gaussian(shift, COV)] * 2, process, target)}
        return plainly(kind).gradient(nets, z @ gain.T + shift, cond)[0].sum(0)

    slopes = torch.stack([pull(NULL + unit) - pull(NULL) for unit in EYE], 1)
    found = NULL - torch.linalg.solve(slopes, pull(NULL))
    torch.testing.assert_close(found, NULL + scale * (MEAN - NULL), rtol=0, atol=1e-7)
    assert torch.linalg.eigvals(slopes).real.min() > 0


def guidances(kind: type[ScoreDistillation]) -> list[str]:
    """The settings of a method that are scales of its fake network."""
    return [name for name in kind.__dataclass_fields__ if name.endswith("_guidance")]


FREE = [kind for kind in SCORE if len(guidances(kind)) > 1]
"""Methods whose fake network may be asked under another scale than the teacher, as Zero-CFG does."""
BENCH = Trig(), float(torch.asin(torch.tensor(0.6, dtype=torch.float64)) / (torch.pi / 2))
"""The process and time of ``a = 0.8``, ``s = 0.6``."""


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize(
    ("process", "t"), [*((process, TIME) for process in PROCESSES.values()), BENCH], ids=[*PROCESSES, "bench"]
)
@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0], ids=["zero-cfg", "anti-cfg", "conditional"])
def test_other_guidance_of_the_fake_network_is_an_implicit_guidance_of_known_size(monkeypatch, kind, process, t, scale):
    """At the teacher's law, two classes at +-1: ``E[D_psi(0) - D_phi(c)] = -2 s^2 / V_r E[u]``, not 0; u = 1 - pi_c.

    With the scale k of the fake network it is ``1 - k`` times that, twice as much for Anti-CFG, and the student goes
    beyond its class.  SiD's gradient is ``s^2 / V_r`` times it plus what the slope of ``u`` adds, of the other sign.
    """
    (a, s), v = level(process, t), 0.4
    ends, half = torch.tensor([[-1.0], [1.0]]).double(), torch.full((2,), 0.5).double()
    laws = [
        Mixture(half, ends, torch.full((2, 1, 1), v).double()),
        *(gaussian(end, torch.tensor([[v]]).double()) for end in ends),
    ]
    method = replace(plainly(kind, **dict.fromkeys(guidances(kind), scale)), student_times=at(t))
    nets = {"teacher": conditional(laws, process, scale=1.0), "fake": conditional(laws, process)}
    method.check(nets["teacher"])
    pulls = []
    for label, end in ((1, -1.0), (2, 1.0)):
        x_g, eps, weight = scattered(end, v, a, s)
        monkeypatch.setattr(torch, "randn_like", lambda like, eps=eps: eps)
        gradient, _ = method.gradient(nets, x_g, {"class_labels": torch.full((len(x_g),), label)})
        pulls.append((len(x_g) * weight * gradient).sum().item())
    variance = a**2 * v + s**2
    u = torch.sigmoid(-2 * a * (a * x_g + s * eps) / variance)
    other, overlap = ((weight * each).sum().item() for each in (u, u.square() * (1 - u)))
    gap = 2 * (1 - scale) * s**2 / variance
    if kind is SiD:
        expected = gap**2 * 4 * a**2 / variance * overlap - s**2 / variance * gap * other
    else:
        expected = -gap * other
        assert expected <= 0
    assert pulls[1] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert sum(pulls) == pytest.approx(0, abs=1e-9)
    if (process, t) == BENCH and kind is DMD:
        assert pulls[1] == pytest.approx(-0.2553 * (1 - scale), rel=2e-3)


@every_method
@every_process
@every_target
@pytest.mark.parametrize("scale", [2.5, -1.0])
def test_a_fake_network_trained_under_its_scale_says_guided_what_the_samples_of_a_condition_are(
    monkeypatch, kind, process, target, scale
):
    """Whatever the scale: it leaves no trace in the gradient, where the fake network is asked as it was trained."""
    t = torch.full((16,), TIME, dtype=torch.float64)
    z, eps = cubature(2).repeat(4, 1).split(1, dim=1)
    law = [gaussian(*(torch.tensor(v).double() for v in ([m], [[v]]))) for m, v in ((-0.8, 0.5), (0.6, 0.3))]
    kinds = torch.arange(2).repeat_interleave(4).repeat(2)
    x_g = torch.tensor([-0.8, 0.6]).double()[kinds, None] + torch.tensor([0.5, 0.3]).double()[kinds, None].sqrt() * z
    cond = {"class_labels": torch.cat([1 + kinds[:8], torch.zeros(8, dtype=torch.long)])}
    monkeypatch.setattr(torch, "randn_like", lambda like: eps[: len(like)])

    method = plainly(kind, fake_times=at(TIME), uncond_share=0.0, **dict.fromkeys(guidances(kind), scale))
    tables = [Table(process.label(t[:1]), 1) for _ in range(3)]
    nets = {
        "teacher": conditional([OTHER, *law], process, target, scale),
        "fake": Denoiser(Classes(tables), process, target, call, sigma_data=SIGMA_DATA),
    }
    minimise(method.following_loss(nets, Batch(x_g, cond), x_g).value, [table.weight for table in tables])

    x_t, told = process.add_noise(x_g, eps, t), fake_guided(nets, scale)
    for label, samples in enumerate(law, 1):
        rows = cond["class_labels"] == label
        given = x_t[rows], t[rows], {"class_labels": cond["class_labels"][rows]}
        wanted = samples.denoiser(process)(*given[:2]).x0
        torch.testing.assert_close(told(*given).x0, wanted, rtol=1e-8, atol=1e-8)
        assert (nets["fake"](*given).x0 - wanted).abs().max() > 1e-3, "its condition alone says something else"
        perfect = {**nets, "fake": conditional([samples] * 3, process, target)}
        gradients = [method.gradient(each, x_g[rows], given[2])[0] for each in (nets, perfect)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


def constants(values: list[float], scale=None) -> Denoiser:
    """A flow denoiser that says ``values[label]`` of every state."""
    network = Classes([Constant(torch.full((1, 2), value, dtype=torch.float64)) for value in values])
    guidance = None if scale is None else Guidance(scale, {"class_labels": torch.tensor([0])})
    return Denoiser(network, FLOW, "x0", call, guidance=guidance)


def asked_of(net: Denoiser) -> list[list[int]]:
    """The labels of every call so far."""
    assert isinstance(net.network, Classes)
    return net.network.asked


LABELLED = {"class_labels": torch.ones(4, dtype=torch.long)}


def guided(values: tuple[float, float], scale: float) -> float:
    return values[0] + scale * (values[1] - values[0])


def test_the_scales_of_fake_network_and_teacher_are_separate():
    """Teacher (.1, .7) under 3; fake network (.2, .5) under its own: by hand."""
    real, fake, x_g = (0.1, 0.7), (0.2, 0.5), torch.full((4, 2), 0.3, dtype=torch.float64)
    nets = {"teacher": constants(list(real), 3.0), "fake": constants(list(fake))}
    gradient, _ = DMD(weight="one", eval_guidance=-1.0, fake_guidance=7.0).gradient(nets, x_g, LABELLED)
    torch.testing.assert_close(4 * gradient, torch.full((4, 2), guided(fake, -1.0) - guided(real, 3.0)).double())

    method = SiD(weight="one", alpha=0.8, delta_guidance=2.0, bracket_guidance=0.0, fake_guidance=7.0)
    gradient, log = method.gradient(nets, x_g, LABELLED)
    delta, bracket = (guided(real, 3.0) - guided(fake, k) for k in (2.0, 0.0))
    torch.testing.assert_close(4 * gradient, torch.full((4, 2), -delta).double())
    assert log["loss"].item() == pytest.approx(2 * delta * (guided(real, 3.0) - 0.3 - 0.8 * bracket))
    assert log["score_gap"].item() == pytest.approx(delta**2)

    gradient, _ = SwiftBrush(student_times=at(0.5), fake_guidance=7.0).gradient(nets, x_g, LABELLED)
    torch.testing.assert_close(
        4 * gradient, torch.full((4, 2), 0.25 * (guided(fake, 3.0) - guided(real, 3.0))).double()
    )


@every_method
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_fake_network_learns_under_its_own_scale(kind, scale):
    nets = {"teacher": constants([0.1, 0.7], 3.0), "fake": constants([0.2, 0.5]), "student": constants([9.0, 0.3])}
    method = kind(fake_guidance=scale, uncond_share=0.0)
    loss = method.fake_loss(nets, Batch(torch.randn(4, 2, dtype=torch.float64), LABELLED))
    assert loss.value.item() == pytest.approx(2 * (guided((0.2, 0.5), scale) - 0.3) ** 2)


def test_vsd_with_an_unguided_fake_network_is_the_extrapolation_alone():
    """The fake network being the teacher, scale 1 beside k leaves ``-a s (k - 1) (D_c - D_0)``."""
    real, x_g = [0.1, 0.7], torch.zeros(4, 2, dtype=torch.float64)
    nets = {"teacher": constants(real, 4.5), "fake": constants(real)}
    method = SwiftBrush(student_times=at(0.4))
    gradient, _ = matching_gradient(method, nets, x_g, LABELLED, fake_scale=1.0, weight="vsd")
    torch.testing.assert_close(4 * gradient, torch.full((4, 2), -0.24 * 3.5 * 0.6).double())
    gradient, _ = method.gradient(nets, x_g, LABELLED)
    torch.testing.assert_close(gradient, torch.zeros(4, 2).double())


@pytest.mark.parametrize(("scale", "asked"), [(1.0, [1] * 4), (0.0, [0] * 4), (3.0, [0] * 4 + [1] * 4)])
def test_guidance_of_scale_one_and_zero_takes_one_pass(scale, asked):
    x_g = torch.zeros(4, 2, dtype=torch.float64)
    nets = {"teacher": constants([0.1, 0.7], scale), "fake": constants([0.2, 0.5])}
    DMD().gradient(nets, x_g, LABELLED)
    assert asked_of(nets["teacher"]) == [asked]
    assert asked_of(nets["fake"]) == [[1] * 4]
    nets = {"teacher": constants([0.1, 0.7], 1.0), "fake": constants([0.2, 0.5])}
    DMD(eval_guidance=scale).gradient(nets, x_g, LABELLED)
    assert asked_of(nets["teacher"]) == [[1] * 4]
    assert asked_of(nets["fake"]) == [asked]


def test_guidance_zero_within_an_interval_still_needs_the_condition_outside():
    inside = replace(constants([0.1, 0.7]), guidance=Guidance(0.0, {"class_labels": torch.tensor([0])}, (0.2, 0.6)))
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    found = inside(torch.zeros(4, 2, dtype=torch.float64), t, LABELLED).x0[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.7, 0.1, 0.1, 0.7]).double())


def test_the_bracket_of_sid_takes_another_pass_only_where_its_scale_differs():
    x_g = torch.zeros(4, 2, dtype=torch.float64)
    for bracket, passes in ((2.0, 1), (1.5, 2)):
        nets = {"teacher": constants([0.1, 0.7], 2.0), "fake": constants([0.2, 0.5])}
        SiD(delta_guidance=2.0, bracket_guidance=bracket).gradient(nets, x_g, LABELLED)
        assert len(asked_of(nets["fake"])) == passes


@pytest.mark.parametrize(
    ("method", "teacher_scale", "lost"),
    [
        (DMD(), 3.0, False),
        (DMD(eval_guidance=2.0), 3.0, True),
        (DMD(fake_guidance=2.0), 1.0, True),
        (DMD(eval_guidance=0.0), 1.0, True),
        (DMD(eval_guidance=2.0), None, False),
        (SiD(delta_guidance=2.0), 3.0, True),
        (SiD(bracket_guidance=2.0), 3.0, True),
        (SiD(), 3.0, False),
        (SwiftBrush(), 3.0, True),
        (SwiftBrush(), 1.0, False),
        (SwiftBrush(), torch.full((4,), 3.0), True),
    ],
)
def test_conditions_are_dropped_only_where_the_fake_network_is_ever_guided(method, teacher_scale, lost):
    nets = {
        "teacher": constants([0.1, 0.7], teacher_scale),
        "fake": constants([0.2, 0.5]),
        "student": constants([0.0, 0.3]),
    }
    method = replace(method, uncond_share=1.0, fake_guidance=method.fake_guidance)
    method.fake_loss(nets, Batch(torch.randn(4, 2, dtype=torch.float64), LABELLED))
    (asked,) = asked_of(nets["fake"])
    assert asked[-4:] == [0 if lost else 1] * 4
    assert asked_of(nets["student"]) == [[1] * 4], "the student is always told its condition"


def test_dropped_conditions_are_whole_rows_of_every_tensor():
    torch.manual_seed(0)
    cond = {"words": torch.ones(1000, 3, 2), "class_labels": torch.ones(1000, dtype=torch.long)}
    null = {"words": torch.zeros(1, 3, 2), "class_labels": torch.zeros(1, dtype=torch.long)}
    found = dropped(cond, null, 0.1, 1000)
    kept = found["class_labels"]
    torch.testing.assert_close(found["words"], kept.float().view(-1, 1, 1).expand(1000, 3, 2))
    assert 50 < (kept == 0).sum() < 150
    for share, label in ((0.0, 1), (1.0, 0)):
        assert (dropped(cond, null, share, 1000)["class_labels"] == label).all()


@pytest.mark.parametrize("method", [DMD(eval_guidance=0.0), SiD(bracket_guidance=2.0), SwiftBrush(fake_guidance=2.0)])
def test_guidance_of_the_fake_network_needs_a_null_condition(method):
    with pytest.raises(ValueError, match=r"data\.null_label"):
        method.check(constants([0.1, 0.7]))
    method.check(constants([0.1, 0.7], 1.0))


# Learning

SETTINGS = {
    "DMD": DMD(),
    "SiD": SiD(),
    **{kind.__name__: kind() for kind in SCORE if kind not in (DMD, SiD)},
    **{f"SiD {alpha} adaptive": SiD(alpha=alpha) for alpha in (0.5, 1.2)},
    **{f"SiD {alpha} one": SiD(alpha=alpha, weight="one") for alpha in (0.5, 1.0)},
}


@pytest.mark.parametrize(("start", "bound"), [("broad", 0.01), ("one mode", 0.03)])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[] if name in ("DMD", "SiD") else pytest.mark.slow)
        for name, method in SETTINGS.items()
    ],
)
def test_particles_with_their_exact_fake_network_become_the_teachers_samples(method, start, bound):
    """Of the lighter left mode, a student that starts within the right one must find 30 %."""
    energy, mass = particles(method, start)
    assert energy < bound
    if start == "broad":
        assert 0.62 < mass < 0.74


@pytest.mark.slow
def test_the_exact_divergence_never_leaves_a_mode():
    """Why ``adaptive`` is the default: at low levels ``1 / sigma^2`` holds every particle where it is."""
    energy, mass = particles(DMD(weight="kl"), "one mode")
    assert energy > 0.2
    assert mass == 1.0
    energy, mass = particles(DMD(weight="kl"), "broad")
    assert 0.62 < mass < 0.74
    apart = energy_distance(*(gaussian(*mode).sample(4000) for mode in zip(MODES, COVS, strict=True)))
    assert energy < 0.005 + (mass - 0.7) ** 2 * apart, "beside what the share of each mode at the start explains"


MODES, COVS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.15, 0.25]).square()[:, None, None] * torch.eye(2)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` of two samples."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def particles(method: ScoreDistillation, start: str, steps: int = 1500) -> tuple[float, float]:
    """192 particles that follow their exact critic: energy distance to the teacher's law, share of its right mode."""
    torch.manual_seed(0)
    law = Mixture(torch.tensor([0.3, 0.7]), MODES, COVS)
    process, points = VE(sigma_min=0.05, sigma_max=10.0), torch.randn(192, 2)
    if start == "one mode":
        points = MODES[1] + 0.25 * points
    memory = {"low_memory": False} if isinstance(method, SiD) else {}
    method = replace(method, student_times=UniformTimes(low=0.0, high=0.8), **memory)
    optimizer = torch.optim.Adam([points], lr=1e-2, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nets = {"teacher": law.denoiser(process), "fake": Particles(points, process).denoiser()}
    for _ in range(steps):
        points.grad, _ = method.gradient(nets, points.clone(), {})
        optimizer.step()
        schedule.step()
    nearest = torch.cdist(points, MODES).argmin(1)
    return energy_distance(points, law.sample(4000)), nearest.double().mean().item()
