"""One network output, many readings: targets, guidance, views and precision of the denoiser."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from oracles import PROCESSES, TARGETS, call, gaussian
from torch import nn

from stepdistill.denoiser import Denoiser, Guidance, Target
from stepdistill.process import Flow, NoiseProcess

SIGMA_DATA, BOUNDARY = 0.7, 0.04
ALL_TARGETS: tuple[Target, ...] = (*TARGETS, "consistency")
TIMES = torch.linspace(0.15, 0.85, 5, dtype=torch.float64)
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", ALL_TARGETS)


class Recorder(nn.Module):
    """Answers with ``answer(x, **cond)`` and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x, label, **cond):
        self.calls.append((x, label))
        return self.answer(x, **cond)


def asked_of(denoiser: Denoiser):
    """The states and labels that a recording network was called with."""
    assert isinstance(denoiser.network, Recorder)
    return denoiser.network.calls


class Smooth(nn.Module):
    """A small network of state and label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x, label):
        return torch.tanh(self.mix(x)) * torch.cos(label)[:, None]


def exactly(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def truth(seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, len(TIMES), 2, dtype=torch.float64)


def output_for(target: Target, process: NoiseProcess, x0, eps):
    """What a perfect network of each kind outputs, from the definitions of the papers."""
    a, s = process.coefficients(TIMES, x0)
    x, total = a * x0 + s * eps, (s**2 + SIGMA_DATA**2).sqrt()
    c_skip, c_out = SIGMA_DATA**2 / total**2, s * SIGMA_DATA / total
    if target == "consistency":
        c_skip = SIGMA_DATA**2 / ((s - BOUNDARY) ** 2 + SIGMA_DATA**2)
        c_out = (s - BOUNDARY) * SIGMA_DATA / total
    outputs = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}
    return outputs.get(target, (x0 - c_skip * x) / c_out)


def perfect(target: Target, process: NoiseProcess, x0, eps, *, negated=False):
    out = output_for(target, process, x0, eps)
    network = Recorder(lambda x: -out if negated else out)
    return Denoiser(network, process, target, call, negated, SIGMA_DATA, BOUNDARY if target == "consistency" else 0.0)


@every_process
@every_target
@pytest.mark.parametrize("negated", [False, True])
def test_every_target_reads_the_same_sample_and_noise(process, target, negated):
    x0, eps = truth()
    x_t = process.add_noise(x0, eps, TIMES)
    denoiser = perfect(target, process, x0, eps, negated=negated)
    prediction = denoiser(x_t, TIMES)
    exactly(prediction.x0, x0)
    exactly(prediction.eps, eps)

    ((asked, label),) = asked_of(denoiser)
    _, s = process.coefficients(TIMES, x_t)
    preconditioned = target in ("edm", "consistency")
    exactly(asked, x_t / (s**2 + SIGMA_DATA**2).sqrt() if preconditioned else x_t)
    exactly(label, process.label(TIMES))


@every_process
def test_velocity_is_the_motion_of_the_noisy_sample(process):
    x0, eps = truth()
    prediction = perfect("x0", process, x0, eps)(process.add_noise(x0, eps, TIMES), TIMES)
    moving = lambda t: process.add_noise(x0, eps, t)  # noqa: E731
    exactly(prediction.velocity, torch.func.jvp(moving, (TIMES,), (torch.ones_like(TIMES),))[1], 1e-10)


def test_velocity_of_rectified_flow_is_the_network_output():
    x0, eps = truth()
    prediction = perfect("flow", Flow(), x0, eps)(Flow().add_noise(x0, eps, TIMES), TIMES)
    exactly(prediction.velocity, eps - x0)


@every_process
def test_score_is_the_gradient_of_the_gaussian_density(process):
    x_t, t = truth()[0], TIMES
    a, s = process.coefficients(t, x_t)
    cov = a[..., None] ** 2 * COV + s[..., None] ** 2 * torch.eye(2, dtype=torch.float64)
    expected = -torch.linalg.solve(cov, x_t - a * MEAN)
    exactly(gaussian(MEAN, COV).denoiser(process)(x_t, t).score, expected, 1e-10)


@every_process
@every_target
def test_readings_put_the_state_together_again(process, target):
    x_t = truth()[0]
    denoiser = Denoiser(Smooth(), process, target, call, sigma_data=SIGMA_DATA)
    prediction = denoiser(x_t, TIMES)
    exactly(process.add_noise(prediction.x0, prediction.eps, TIMES), x_t, 1e-10)


@pytest.mark.parametrize(("native", "view"), product(PROCESSES, PROCESSES))
def test_a_view_denoises_as_a_denoiser_of_that_process(native, view):
    law, x = gaussian(MEAN, COV), truth()[0]
    t = PROCESSES[view].time_at_log_snr(-2 * torch.tensor([0.06, 0.3, 1.0, 3.0, 9.0], dtype=torch.float64).log())
    viewed = law.denoiser(PROCESSES[native]).under(PROCESSES[view])
    prediction, expected = viewed(x, t), law.denoiser(PROCESSES[view])(x, t)
    assert prediction.process is PROCESSES[view]
    exactly(prediction.x0, expected.x0, 1e-10)
    exactly(prediction.eps, expected.eps, 1e-10)
    exactly(prediction.velocity, expected.velocity, 1e-10)


def test_a_view_beyond_the_levels_of_the_network_asks_at_their_ends():
    network = Recorder(torch.zeros_like)
    ve = PROCESSES["ve"]
    denoiser = Denoiser(network, ve, "edm", call).under(Flow())
    denoiser(truth()[0][:2], torch.tensor([0.0, 1.0]))
    exactly(network.calls[0][1], ve.label(torch.tensor([0.0, 1.0])))


def class_answer(x, c):
    return x * c + torch.sin(c)


def rows(*values):
    return {"c": torch.tensor(values, dtype=torch.float64)[:, None]}


def guided(scale, uncond=None, interval=(0.0, 1.0), process=None):
    denoiser = Denoiser(Recorder(class_answer), process or Flow(), "flow", call)
    return replace(denoiser, guidance=Guidance(scale, uncond or rows(0.5), interval))


COND = rows(1.0, 2.0, -1.0, 0.0, 3.0)


def test_guidance_extrapolates_from_one_doubled_call():
    x, denoiser = truth()[0], guided(2.5)
    prediction = denoiser(x, TIMES, COND)
    uncond, cond = class_answer(x, rows(0.5)["c"]), class_answer(x, COND["c"])
    exactly(prediction.eps - prediction.x0, uncond + 2.5 * (cond - uncond))
    ((asked, label),) = asked_of(denoiser)
    exactly(asked, torch.cat([x, x]))
    exactly(label, denoiser.process.label(torch.cat([TIMES, TIMES])))


@pytest.mark.parametrize(("scale", "cond"), [(1.0, COND), (0.0, rows(*[0.5] * 5))])
def test_guidance_scale_one_is_conditional_and_zero_is_unconditional(scale, cond):
    x, denoiser = truth()[0], guided(scale)
    exactly(denoiser(x, TIMES, COND).x0, replace(denoiser, guidance=None)(x, TIMES, cond).x0)


def test_every_sample_may_have_its_own_guidance_scale():
    x, scales = truth()[0], torch.tensor([0.0, 1.0, 1.5, 4.0, 7.5], dtype=torch.float64)
    together = guided(scales)(x, TIMES, COND).x0
    alone = [guided(scale.item())(x, TIMES, COND).x0[k] for k, scale in enumerate(scales)]
    exactly(together, torch.stack(alone))


@pytest.mark.parametrize("two_passes", [False, True])
def test_a_network_that_takes_few_rows_at_once_answers_as_one_that_takes_all(two_passes):
    x, whole = truth()[0], guided(2.5)
    assert whole.guidance is not None
    few = replace(guided(2.5), guidance=replace(whole.guidance, two_passes=two_passes), at_once=2)
    exactly(few(x, TIMES, COND).x0, whole(x, TIMES, COND).x0)
    assert [len(asked) for asked, _ in asked_of(few)] == ([2, 2, 1] * 2 if two_passes else [2] * 5)
    velocity = torch.ones_like(x)
    slopes = [torch.func.jvp(lambda x, d=d: d(x, TIMES, COND).x0, (x,), (velocity,))[1] for d in (few, whole)]
    exactly(*slopes)


def test_guidance_acts_within_its_interval_only():
    x = truth()[0]
    within = guided(3.0, interval=(TIMES[1].item(), TIMES[3].item()))(x, TIMES, COND).x0
    everywhere, nowhere = guided(3.0)(x, TIMES, COND).x0, guided(1.0)(x, TIMES, COND).x0
    exactly(within, torch.cat([nowhere[:1], everywhere[1:4], nowhere[4:]]))
    assert bool(((everywhere - nowhere).abs().amax(1) > 1e-3).all())


def test_guidance_interval_is_in_the_time_of_the_network_under_a_view():
    x, low = truth()[0], Flow().sigma(TIMES[2]).item()
    t = PROCESSES["trig"].time_at_log_snr(Flow().log_snr(TIMES))
    view = guided(3.0, interval=(low - 1e-9, 1.0)).under(PROCESSES["trig"])
    strong, none = (guided(scale).under(PROCESSES["trig"])(x, t, COND).x0 for scale in (3.0, 1.0))
    exactly(view(x, t, COND).x0, torch.cat([none[:2], strong[2:]]))


def test_the_null_condition_of_a_sample_moves_only_that_sample():
    x = truth()[0]
    before = guided(2.0, rows(0.5, 0.5, 0.5, 0.5, 0.5))(x, TIMES, COND).x0
    after = guided(2.0, rows(0.5, 0.5, -3.0, 0.5, 0.5))(x, TIMES, COND).x0
    changed = (after - before).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, False, True, False, False]
    exactly(after[~changed], before[~changed])
    exactly(before, guided(2.0)(x, TIMES, COND).x0)


def test_a_half_precision_network_is_told_its_numbers_exactly():
    """In bfloat16 999 is 1000, 0.001 is 0.000999 and 3.7 is 3.703; what is no number a sample is cast."""
    told = {}
    network = Recorder(lambda x, **cond: told.update(cond) or x)
    network.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    numbers = {"guidance": 3.7, "target_label": 997.0, "timestep_scale": 0.001}
    cond = {**{key: torch.full((2,), value) for key, value in numbers.items()}, "text": torch.ones(2, 3)}
    times = torch.tensor([0.997, 0.999], dtype=torch.float64)
    Denoiser(network, Flow(), "flow", call)(torch.ones(2, 2), times, cond)
    [(x, label)] = network.calls
    torch.testing.assert_close(label.double(), Flow().label(times))
    assert {key: told[key].tolist() for key in numbers} == {key: cond[key].tolist() for key in numbers}
    assert x.dtype == told["text"].dtype == torch.bfloat16


@every_process
@every_target
def test_conversion_of_a_half_precision_output_is_in_float32(process, target):
    x0, eps = (part.float() for part in truth())
    x_t = process.add_noise(x0, eps, TIMES)
    half = output_for(target, process, x0, eps).bfloat16()
    readings = [
        Denoiser(Recorder(lambda x, out=out: out), process, target, call, sigma_data=SIGMA_DATA)(x_t, TIMES)
        for out in (half, half.float())
    ]
    for name in ("x0", "eps", "velocity", "score"):
        low, full = (getattr(reading, name) for reading in readings)
        assert low.dtype == torch.float32
        assert torch.equal(low, full)


def test_a_half_precision_state_is_read_in_float32():
    x_t = truth()[0].bfloat16()
    prediction = Denoiser(Recorder(torch.sin), Flow(), "flow", call)(x_t, TIMES)
    t = TIMES.float()[:, None]
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    exactly(prediction.x0, x_t.float() - t * torch.sin(x_t).float(), 1e-6)


def test_guidance_of_a_half_precision_network_is_in_float32():
    x = truth()[0].float()
    network = Recorder(lambda x, c: class_answer(x, c).bfloat16())
    uncond, scale = rows(0.5), 7.5
    denoiser = Denoiser(network, Flow(), "flow", call, guidance=Guidance(scale, uncond))
    u, c = (class_answer(x, cond["c"]).bfloat16().float() for cond in (uncond, COND))
    torch.testing.assert_close(denoiser(x, TIMES, COND).velocity, u + scale * (c - u), rtol=1e-5, atol=1e-5)


@every_process
@every_target
@pytest.mark.parametrize("view", [None, Flow(shift=2.0)], ids=["native", "viewed"])
def test_gradients_flow_to_the_state_and_to_the_weights(process, target, view):
    network, x = Smooth(), truth()[0].requires_grad_()

    def x0(x, weight):
        weighted = lambda net, x, label, cond: torch.func.functional_call(net, {"mix.weight": weight}, (x, label))  # noqa: E731
        return Denoiser(network, process, target, weighted, sigma_data=SIGMA_DATA, view=view)(x, TIMES).x0

    assert torch.autograd.gradcheck(x0, (x, network.mix.weight))
