"""Students of several calls: their levels, the law of every call, and their export to plain diffusers."""

import json
import math
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from oracles import PROCESSES, TARGETS, call, cubature, gaussian
from test_export import LINEAR, SCALED, SHAPE, student
from test_score_methods import SCORE, Gains
from test_sid import COV, GAIN, MEAN, SHIFT, gradients
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.export import DESCRIPTION, export, export_error
from stepdistill.hosting import plan
from stepdistill.methods import DMD, AnyMethod, Batch, FreeFlow, SiD
from stepdistill.methods._shared import few_step_times, time_at_ratio
from stepdistill.process import VE, VP, Flow, Trig
from stepdistill.sample import tracing
from stepdistill.samplers import SampleNoise, StudentSampler, ode_steps
from stepdistill.sampling import Sampling

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", TARGETS)
FINE = {"linear": LINEAR, "scaled": SCALED, "flow": Flow(), "shifted": Flow(shift=3.0), "ve": VE(), "trig": Trig()}
INF = float("inf")


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Levels


@pytest.mark.parametrize("process", FINE.values(), ids=FINE)
@pytest.mark.parametrize("ratio", [0.5, 2.5, INF])
def test_one_step_is_the_level_of_the_ratio(process, ratio):
    (t,) = few_step_times(process, ratio, 1)
    found = (process.sigma(tensor([t])) / process.alpha(tensor([t]))).item()
    if ratio == INF:
        assert t == 1
    else:
        assert found == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("table", [LINEAR, SCALED, PROCESSES["vp"]])
@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5, INF])
def test_levels_of_a_table_are_entries_evenly_spaced_down_to_minus_one(table, steps, ratio):
    times, entries = tensor(few_step_times(table, ratio, steps)), len(table.alphas_cumprod)
    labels = table.label(times)
    torch.testing.assert_close(labels, labels.round(), rtol=0, atol=1e-9)
    stride = (labels[0] + 1) / steps
    torch.testing.assert_close(labels, stride * torch.arange(steps, 0, -1) - 1, rtol=0, atol=1e-9)
    assert labels[0] <= entries - 1
    wanted = table.label(tensor([time_at_ratio(table, ratio)])).item()
    assert stride == 1 or stride == entries // steps or abs(labels[0] - wanted) <= steps / 2


def test_levels_on_stable_diffusions_table_are_those_of_lcm_and_of_the_paper():
    """The paper's 625, 468, 312, 156 is one entry higher; LCM's scheduler counts ``stride k - 1``."""
    labels = SCALED.label(tensor(few_step_times(SCALED, 2.5, 4)))
    torch.testing.assert_close(labels, tensor([623.0, 467.0, 311.0, 155.0]))
    torch.testing.assert_close(SCALED.label(tensor(few_step_times(SCALED, INF, 4))), tensor([999.0, 749, 499, 249]))


@pytest.mark.parametrize("process", [Flow(), Flow(shift=3.0), Flow(shift=0.4)])
@pytest.mark.parametrize(("ratio", "first"), [(INF, 1.0), (2.5, 0.714)])
def test_levels_of_a_flow_are_even_in_sigma_whatever_the_shift(process, ratio, first):
    sigma = process.sigma(tensor(few_step_times(process, ratio, 4)))
    torch.testing.assert_close(sigma, first * tensor([1.0, 0.75, 0.5, 0.25]))


@pytest.mark.parametrize("process", [VE(), Trig()])
def test_levels_of_other_processes_are_even_in_time(process):
    first = time_at_ratio(process, 2.5)
    assert few_step_times(process, 2.5, 4) == pytest.approx([first, 0.75 * first, 0.5 * first, 0.25 * first])


def test_more_steps_than_entries_are_refused():
    few_step_times(PROCESSES["vp"], 2.5, 9)
    with pytest.raises(ValueError, match="steps must be at most the 9 entries of the teacher's table, got 10"):
        few_step_times(PROCESSES["vp"], 2.5, 10)


def clips(kind) -> bool:
    return "clip_sample" in kind.__dataclass_fields__


