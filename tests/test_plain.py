"""A network of the user's own: every process, several methods, and a student that is its sampler."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import plain_teachers
import pytest
import torch
from PIL import Image
from torch import nn

from stepdistill import Plain, load_plain, plain_student
from stepdistill.__main__ import main
from stepdistill.config import Config
from stepdistill.denoiser import Denoiser
from stepdistill.distill import Run, distill, export_run
from stepdistill.dry_run import dry_run
from stepdistill.errors import UserError
from stepdistill.images import to_uint8
from stepdistill.plain import plain_of
from stepdistill.plain_student import plain_error
from stepdistill.process import Flow
from stepdistill.push import push
from stepdistill.sample import Sampling, sample, tracing
from stepdistill.samplers import SampleNoise, sample_ode
from stepdistill.student import teacher_of
from stepdistill.teacher import load_teacher

FILE = Path(plain_teachers.__file__)
SCORE: dict[str, Any] = {"init_ratio": 2.0, "input": "unit"}
SID, TBCM = {"name": "sid", **SCORE}, {"name": "tbcm"}

TRAINING = {
    "batch_size": 4,
    "optimizer": {"lr": 0.02},
    "channels_last": True,
    "trackers": [],
    "log_every": 1,
    "preview_samples": 4,
    "preview_every": 2,
}


def teacher(name: str) -> str:
    return f"python:{FILE}:{name}"


def config(name: str, folder: Path, method: Any, training: Any = None, **changes: Any) -> Config:
    values = {
        "teacher": teacher(name),
        "output_dir": str(folder),
        "steps": 2,
        "method": method,
        "training": {**TRAINING, **(training or {})},
    }
    return Config.model_validate({**values, **changes})


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return cast(int, stopped.value.code)


def distance(config: Config, folder: Path) -> float:
    """Between the exported student and the averaged one of the run's last checkpoint, by their samplers."""
    run = Run(config)
    run.resume()
    student = load_plain(folder, plain_of(config.teacher).network)
    shape, cond = run.teacher.sample_shape, run.data.cond(range(3))
    with torch.no_grad(), run.trainer.averaged_weights() as averaged:
        noise = SampleNoise(range(3), shape)
        expected = run.sampler(averaged, noise(), cond, renoise=noise)
        noise = SampleNoise(range(3), shape)
        made = student.sampler(student.denoiser, noise(), cond, renoise=noise)
    assert expected.std() > 1e-3
    return ((made - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vp_eps", {"name": "sid", **SCORE, "steps": 2}),
        ("vp_eps", {"name": "dmd", "init_ratio": 2.0, "input": "sigma"}),
        ("vp_eps", {"name": "tscd", "segments": [2, 1], "stage_steps": [1]}),
        ("flow_velocity", SID),
        ("flow_velocity", TBCM),
        ("flow_velocity", {"name": "dmd", "init_ratio": 2.0, "steps": 3, "renoising": "fixed"}),
        ("ve_x0", {**SID, "input": "sigma"}),
        ("ve_x0", {"name": "dmd", "steps": 2}),
        ("ve_edm", {**SID, "input": "sigma"}),
        ("trig_v", SID),
        ("timed", {"name": "boot", "t_max": 0.7}),
        ("timed", {"name": "freeflow"}),
        ("latents", SID),
        ("tied", SID),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_the_exported_student_is_the_sampler_of_the_run(name, method, tmp_path):
    told = config(name, tmp_path / "run", method)
    folder = distill(told)
    assert {path.name for path in folder.iterdir()} == {
        *("network.safetensors", "stepdistill.json", "README.md", "student.png")
    }
    assert (tmp_path / "run/previews/step_00000002.png").is_file()
    assert distance(told.model_copy(update={"resume": True}), folder) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"class_labels": "uniform", "null_label": 3, "guidance_scale": 2.0}},
        {"data": {"class_labels": "uniform", "null_label": 3, "guidance_scale": [1, 3]}},
        {"training": {"lora": {role: {"rank": 2, "targets": ["enter", "leave"]} for role in ("student", "fake")}}},
        {"training": {"teacher_dtype": "bfloat16", "gradient_accumulation": 2}},
        {
            "method": None,
            "steps": None,
            "stages": [{"steps": 1, "method": SID}, {"steps": 1, "method": {**SID, "name": "dmd"}}],
        },
        {"method": {"name": "disback", "method": SID, "record_steps": 2, "points": 2, "switch_every": 1}, "steps": 4},
    ],
    ids=["guided classes", "a range of guidance", "adapters", "a teacher in half precision", "stages", "kept networks"],
)
def test_guidance_adapters_stages_and_resuming_are_as_for_pipelines(changes, tmp_path):
    name = "timed_with_classes" if "data" in changes else "vp_eps"
    told = config(name, tmp_path / "run", **{"method": SID, **changes})
    folder = distill(told)
    assert distance(told.model_copy(update={"resume": True}), folder) < 1e-5


