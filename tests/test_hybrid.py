"""The teacher first, then the student: closed forms, identities, the command and the pipeline that travels."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_teacher, tiny_unet
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from oracles import PROCESSES, call, gaussian
from PIL import Image
from torch import nn

from stepdistill.__main__ import main
from stepdistill.backbones import unet2d
from stepdistill.denoiser import Denoiser, Guidance
from stepdistill.export import export
from stepdistill.hosting import plan
from stepdistill.hybrid import HybridSampler, trace_ode, trace_x0
from stepdistill.methods._shared import few_step_times
from stepdistill.process import VE, VP, Flow, Trig
from stepdistill.samplers import Renoising, SampleNoise, StudentSampler, ode_steps, sample_ode, teacher_grid
from stepdistill.schedulers import read_scheduler

FILE = Path(__file__).parents[1] / "pipelines/hybrid_ddpm_v1.py"
SHAPE = (1, 8, 8)
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LAW = gaussian(MEAN, COV)
TABLE = DDPMScheduler(num_train_timesteps=40, beta_start=0.002, beta_end=0.3, clip_sample=False)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def at(time, x):
    return x.new_full((len(x),), time, dtype=torch.float64)


def noise_of(batch=5):
    torch.manual_seed(0)
    return torch.randn(batch, 2, dtype=torch.float64)


def draws(seed=1):
    """Fresh noise that two samplers can be given alike."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(5, 2, dtype=torch.float64, generator=generator)


def scale_of(process):
    return "unit" if isinstance(process, VP) else "sigma"


# The Gaussian, whose DDIM step and flow map to the clean sample are written here once more, by matrices.


def matrices(process, time):
    a, s = (f(torch.tensor([time], dtype=torch.float64)).item() for f in (process.alpha, process.sigma))
    return a, s, a * a * COV + s * s * torch.eye(2, dtype=torch.float64)


def ddim(process, x, t, target, s):
    """One DDIM step from time ``t`` of ``process`` to time ``s`` of the process ``target``."""
    (a, sigma, total), (a_then, s_then, _) = matrices(process, t), matrices(target, s)
    whitened = (x - a * MEAN) @ torch.linalg.inv(total)
    return a_then * (MEAN + a * whitened @ COV) + s_then * sigma * whitened


def to_clean(process, x, t):
    """The flow map to the clean sample: ``m + C^{1/2} total^{-1/2} (x - a m)``."""
    a, _, total = matrices(process, t)
    values, axes = torch.linalg.eigh(COV)
    spread = torch.linalg.eigvalsh(total)
    return MEAN + (x - a * MEAN) @ axes * (values / spread).sqrt() @ axes.T