STEPPED = [kind for kind in get_args(AnyMethod) if "levels" in kind.__dataclass_fields__]


@every_process
@pytest.mark.parametrize("kind", STEPPED)
def test_the_levels_of_every_call_may_be_chosen(kind, process):
    levels = (4.0, 1.5, 0.4)
    times = kind(steps=3, levels=levels).sampler(process).times
    near = process.log_snr(tensor(times)).tolist()
    wanted = [-2 * math.log(level) for level in levels]
    gap = process.log_snr(tensor([0.0, 1.0])).diff().abs().item() / 8 if isinstance(process, VP) else 0.01
    assert near == pytest.approx(wanted, abs=gap)
    assert {kind.__name__ for kind in STEPPED} >= {"SiD", "DMD", "SwiftBrush", "TBCM"}


@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize("levels", [(1.0, 2.0), (2.0, 2.0), (2.0,), (2.0, 1.0, 0.5), (2.0, 0.0)])
def test_levels_that_do_not_fall_or_are_too_many_are_refused(kind, levels):
    with pytest.raises(ValueError, match=r"levels must be 2 falling positive numbers, one for each of the steps, got"):
        kind(steps=2, levels=levels)


@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize(
    ("process", "levels", "told"),
    [(LINEAR, (2.5, 2.499), 440), (Flow(), (1.001, 1.0), 500), (VE(), (200.0, 90.0), 1.096)],
)
def test_levels_that_are_one_level_of_the_teacher_are_refused(kind, process, levels, told):
    with pytest.raises(ValueError, match=r"levels .* are one level of the teacher") as refused:
        kind(steps=2, levels=levels, input="sigma").check(gaussian(MEAN, COV).denoiser(process, "v"))
    assert f"levels {levels[0]:g} and {levels[1]:g}" in str(refused.value)
    assert f"told {told} at both; set levels further apart" in str(refused.value)


def test_times_that_do_not_decrease_are_refused():
    with pytest.raises(ValueError, match=r"must decrease, got \(0.5, 0.5\)"):
        StudentSampler(times=(0.5, 0.5))


# The law of every call


class Oracle(nn.Module):
    """The affine x0-network of a few-step student all of whose calls give ``N(mean, cov)``; ``shift`` moves them."""

    def __init__(self, process, sampler: StudentSampler, mean: torch.Tensor, cov: torch.Tensor) -> None:
        super().__init__()
        self.process, self.first, self.unit = process, sampler.times[0], sampler.input == "unit"
        self.mean, self.cov, self.shift = mean, cov, nn.Parameter(torch.zeros_like(mean))

    def forward(self, x, label):
        t = self.process.time_of_label(label)
        a, s = (c[0].item() for c in self.process.coefficients(t, x))
        spread, axes = torch.linalg.eigh(self.cov)
        if abs(t[0].item() - self.first) < 1e-9:
            inside, gain = x / (1.0 if self.unit else s), spread.sqrt()
        else:
            inside, gain = x - a * self.mean, (spread / (a**2 * spread + s**2)).sqrt()
        return self.mean + self.shift + inside @ axes @ gain.diag() @ axes.T


def exact_noise(steps: int) -> list[torch.Tensor]:
    """Noise of every call whose joint moments over the batch are those of independent normals."""
    return list(cubature(3 * steps).split(3, dim=1))


@every_process
@pytest.mark.parametrize("scale", ["sigma", "unit"])
def test_with_fresh_noise_every_call_of_the_oracle_has_the_teachers_law(process, scale):
    method = DMD(steps=4, input=scale)
    sampler = method.sampler(process)
    denoiser = Denoiser(Oracle(process, sampler, MEAN, COV), process, "x0", call)
    first, *later = exact_noise(4)
    made = [p.x0 for p in sampler.trace(denoiser, first, renoise=iter(later).__next__)]
    assert len(made) == 4
    for x_g in made:
        torch.testing.assert_close(x_g.mean(0), MEAN)
        torch.testing.assert_close((x_g - MEAN).T @ (x_g - MEAN) / len(x_g), COV)