WRAPPED = """
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from stepdistill import Plain
from stepdistill.process import VP


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = UNet2DModel.from_pretrained(FOLDER, subfolder="unet")

    def forward(self, x, label):
        return self.unet(x, label).sample


def teacher():
    table = DDPMScheduler.from_pretrained(FOLDER, subfolder="scheduler").alphas_cumprod
    return Plain(Wrapped(), process=VP(table.double()), target="eps", shape=(1, 8, 8))
"""


@pytest.mark.parametrize("method", [SID, {"name": "boot", "t_max": 0.7}], ids=["sid", "boot"])
def test_the_network_of_a_pipeline_learns_the_same_without_its_pipeline(method, teachers, tmp_path):
    (tmp_path / "wrapped.py").write_text(WRAPPED.replace("FOLDER", repr(str(teachers()))))
    learned = []
    for name in (str(teachers()), f"python:{tmp_path}/wrapped.py:teacher"):
        run = Run(config("", tmp_path / "run", method, teacher=name, training={"log_every": 100}))
        for _ in run.trainer.run(2):
            pass
        learned.append(list(run.trainer.student.parameters()))
    assert len(learned[0]) == len(learned[1])
    assert all(torch.equal(mine, other) for mine, other in zip(*learned, strict=True))


def test_a_stopped_run_goes_on_exactly(tmp_path):
    whole = distill(config("flow_velocity", tmp_path / "whole", SID, steps=3))
    told = config("flow_velocity", tmp_path / "parts", SID, steps=3)
    run = Run(told)
    run.begin()
    run.trainer.watch = lambda step, log: setattr(run.trainer, "stop_requested", step == 1)
    with pytest.raises(SystemExit):
        run.train()
    parts = distill(told.model_copy(update={"resume": True}))
    assert (parts / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()
    (parts / "network.safetensors").unlink()
    export_run(tmp_path / "parts", [])
    assert (parts / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()


@pytest.fixture
def student(tmp_path) -> Path:
    return distill(config("vp_eps", tmp_path / "run", {**SID, "steps": 2}))


def read(folder: Path) -> torch.Tensor:
    pictures = [Image.open(path) for path in sorted(folder.iterdir())]
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])


def test_the_check_of_the_export_can_fail(student):
    found, told = load_plain(student, plain_teachers.vp_eps().network), load_teacher(teacher("vp_eps"))
    assert plain_error(found.denoiser, found.sampler, told, student, {}) < 1e-6
    assert plain_error(found.denoiser, replace(found.sampler, times=(0.5, 0.3)), told, student, {}) > 1e-2
    assert plain_error(told.denoiser, found.sampler, told, student, {}) > 1e-2


def test_it_goes_to_the_hub_and_comes_from_there(student, monkeypatch):
    said = push(student.parent, "me/mine", dry_run=True)
    assert "network.safetensors" in said
    asked = []
    monkeypatch.setattr(
        plain_student, "snapshot_download", lambda source, allow_patterns: asked.append(source) or str(student)
    )
    assert load_plain("me/mine", plain_teachers.vp_eps().network).shape == (1, 8, 8)
    assert asked == ["me/mine"]