class FlowMap(nn.Module):
    """A perfect consistency student of the Gaussian: an x0-network that is the flow map to the clean sample."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, label):
        return to_clean(self.process, x, self.process.time_of_label(label)[0].item())

    def denoiser(self):
        return Denoiser(self, self.process, "x0", call)


@every_process
@pytest.mark.parametrize("student_process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_of_a_gaussian_it_is_the_students_flow_map_after_the_teachers_ddim_steps(process, student_process, steps):
    """Also where the two live in different processes and the state changes its coordinates on the way."""
    level = student_process.time_at_log_snr(torch.tensor([0.3], dtype=torch.float64)).item()
    handed = process.time_at_log_snr(torch.tensor([0.3], dtype=torch.float64)).item()
    student = StudentSampler((1.0, level), scale_of(student_process))
    noise = noise_of()
    found = HybridSampler(student, 1, steps)(LAW.denoiser(process), FlowMap(student_process).denoiser(), noise)
    grid = teacher_grid(process, steps)
    times = grid[: max(min(range(steps), key=lambda i: abs(grid[i] - handed)), 1)]
    x = process.prior_scale * noise
    for t, s in pairwise(times):
        x = ddim(process, x, t, process, s)
    expected = to_clean(student_process, ddim(process, x, times[-1], student_process, level), level)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("first", [1, 2])
def test_teachers_part_is_the_solver_up_to_the_students_time(process, first):
    teacher, noise = LAW.denoiser(process, "v"), noise_of()
    student = StudentSampler((1.0, 0.61, 0.35, 0.2), scale_of(process))
    hybrid = HybridSampler(student, first, 9)
    times = hybrid.teacher_times(process, process)
    *_, step = ode_steps(teacher, process.prior_scale * noise, times, end=student.times[first])
    said = list(hybrid.trace(teacher, FlowMap(process).denoiser(), noise))
    assert len(said) == len(times) + 4 - first
    torch.testing.assert_close(said[len(times)].x_t, step.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("teacher_steps", "first", "calls"),
    # i* = argmin |1 - i / steps - t_j| of the student's 1, 3/4, 1/2, 1/4; the earlier of two, and never none
    [(None, 1, 1), (None, 2, 2), (None, 3, 3), (4, 2, 2), (8, 1, 2), (8, 3, 6), (50, 1, 12), (50, 2, 25), (1, 1, 1)]
    + [(1, 3, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (3, 1, 1), (3, 2, 1), (3, 3, 2)],
)
def test_the_teacher_stops_where_its_grid_is_nearest_to_the_students_next_call(teacher_steps, first, calls):
    hybrid = HybridSampler(StudentSampler((1.0, 0.75, 0.5, 0.25)), first, teacher_steps)
    steps = teacher_steps or 4
    assert hybrid.teacher_times(Flow(), Flow()) == pytest.approx([1 - i / steps for i in range(calls)])
    assert HybridSampler(hybrid.student, 0, teacher_steps).teacher_times(Flow(), Flow()) == []


@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("times", [(0.9,), (0.9, 0.5, 0.2)])
def test_no_steps_of_the_teacher_are_the_student_alone(process, renoising, times):
    plain = StudentSampler(times, scale_of(process), renoising=renoising)
    student = LAW.denoiser(process, "v")
    found = HybridSampler(plain, 0)(FlowMap(process).denoiser(), student, noise_of(), renoise=draws())
    assert torch.equal(found, plain(student, noise_of(), renoise=draws()))


@every_process
@pytest.mark.parametrize("renoising", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_one_network_for_both_on_one_grid_is_plain_sampling(process, renoising, first):
    plain = StudentSampler(tuple(teacher_grid(process, 4)), scale_of(process), renoising=renoising)
    net, hybrid = LAW.denoiser(process, "v"), HybridSampler(plain, first, teacher_renoising=renoising)
    found = trace_x0(hybrid.trace(net, net, noise_of(), renoise=draws()))
    expected = trace_x0(plain.trace(net, noise_of(), renoise=draws()))
    if isinstance(process, VE):  # sigma_max itself and the end of Karras' ramp differ by rounding
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scheduler", [TABLE, FlowScheduler()])
def test_one_real_network_for_both_is_plain_sampling_bit_for_bit(scheduler):
    net = Denoiser(tiny_unet().requires_grad_(False), **read_scheduler(scheduler), call=unet2d.call)
    plain = StudentSampler(tuple(teacher_grid(net.process, 4)), "unit", renoising="ddim")
    noise = SampleNoise(range(3), SHAPE)()
    assert torch.equal(HybridSampler(plain, 2)(net, net, noise), plain(net, noise))


@every_process
def test_the_teacher_hands_over_in_its_own_way_and_the_student_goes_on_in_its_own(process):
    hybrid = HybridSampler(StudentSampler((0.9, 0.5, 0.2), renoising="fresh"), 1)
    said = hybrid.trace(LAW.denoiser(process), FlowMap(process).denoiser(), noise_of(), renoise=draws())
    *_, taught, second, third = said
    for said, before, eps, time in ((second, taught, taught.eps, 0.5), (third, second, draws()(), 0.2)):
        torch.testing.assert_close(said.x_t, process.add_noise(before.x0, eps, at(time, eps)), rtol=1e-12, atol=1e-12)


# A student of one call


class Seen(nn.Module):
    """Remembers what it is fed and told."""

    def forward(self, x, label, target_label=None):
        self.x, self.label, self.target_label = x, label, target_label
        return torch.zeros_like(x)


@every_process
@pytest.mark.parametrize("scale", ["unit", "sigma"])
@pytest.mark.parametrize("first", [1, 3])
def test_one_call_student_is_fed_the_teachers_x0_at_its_own_level(process, scale, first):
    noise, time = noise_of(), process.time_at_log_snr(torch.tensor([-1.0], dtype=torch.float64)).item()
    teacher, network = LAW.denoiser(process), Seen()
    student = Denoiser(network, process, "x0", call)
    HybridSampler(StudentSampler((time,), scale, target_time=0.2), first)(teacher, student, noise)
    x = process.prior_scale * noise
    *_, last = ode_steps(teacher, x, teacher_grid(process, first)[:first])
    a, s, _ = matrices(process, time)
    expected = a * last.prediction.x0 + s * noise
    norm = 1.0 if scale == "sigma" else (a * a + s * s) ** 0.5
    torch.testing.assert_close(network.x, expected / norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.label, process.label(at(time, noise)))
    torch.testing.assert_close(network.target_label, process.label(at(0.2, noise)))


def test_one_call_student_at_pure_noise_is_refused():
    student = FlowMap(Flow()).denoiser()
    with pytest.raises(ValueError, match="see nothing of the teacher's draft"):
        HybridSampler(StudentSampler((1.0,)), 1)(LAW.denoiser(Flow()), student, noise_of())
    HybridSampler(StudentSampler((1.0,)), 0)(LAW.denoiser(Flow()), student, noise_of())


@pytest.mark.parametrize(
    ("times", "values", "word"),
    [
        ((0.9, 0.5), {"teacher_first": -1}, "negative"),
        ((0.9, 0.5), {"teacher_first": 2}, "2 calls, got 2"),
        ((0.9, 0.5), {"teacher_first": 1, "teacher_steps": 0}, "at least 1"),
        ((0.9,), {"teacher_first": 3, "teacher_steps": 2}, "at least 3"),
    ],
)
def test_impossible_choices_are_refused(times, values, word):
    with pytest.raises(ValueError, match=word):
        HybridSampler(StudentSampler(times), **values)


# Traces


@every_process
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_last_entry_of_a_teachers_trace_is_its_sample(process, solver):
    teacher, noise = LAW.denoiser(process, "v"), noise_of()
    made = trace_x0(trace_ode(teacher, noise, 6, solver=solver))
    assert made.shape == (5, 6, 2)
    assert torch.equal(made[:, -1], sample_ode(teacher, noise, 6, solver=solver))
    assert (made.diff(dim=1).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_last_entry_of_a_students_and_of_a_hybrids_trace_is_the_sample():
    process, noise = Trig(), noise_of()
    plain = StudentSampler((0.95, 0.6, 0.3))
    teacher, student = LAW.denoiser(process), FlowMap(process).denoiser()
    made = trace_x0(plain.trace(student, noise, renoise=draws()))
    assert torch.equal(made[:, -1], plain(student, noise, renoise=draws()))
    hybrid = HybridSampler(plain, 1, 10)
    made = trace_x0(hybrid.trace(teacher, student, noise, renoise=draws()))
    assert made.shape == (5, 4 + 2, 2)
    assert torch.equal(made[:, -1], hybrid(teacher, student, noise, renoise=draws()))


def test_a_teachers_trace_is_what_diffusers_calls_the_predicted_original_sample():
    network, noise = tiny_unet().requires_grad_(False), SampleNoise(range(2), SHAPE)()
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(4)
    theirs, x = [], noise
    for t in scheduler.timesteps:
        step: Any = scheduler.step(network(x, t.float(), return_dict=False)[0], int(t), x)
        theirs.append(step.pred_original_sample)
        x = step.prev_sample
    denoiser = Denoiser(network, **read_scheduler(scheduler), call=unet2d.call)
    ours = trace_x0(trace_ode(denoiser, noise, 4))
    torch.testing.assert_close(ours, torch.stack(theirs, 1), rtol=1e-4, atol=1e-4)


# Exported students: the command and the pipeline


def exported(folder: Path, scheduler, sampler=None, *, calls=3, renoising: Renoising = "fresh", classes=None):
    """A student and its teacher on disk; both as denoisers, and the student's sampler."""
    options = {} if classes is None else {"num_class_embeds": classes}
    teacher = tiny_unet(seed=0, **options).requires_grad_(False)
    kind = DDPMPipeline if classes is None else ConsistencyModelPipeline
    kind(teacher, scheduler).save_pretrained(folder / "teacher")
    reading = read_scheduler(scheduler)
    network = tiny_unet(seed=1, **options)
    with torch.no_grad():  # away from initial zeros, so that every folded term matters
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    student = Denoiser(network.requires_grad_(False), **reading, call=unet2d.call)
    times = few_step_times(student.process, float("inf"), calls)
    sampler = sampler or StudentSampler(times, "unit", renoising=renoising)
    cond = {} if classes is None else {"class_labels": torch.arange(4) % classes}
    hosted = plan(student, sampler, classes=classes)
    export(student, sampler, hosted, folder / "student", shape=SHAPE, cond=cond)
    return Denoiser(teacher, **reading, call=unet2d.call), student, sampler