@every_process
def test_with_fixed_noise_later_calls_are_not_fed_noised_samples(process):
    """The noise is then correlated with the sample it is added to."""
    sampler = DMD(steps=2, renoising="fixed").sampler(process)
    denoiser = Denoiser(Oracle(process, sampler, MEAN, COV), process, "x0", call)
    first, second = sampler.trace(denoiser, cubature(3))
    a, s = (c[0].item() for c in process.coefficients(second.t, second.x_t))
    torch.testing.assert_close(second.x_t, a * first.x0 + s * cubature(3))
    spread = (second.x0 - MEAN).T @ (second.x0 - MEAN) / 6
    assert torch.linalg.eigvalsh(spread - COV).min() > 0.01


@every_process
@every_target
@pytest.mark.parametrize("kind", SCORE)
def test_at_the_teachers_law_no_call_has_a_gradient(monkeypatch, kind, process, target):
    torch.manual_seed(0)
    method = kind(steps=3)
    network = Oracle(process, method.sampler(process), MEAN, COV)
    law = gaussian(MEAN, COV).denoiser(process, target)
    other = gaussian(SHIFT, GAIN @ GAIN.T).denoiser(process, target)
    noise = torch.randn(12, 3, dtype=torch.float64)
    for k in range(3):
        for teacher, zero in ((law, True), (other, False)):
            nets = {"teacher": teacher, "fake": law, "student": Denoiser(network, process, "x0", call)}
            method.student_loss(nets, Batch(noise), call=k).value.backward()
            (grad,) = gradients(nets["student"])
            assert (grad.abs().max() < 1e-8) == zero


@every_process
@every_target
def test_the_deterministic_mode_is_ddim(process, target):
    """With the true denoiser, every call is fed the state of DDIM at its level."""
    torch.manual_seed(0)
    denoiser, noise = gaussian(MEAN, COV).denoiser(process, target), torch.randn(5, 3, dtype=torch.float64)
    sampler = DMD(steps=4, renoising="ddim").sampler(process)
    start = process.student_input(noise, tensor(sampler.times[:1]).expand(5), "sigma")
    found = list(sampler.trace(denoiser, noise))
    expected = list(ode_steps(denoiser, start, sampler.times))
    for mine, step in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.x_t, step.prediction.x_t)
    torch.testing.assert_close(found[-1].x0, expected[-1].x)