def test_the_lines_of_its_card_use_it(student):
    card = (student / "README.md").read_text()
    assert "library_name: stepdistill" in card
    found = re.search(r"## Use\n\n```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    space: dict[str, Any] = {}
    exec(found[1].replace("PATH_OR_REPO", str(student)), space)
    assert space["samples"].shape == (4, 1, 8, 8)


def test_sample_asks_for_consent_and_writes_what_the_student_makes(student, tmp_path, capsys):
    images = tmp_path / "images"
    words = ["sample", str(student), "--count", "3", "--out", str(images)]
    assert command(*words) == 2
    assert f"{teacher('vp_eps')} builds; read that code, then say --trust-remote-code" in capsys.readouterr().err
    assert command(*words, "--trust-remote-code", "--trace", "--batch-size", "2") == 0
    found, noise = load_plain(student, plain_teachers.Conv(scale=0.01)), SampleNoise(range(3), (1, 8, 8))
    with torch.no_grad():
        calls = list(found.sampler.trace(found.denoiser, noise(), renoise=noise))
    expected = [to_uint8(call.x0)[:, 0] for call in calls]
    assert torch.equal(read(images), expected[-1])
    assert torch.equal(read(tmp_path / "images_trace"), torch.cat(expected, -1))
    assert command("sample", str(student), "--out", str(tmp_path / "x"), "--teacher-first", "1") == 2


def test_the_teacher_is_sampled_too_and_latents_as_they_are_decoded(tmp_path):
    assert command("sample", teacher("latents"), "--out", str(tmp_path / "a"), "--count", "2", "--steps", "3") == 0
    plain = plain_teachers.latents()
    denoiser = Denoiser(plain.network, plain.process, plain.target, lambda network, x, label, cond: network(x, label))
    assert plain.decode is not None
    with torch.no_grad():
        expected = plain.decode(sample_ode(denoiser, SampleNoise(range(2), plain.shape)(), 3))
    assert torch.equal(read(tmp_path / "a").permute(0, 3, 1, 2), to_uint8(expected))


def test_classes_are_asked_for_by_label(tmp_path):
    folder = distill(config("with_classes", tmp_path / "run", SID, data={"class_labels": "uniform"}))
    student = load_plain(folder, plain_teachers.with_classes().network)
    noise = torch.randn(1, 1, 8, 8)
    assert not torch.equal(student(noise, torch.tensor([0])), student(noise, torch.tensor([1])))
    made = [Sampling(source=str(folder), labels=(label,), trust_remote_code=True) for label in (0, 1)]
    first, second = (tracing(asked).traces([5]) for asked in made)
    assert not torch.equal(first, second)
    assert "torch.randint(4, (4,))" in (folder / "README.md").read_text()


def test_it_is_evaluated_and_reported(tmp_path):
    evaluate = {"reference": "builtin:digits", "samples": 40, "teacher_steps": [2], "curve_samples": 40}
    distill(config("vp_eps", tmp_path / "run", SID, evaluate=evaluate))
    assert "fd-digits-v1" in (tmp_path / "run/student/README.md").read_text()
    assert command("report", str(tmp_path / "run")) == 0
    assert "plain_teachers.py:vp_eps" in (tmp_path / "run/report.html").read_text()


def test_a_dry_run_runs_its_step_without_numbers(tmp_path):
    said = dry_run(config("timed", tmp_path / "run", {"name": "boot"}))
    assert f"teacher   {teacher('timed')}: Timed, eps, VP, samples of 1x8x8" in said
    assert f"student   weights for the network of {teacher('timed')}, 1 network call(s)" in said
    assert not (tmp_path / "run").exists()


def test_no_student_has_code_run_that_its_files_name(student, tmp_path, teachers):
    """Neither a card, nor a description, nor loading: the file that they name would stop the process."""
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit(3)")
    for name in ("README.md", "stepdistill.json"):
        text = (student / name).read_text().replace(teacher("vp_eps"), f"python:{evil}:teacher")
        assert str(evil) in text
        (student / name).write_text(text)
    load_plain(student, plain_teachers.Conv(scale=0.01))
    with pytest.raises(UserError, match="--trust-remote-code"):
        sample(Sampling(source=str(student)), tmp_path / "a")
    with pytest.raises(UserError, match="names code as its teacher, which is not run; say --teacher python:"):
        teacher_of(str(student), None)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("python:nowhere", "must be python:PACKAGE.MODULE:FUNCTION or python:FILE.py:FUNCTION"),
        ("python:no_such_package.models:teacher", "No module named 'no_such_package'; a file is named by its path"),
        ("python:no/such/file.py:teacher", "there is no such file"),
        (teacher("absent"), "has no function absent"),
        (teacher("TABLE"), "has no function TABLE"),
        (teacher("another"), r"must return stepdistill\.Plain\(\.\.\.\), got str"),
        (teacher("half_the_size"), r"network\(x, label\) must return \(2, 1, 8, 8\) as x is, got \(2, 1, 8, 4\)"),
        (teacher("not_an_image_network"), r"network\(x, label\) raised RuntimeError: "),
        (teacher("pair"), "must return a tensor of floating-point numbers, got tuple"),
        (teacher("undecodable"), r"must return pictures \(2, 3, k \* 8, k \* 8\) of samples \(2, 4, 8, 8\)"),
    ],
)
def test_a_function_that_gives_no_teacher_is_refused(source, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        distill(config("vp_eps", tmp_path / "run", SID, teacher=source))
    assert not (tmp_path / "run").exists()


class Own(Flow):
    """A process that no description can name."""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"network": nn.ReLU()}, "a torch.nn.Module with weights, got ReLU"),
        ({"network": lambda x, label: x}, "a torch.nn.Module with weights, got function"),
        ({"process": "vp"}, "VP, VE, Flow, Trig, got 'vp'"),
        ({"process": Own()}, "VP, VE, Flow, Trig, got Own"),
        ({"target": "epsilon"}, "target must be one of eps, v, x0, flow, edm, got 'epsilon'"),
        ({"target": "consistency"}, "target must be one of"),
        ({"shape": (8, 8)}, r"shape must be \(C, H, W\) of one sample, got \(8, 8\)"),
        ({"shape": (4, 8, 8)}, "samples of 4 channels are no pictures; give decode"),
        ({"classes": 0}, "classes must be at least 1"),
    ],
)
def test_what_is_no_plain_network_is_refused(changes, problem):
    told: dict[str, Any] = {"network": nn.Conv2d(1, 1, 1), "process": Flow(), "target": "eps", "shape": (1, 8, 8)}
    network, *others = {**told, **changes}.items()
    with pytest.raises(UserError, match=problem):
        Plain(network[1], **dict(others))