def table(kind="epsilon"):
    return DDPMScheduler.from_config(TABLE.config, prediction_type=kind)


EARLY = StudentSampler((20 / 39,), "sigma")
CASES = {
    "lcm": lambda f: exported(f, table()),
    "ddim_v": lambda f: exported(f, table("v_prediction"), renoising="ddim"),
    "flow": lambda f: exported(f, FlowScheduler(), calls=4),
    "flow_ode": lambda f: exported(f, FlowScheduler(shift=3.0), renoising="ddim"),
    "classes": lambda f: exported(f, table("sample"), classes=4),
    "one": lambda f: exported(f, table(), EARLY),
    "one_unit": lambda f: exported(f, table("v_prediction"), replace(EARLY, input="unit")),
    "one_between": lambda f: exported(f, FlowScheduler(), replace(EARLY, times=(0.7141,))),  # no integer timestep
}
CHOICES: tuple[dict[str, Any], ...] = (
    {"teacher_first": 0},
    {"teacher_first": 1},
    {"teacher_first": 2, "teacher_steps": 7},
    {"teacher_first": 2, "teacher_renoising": "fresh"},
    {"teacher_first": 1, "teacher_renoising": "fixed"},
)

PLAIN = """
import sys
sys.modules["stepdistill"] = None  # importing it would raise
import json, os, shutil
from pathlib import Path
import torch
from diffusers import DiffusionPipeline

root, file, choices = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def tried(pipe, seeds, labels, **choice):
    generators = [torch.Generator().manual_seed(k) for k in seeds]
    options = {**choice, "generator": generators, **({} if labels is None else {"class_labels": labels})}
    return torch.stack(pipe.trace_x0(len(seeds), **options), 1)

for folder in sorted(root.iterdir()):
    teacher = DiffusionPipeline.from_pretrained(folder / "teacher")
    pipe = DiffusionPipeline.from_pretrained(
        folder / "student", custom_pipeline=file, trust_remote_code=True,
        teacher_unet=teacher.unet, teacher_scheduler=teacher.scheduler,
        description=json.loads((folder / "student/stepdistill.json").read_text()),
    )
    labels = None if pipe.unet.config.num_class_embeds is None else [0, 1, 2, 3]
    found = {str(k): tried(pipe, range(4), labels, **choice) for k, choice in enumerate(choices)}
    found["alone"] = tried(pipe, [2], labels and [2], teacher_first=1)
    given = {} if labels is None else {"class_labels": labels}
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    found["images"] = pipe(4, 1, generator=generators, output_type="pt", **given).images
    stock, calls = DiffusionPipeline.from_pretrained(folder / "student"), len(pipe.times)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    images = stock(batch_size=4, num_inference_steps=calls, generator=generators, output_type="np", **given).images
    found["stock"] = torch.from_numpy(images).permute(0, 3, 1, 2)
    if labels is not None:
        found["guided"] = tried(pipe, range(4), labels, teacher_first=1, guidance_scale=2.0, null_label=3)

    pipe.save_pretrained(folder / "hybrid")
    for again in ("again", "twice"):
        shutil.rmtree(Path(os.environ["HF_MODULES_CACHE"]) / "diffusers_modules")
        custom = {"custom_pipeline": str(folder / "hybrid")} if again == "twice" else {}
        pipe = DiffusionPipeline.from_pretrained(folder / "hybrid", trust_remote_code=True, **custom)
        found[again] = tried(pipe, range(4), labels, teacher_first=1)
        pipe.save_pretrained(folder / "hybrid2")
        shutil.rmtree(folder / "hybrid")
        (folder / "hybrid2").rename(folder / "hybrid")
    torch.save(found, folder / "found.pt")
"""


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """Every case: its denoisers, its sampler, and what the pipeline gave where stepdistill cannot be imported."""
    root = tmp_path_factory.mktemp("hybrids")
    made = {name: make(root / name) for name, make in CASES.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    command = [sys.executable, "-c", PLAIN, str(root), str(FILE), json.dumps(CHOICES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot get type annotation" not in done.stderr
    return {
        name: (*parts, torch.load(root / name / "found.pt", weights_only=True), root / name)
        for name, parts in made.items()
    }


def same(found, expected):
    """Up to rounding in float32 of what is as large as the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(10, expected.abs().max().item()))


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_that_travels_is_the_sampler(name, travelled):
    teacher, student, sampler, found, _ = travelled[name]
    cond = {"class_labels": torch.arange(4)} if name == "classes" else {}
    traces = []
    for k, choice in enumerate(CHOICES):
        noise = SampleNoise(range(4), SHAPE)
        hybrid = HybridSampler(sampler, **choice)
        traces.append(trace_x0(hybrid.trace(teacher, student, noise(), cond, renoise=noise)))
        same(found[str(k)], traces[-1])
    assert (traces[0][:, -1] - traces[1][:, -1]).abs().max() > 1e-2, "the teacher must matter"
    same(found["images"], (traces[1][:, -1] / 2 + 0.5).clamp(0, 1))
    assert torch.equal(found["stock"], (found["0"][:, -1] / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_gives_every_sample_its_own_generator(name, travelled):
    found = travelled[name][3]
    same(found["alone"][0], found["1"][2])


@pytest.mark.parametrize("name", CASES)
def test_saving_the_pipeline_keeps_its_code(name, travelled):
    *_, found, folder = travelled[name]
    assert torch.equal(found["again"], found["1"])
    assert torch.equal(found["twice"], found["1"])
    assert (folder / "hybrid" / FILE.name).read_bytes() == FILE.read_bytes()
    index = json.loads((folder / "hybrid/model_index.json").read_text())
    assert index["_class_name"] == ["hybrid_ddpm_v1", "HybridDDPMPipeline"]


def test_the_pipelines_guidance_is_that_of_a_guided_teacher(travelled):
    teacher, student, sampler, found, _ = travelled["classes"]
    guided = replace(teacher, guidance=Guidance(2.0, {"class_labels": torch.tensor([3])}))
    noise = SampleNoise(range(4), SHAPE)
    cond = {"class_labels": torch.arange(4)}
    same(found["guided"], trace_x0(HybridSampler(sampler, 1).trace(guided, student, noise(), cond, renoise=noise)))


def sampled(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *map(str, words)])
    return stopped.value.code


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", [0, 1])
def test_the_command_writes_the_samplers_images_and_its_trace(name, first, travelled, tmp_path):
    teacher, student, sampler, _, folder = travelled[name]
    out, more = tmp_path / "images", ["--teacher-first", first, "--teacher", folder / "teacher"] if first else []
    assert sampled(folder / "student", "--out", out, "--count", 3, "--first-id", 1, "--trace", *more) == 0
    found, rows = pictures(out), pictures(tmp_path / "images_trace")
    assert list(found) == list(rows) == ["000001.png", "000002.png", "000003.png"]
    noise, hybrid = SampleNoise(range(1, 4), SHAPE), HybridSampler(sampler, first)
    cond = {"class_labels": torch.tensor([1, 2, 3])} if name == "classes" else {}
    made = trace_x0(hybrid.trace(teacher, student, noise(), cond, renoise=noise))
    for k, (image, row) in enumerate(zip(found.values(), rows.values(), strict=True)):
        expected = (made[k, :, 0] * 127.5 + 128).floor().clamp(0, 255).numpy()
        assert np.abs(row - np.concatenate(list(expected), axis=1)).max() <= 1
        assert (row[:, -8:] == image).all()


def test_sample_k_of_the_command_depends_on_k_alone(travelled, tmp_path):
    folder = travelled["lcm"][-1]
    common = [folder / "student", "--teacher-first", 2, "--steps", 9, "--teacher", folder / "teacher"]
    assert sampled(*common, "--out", tmp_path / "a", "--count", 4, "--batch-size", 3) == 0
    assert sampled(*common, "--out", tmp_path / "b", "--count", 2, "--first-id", 2) == 0
    one, two = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert list(two) == ["000002.png", "000003.png"]
    assert all(np.abs(one[name] - two[name]).max() <= 1 for name in two)
    assert not (tmp_path / "a_trace").exists()


def test_the_command_traces_a_teacher(teachers, tmp_path):
    assert sampled(teachers("edm"), "--out", tmp_path / "a", "--count", 2, "--steps", 3, "--trace") == 0
    images, rows = pictures(tmp_path / "a"), pictures(tmp_path / "a_trace")
    assert all(row.shape == (8, 24) for row in rows.values())
    assert all((rows[name][:, -8:] == images[name]).all() for name in images)


def test_the_command_finds_teacher_and_guidance_in_the_students_card(tmp_path):
    teacher, student = make_teacher(tmp_path / "teacher", "consistency"), tmp_path / "run/student"
    with pytest.raises(SystemExit) as stopped:
        main(
            ["distill", "--config", "digits_sid", f"teacher={teacher}", f"output_dir={tmp_path / 'run'}", "steps=1"]
            + ["method.steps=2", "method.input=unit", "method.init_ratio=15", "evaluate=null"]
            + ["data.class_labels=uniform", "data.null_label=3", "data.guidance_scale=4.0"]
            + ["training.batch_size=2", "training.preview_samples=2", "training.trackers=[]"]
        )
    assert stopped.value.code == 0
    assert sampled(student, "--out", tmp_path / "card", "--count", 2, "--teacher-first", 1) == 0
    assert sampled(student, "--out", tmp_path / "given", "--count", 2, "--teacher-first", 1, "--teacher", teacher) == 0
    card = student / "README.md"
    plain = card.read_text().replace("guidance_scale: 4.0", "guidance_scale: 1.0")
    assert plain != card.read_text()
    card.write_text(plain)
    assert sampled(student, "--out", tmp_path / "plain", "--count", 2, "--teacher-first", 1) == 0
    found = [np.stack(list(pictures(tmp_path / name).values())) for name in ("card", "given", "plain")]
    assert (found[0] == found[1]).all()
    assert np.abs(found[0] - found[2]).max() > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{lcm}/student", "--teacher-first", "1"], "names no teacher; give it with --teacher"),
        (["{lcm}/student", "--teacher-first", "3", "--teacher", "{lcm}/teacher"], "3 calls, got 3"),
        (["{lcm}/student", "--teacher-first", "1", "--teacher", "{lcm}/teacher", "--steps", "41"], "--steps"),
        (["{lcm}/student", "--teacher-first", "1", "--teacher", "{lcm}/teacher", "--solver", "heun"], "--solver heun"),
        (["{lcm}/student", "--teacher-first", "1", "--teacher", "{classes}/teacher"], "1x8x8 of 4 classes, "),
        (["{lcm}/student", "--teacher-first", "1", "--teacher", "nowhere"], "does not exist"),
        (["{lcm}/student", "--teacher", "{lcm}/teacher"], "--teacher-first only"),
        (["{lcm}/teacher", "--teacher-first", "1"], "needs the folder of an exported student"),
        (["{one}/student", "--teacher-first", "1", "--teacher", "{flow}/teacher"], "another noise schedule"),
        (["{one}/student", "--teacher-first", "3", "--teacher", "{one}/teacher", "--steps", "2"], "at least 3"),
        (["{broken}", "--trace"], "is not what an export writes"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(words, message, travelled, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/stepdistill.json").write_text('{"sampler": {}}')
    places = {**{name: parts[-1] for name, parts in travelled.items()}, "broken": tmp_path / "broken"}
    assert sampled(*(word.format(**places) for word in words), "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_shapes_is_refused_before_weights_are_read(travelled, tmp_path, capsys):
    network, student = tiny_unet(sample_size=16), travelled["lcm"][-1] / "student"
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors").unlink()
    words = ["--out", tmp_path / "out", "--teacher-first", 1, "--teacher", tmp_path / "teacher"]
    assert sampled(student, *words) == 2
    said = capsys.readouterr().err
    assert "makes samples of 1x16x16 of no classes" in said
    assert "of 1x8x8 of no classes; take the one it was made from" in said


def test_occupied_trace_folder_is_refused_before_anything_is_written(travelled, tmp_path, capsys):
    (tmp_path / "out_trace").mkdir()
    (tmp_path / "out_trace/mine.png").write_text("precious")
    assert sampled(travelled["lcm"][-1] / "student", "--out", tmp_path / "out", "--trace") == 2
    assert "out_trace exists" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_negative_number_of_teacher_calls_is_refused_by_the_parser(capsys):
    assert sampled("x", "--out", "y", "--teacher-first", "-1") == 2
    assert "must not be negative" in capsys.readouterr().err


@pytest.fixture(scope="module")
def hybrid_pipeline(travelled, tmp_path_factory):
    """The pipeline of the class-conditional case, in this process."""
    folder, modules = travelled["classes"][-1], tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
        yield DiffusionPipeline.from_pretrained(folder / "hybrid", trust_remote_code=True)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"teacher_first": 3}, r"0\.\.2 for a student of 3 calls"),
        ({"teacher_steps": 0}, "teacher_steps must lie in 1..40"),
        ({"teacher_renoising": "none"}, "teacher_renoising must be one of"),
        ({"class_labels": None}, "have 4 classes"),
        ({"class_labels": [1]}, "one per image"),
        ({"guidance_scale": 2.0}, "null_label"),
    ],
)
def test_the_pipeline_refuses_what_cannot_work(choice, message, hybrid_pipeline):
    with pytest.raises(ValueError, match=message):
        hybrid_pipeline(2, **{"class_labels": [0, 1], **choice})


def test_the_pipeline_makes_pictures(hybrid_pipeline):
    images = hybrid_pipeline(2, class_labels=[0, 1], generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