def test_the_deterministic_mode_is_the_euler_scheduler_of_diffusers():
    torch.manual_seed(0)
    process, noise = Flow(), torch.randn(5, 3)
    denoiser = gaussian(MEAN.float(), COV.float()).denoiser(process, "flow")
    sampler = DMD(steps=4, init_ratio=INF, renoising="ddim").sampler(process)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    x = noise
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.network(x, t.expand(5).double()), t, x, return_dict=False)[0]
    torch.testing.assert_close(sampler(denoiser, noise), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("target", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_the_deterministic_mode_is_the_ddim_scheduler_of_diffusers(target, name):
    torch.manual_seed(0)
    denoiser = gaussian(MEAN.float(), COV.float()).denoiser(LINEAR, target)
    noise, sampler = torch.randn(5, 3), DMD(steps=4, init_ratio=2.5, input="unit", renoising="ddim").sampler(LINEAR)
    labels = [round(label) for label in LINEAR.label(tensor(sampler.times)).tolist()]
    betas = DDPMScheduler().betas[: labels[0] + 1]
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=name,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == labels
    x = noise
    for label in labels:
        told = torch.full((5,), label, dtype=torch.float64)
        x = scheduler.step(denoiser.network(x, told), label, x, return_dict=False)[0]
    torch.testing.assert_close(sampler(denoiser, noise), x, atol=1e-4, rtol=0)


@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
def test_the_sampler_gives_the_last_call_of_its_trace(process, renoising):
    denoiser, noise = gaussian(MEAN, COV).denoiser(process), torch.randn(5, 3, dtype=torch.float64)
    sampler = DMD(steps=3, renoising=renoising).sampler(process)
    torch.manual_seed(1)
    *_, last = sampler.trace(denoiser, noise)
    torch.manual_seed(1)
    assert torch.equal(sampler(denoiser, noise), last.x0)
    assert (last.t == sampler.times[-1]).all()


@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
def test_a_clipped_student_goes_on_from_its_picture(process, renoising):
    denoiser, noise = gaussian(MEAN, 4 * COV).denoiser(process), torch.randn(64, 3, dtype=torch.float64)
    sampler = SiD(steps=2, renoising=renoising, clip_sample=True).sampler(process)
    torch.manual_seed(1)
    first, second = sampler.trace(denoiser, noise)
    free = next(replace(sampler, clip_sample=False).trace(denoiser, noise))
    assert (free.x0.abs() > 1).any()
    assert torch.equal(first.x0, free.x0.clamp(-1, 1))
    assert torch.equal(first.eps, free.eps)
    torch.manual_seed(1)
    eps = {"fresh": torch.randn_like(noise), "fixed": noise, "ddim": free.eps}[renoising]
    t = torch.full((64,), sampler.times[1], dtype=torch.float64)
    assert torch.equal(second.x_t, process.add_noise(first.x0, eps, t))


ONE_CALL: dict[str, dict[str, Any]] = {
    "tscd": {"segments": (1,), "stage_steps": (), "teacher_steps": 8},
    "tbcm": {"warmup_steps": 0},
}
"""What a student of one call from the first step on is told beside its default."""
CLIPPING = [
    *(kind(clip_sample=True, **ONE_CALL.get(kind().name, {})) for kind in get_args(AnyMethod) if clips(kind)),
    SiD(clip_sample=True, low_memory=False),
]


@pytest.mark.parametrize("method", CLIPPING, ids=lambda method: method.name)
def test_nothing_beyond_the_range_of_pictures_moves(monkeypatch, method):
    if isinstance(method, FreeFlow):  # whose prediction is of whole trajectories; its correction is of pictures
        inside = tensor([0.0, 1.0, 1.0, 0.0])
        monkeypatch.setattr(FreeFlow, "residual", lambda self, nets, noise, *told: inside.expand_as(noise))
    pixels = nn.Parameter(tensor([-1.5, -0.5, 0.5, 1.5]))
    constant = Denoiser(nn.ParameterList([pixels]), LINEAR, "x0", lambda net, x, label, cond: pixels.expand_as(x))
    teacher, fake = (gaussian(mean * torch.ones(4).double(), torch.eye(4).double()).denoiser(LINEAR) for mean in (0, 3))
    nets = {"student": constant, "still": constant, "teacher": teacher, "fake": fake}
    *_, learns = method.turns(0)
    learns.loss(nets, Batch(torch.randn(8, 4).double(), memory={})).value.backward()
    assert (cast(torch.Tensor, pixels.grad) != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("method", CLIPPING, ids=lambda method: method.name)
def test_clipping_changes_nothing_within_the_range_of_pictures(method):
    law = gaussian(torch.zeros(3).double(), 1e-3 * COV)
    found = []
    for each in (method, replace(method, clip_sample=False)):
        torch.manual_seed(0)
        gains = nn.Parameter(0.01 * torch.ones(3).double())
        student = Denoiser(nn.ParameterList([gains]), LINEAR, "x0", lambda net, x, label, cond, gains=gains: gains * x)
        nets = {"student": student, "still": student, "teacher": law.denoiser(LINEAR), "fake": law.denoiser(LINEAR)}
        *_, learns = each.turns(0)
        value = learns.loss(nets, Batch(torch.randn(8, 3).double(), memory={})).value
        found.append((value.detach(), *torch.autograd.grad(value, gains)))
    torch.testing.assert_close(*found)


@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
def test_the_gradient_of_a_call_ends_at_its_input(process, renoising):
    sampler = DMD(steps=3, renoising=renoising).sampler(process)
    gains = Gains(process.label(tensor(sampler.times)))
    denoiser = Denoiser(gains, process, "x0", call)
    for k, prediction in enumerate(sampler.trace(denoiser, torch.randn(5, 3, dtype=torch.float64))):
        (grad,) = torch.autograd.grad(prediction.x0.sum(), gains.gain)
        assert grad.nonzero().flatten().tolist() == [k]


# Export

HOSTED = [
    (LINEAR, "eps", "unit", 2.5),
    (SCALED, "v", "unit", INF),
    (SCALED, "x0", "unit", 2.5),
    (Flow(), "flow", "unit", INF),
    (Flow(), "flow", "sigma", INF),
    (Flow(shift=3.0), "flow", "unit", INF),
    (Flow(label_scale=100.0), "flow", "unit", INF),
]


@pytest.mark.parametrize(("process", "target", "scale", "ratio"), HOSTED)
@pytest.mark.parametrize(("renoising", "steps"), [("fresh", 4), ("ddim", 3)])
def test_exported_few_step_student_is_its_sampler(process, target, scale, ratio, renoising, steps, tmp_path):
    denoiser = student(process, target)
    sampler = SiD(steps=steps, init_ratio=ratio, input=scale, renoising=renoising).sampler(process)
    hosted = plan(denoiser, sampler, classes=None)
    assert hosted.steps == steps
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond={}) < 2e-5
    assert json.loads((tmp_path / "student" / DESCRIPTION).read_text())["steps"] == steps
    # a sampler with other levels, or another way back, is not what the folder does
    opposite = "ddim" if renoising == "fresh" else "fresh"
    for other in (replace(sampler, times=tuple(0.97 * t for t in sampler.times)), replace(sampler, renoising=opposite)):
        assert export_error(denoiser, other, tmp_path / "student", shape=SHAPE, cond={}) > 1e-3


@pytest.mark.parametrize(("renoising", "steps"), [("fresh", 3), ("ddim", 3), ("fresh", 1)])
@pytest.mark.parametrize(("process", "target"), [(SCALED, "eps"), (SCALED, "v")])
def test_exported_clipped_student_is_its_sampler(process, target, renoising, steps, tmp_path):
    denoiser = student(process, target)
    sampler = SiD(steps=steps, input="unit", renoising=renoising, clip_sample=True).sampler(process)
    folder, free = tmp_path / "student", replace(sampler, clip_sample=False)
    export(denoiser, sampler, plan(denoiser, sampler, classes=None), folder, shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, folder, shape=SHAPE, cond={}) < 2e-5
    if steps > 1:  # of one step the pipeline shows the clipped picture anyway
        assert export_error(denoiser, free, folder, shape=SHAPE, cond={}) > 1e-3


@pytest.mark.parametrize("renoising", ["fresh", "ddim"])
def test_exported_class_conditional_few_step_student_is_its_sampler(renoising, tmp_path):
    denoiser = student(SCALED, "eps", num_class_embeds=4)
    sampler = SiD(steps=2, input="unit", renoising=renoising).sampler(SCALED)
    cond = {"class_labels": torch.tensor([0, 1, 2, 3])}
    export(denoiser, sampler, plan(denoiser, sampler, classes=4), tmp_path / "student", shape=SHAPE, cond=cond)
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond=cond) < 2e-5


def test_a_student_of_several_calls_samples_in_others_that_its_scheduler_takes_and_one_of_one_call_does_not(tmp_path):
    denoiser = student(SCALED, "eps")
    for own in (4, 1):
        sampler = SiD(steps=own, input="unit").sampler(SCALED)
        export(denoiser, sampler, plan(denoiser, sampler, classes=None), tmp_path / f"{own}", shape=SHAPE, cond={})
    for steps in (1, 2, 4):
        made, calls = tracing(Sampling(source=str(tmp_path / "4"), steps=steps)), []
        made.networks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert made.traces([0, 1]).isfinite().all()
        assert len(calls) == steps
    for own, steps in ((4, 1001), (1, 2)):
        with pytest.raises(UserError, match=rf"--steps {steps}: .* makes a sample in {own} call"):
            tracing(Sampling(source=str(tmp_path / f"{own}"), steps=steps))


@pytest.mark.parametrize(
    ("process", "target", "options", "classes", "reason"),
    [
        (SCALED, "eps", {"renoising": "fixed", "input": "unit"}, None, "set method.renoising=fresh or ddim"),
        (SCALED, "eps", {"input": "sigma"}, None, "set method.input=unit"),
        (PROCESSES["vp"], "edm", {"input": "unit"}, None, "its network predicts 'edm' under a DDPM table"),
        (Flow(), "flow", {"init_ratio": 2.5}, None, "method.init_ratio=.inf"),
        (Flow(), "flow", {"init_ratio": INF, "clip_sample": True}, None, "set method.clip_sample=false"),
        (Flow(), "eps", {"init_ratio": INF}, None, "a DDPM table, or a rectified flow"),
        (Flow(reversed_label=True), "flow", {"init_ratio": INF}, None, "a DDPM table, or a rectified flow"),
        (Flow(label_scale=1.0), "flow", {"init_ratio": INF}, None, "told a whole multiple of sigma"),
        (Flow(label_scale=2.5), "flow", {"init_ratio": INF}, None, "told a whole multiple of sigma"),
        (VP(tensor([0.99, 0.9, 0.7, 0.4])), "eps", {"init_ratio": 0.5, "input": "unit"}, None, "fewer method.steps"),
        (VE(), "edm", {}, None, "a DDPM table, or a rectified flow"),
        (Trig(), "v", {}, None, "a DDPM table, or a rectified flow"),
        (Flow(), "flow", {"init_ratio": INF}, 4, "class-conditional flow"),
    ],
)
def test_few_step_students_without_a_stock_scheduler_are_refused_with_the_way_out(
    process, target, options, classes, reason
):
    denoiser, sampler = student(process, target), SiD(steps=3, **options).sampler(process)
    with pytest.raises(UserError, match=reason.replace(".", r"\.")) as caught:
        plan(denoiser, sampler, classes=classes)
    assert "no stock scheduler runs this student in 3 steps: " in str(caught.value)


def test_uneven_levels_are_refused_by_their_timesteps():
    sampler = StudentSampler(times=tuple(k / 999 for k in (599, 299, 99)), input="unit")
    with pytest.raises(UserError, match=r"timesteps \[599.0, 299.0, 99.0\] are not evenly spaced down to -1"):
        plan(student(SCALED, "eps"), sampler, classes=None)


def test_a_few_step_network_with_a_target_time_is_refused():
    sampler = StudentSampler(times=(599 / 999, 299 / 999), input="unit", target_time=0.0)
    with pytest.raises(UserError, match="its network is told one target time only"):
        plan(student(SCALED, "eps"), sampler, classes=None)


PLAIN = """
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r})
generators = [torch.Generator().manual_seed(k) for k in range(4)]
image = pipe(batch_size=4, num_inference_steps=3, generator=generators, output_type="np").images
"""


def test_plain_diffusers_without_stepdistill_gives_the_samplers_images(elsewhere, tmp_path):
    for process, target, ratio in ((LINEAR, "eps", 2.5), (Flow(), "flow", INF)):
        for renoising in ("fresh", "ddim"):
            denoiser = student(process, target)
            sampler = SiD(steps=3, input="unit", init_ratio=ratio, renoising=renoising).sampler(process)
            folder = tmp_path / f"{target}_{renoising}"
            export(denoiser, sampler, plan(denoiser, sampler, classes=None), folder, shape=SHAPE, cond={})
            images = elsewhere(PLAIN.format(folder=str(folder))).permute(0, 3, 1, 2)
            noise = SampleNoise(range(4), SHAPE)
            with torch.no_grad():
                expected = sampler(denoiser, noise(), renoise=noise) / 2 + 0.5
            torch.testing.assert_close(images, expected.clamp(0, 1), atol=2e-5, rtol=0)
            assert images.std() > 0.05, "the comparison must not be between constants"