@pytest.mark.parametrize(
    ("name", "method", "changes", "problem"),
    [
        ("vp_eps", {"name": "boot"}, {}, "Conv has no place where a student can be told a second time"),
        ("vp_eps", SID, {"data": {"guidance_scale": [2, 4]}}, "needs a class-conditional teacher"),
        (
            "with_classes",
            SID,
            {"data": {"class_labels": "uniform", "null_label": 3, "guidance_scale": [2, 4]}},
            "a scale",
        ),
        ("with_classes", SID, {}, "has 4 classes; set data.class_labels"),
        ("vp_eps", SID, {"data": {"prompts": ["a fox"]}}, "reads no prompts"),
        ("vp_eps", SID, {"data": {"resolution": 16}}, "makes 8 only; remove it"),
        ("vp_eps", {**SID, "adversarial": {}}, {"real_data": {"images": "builtin:digits"}}, "names none"),
        ("vp_eps", SID, {"export": {"own_code": True}}, "export.own_code writes a diffusers pipeline"),
        ("vp_eps", SID, {"training": {"lora": {"fake": {}}}}, "matches no layer; the network has enter, leave"),
        ("vp_eps", SID, {"training": {"gradient_checkpointing": True}}, "is of diffusers' networks"),
        ("vp_eps", SID, {"training": {"attention": "native"}}, "leaves no choice of attention"),
        ("latents", {**SID, "clip_sample": True}, {}, "makes latents, which have no range"),
    ],
)
def test_what_a_plain_network_cannot_do_is_refused_before_training(name, method, changes, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        distill(config(name, tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_network_or_of_none_is_refused(student, tmp_path):
    with pytest.raises(UserError, match="cannot read the student"):
        load_plain(student, plain_teachers.Conv(3))
    with pytest.raises(UserError, match="cannot read the student"):
        load_plain(tmp_path, plain_teachers.Conv())
    (student / "stepdistill.json").write_text("{}")
    with pytest.raises(UserError, match="is not what an export writes"):
        load_plain(student, plain_teachers.Conv())
