"""The teacher first in every family: full students and adapters, by the command and by the pipeline that travels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import build
from PIL import Image
from test_families import CLASSES, INF, SIZES, asked, call, moved

from stepdistill import prompts as prompts_module
from stepdistill.__main__ import main
from stepdistill.adapters import export_lora
from stepdistill.config import Config, Lora
from stepdistill.data import DataFree, data_free
from stepdistill.decoder import Decoder
from stepdistill.denoiser import Denoiser
from stepdistill.distill import distill
from stepdistill.errors import UserError
from stepdistill.export import Host, export
from stepdistill.hosting import plan
from stepdistill.hybrid import HybridSampler, trace_ode, trace_x0
from stepdistill.lora import add_lora
from stepdistill.methods import SiD
from stepdistill.sample import tracing
from stepdistill.samplers import SampleNoise, StudentSampler
from stepdistill.sampling import Sampling
from stepdistill.teacher import Teacher, load_teacher

IDS = [3, 5]
"""The first prompt's and the second's."""
PROMPTS = ("a cat", "two dogs")
KINDS = ("student", "student_lora")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Encoded prompts go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_module, "CACHE", tmp_path_factory.mktemp("prompts"))
        yield


class Made(NamedTuple):
    """A teacher and its student, in memory and on disk."""

    teacher: Teacher
    student: Denoiser
    sampler: StudentSampler
    folder: Path

    @property
    def source(self) -> str:
        return str(self.folder / "student")


def adapted(teacher: Teacher) -> Denoiser:
    """A student that is adapters away from zero."""
    network = add_lora(teacher.network, Lora(rank=2, alpha=4.0), "student")
    torch.manual_seed(9)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return replace(teacher.denoiser, network=network.requires_grad_(False))


def made(name: str, folder: Path, *, steps: int = 3, lora: bool = False, **options: Any) -> Made:
    """A student of the family ``name``, exported as a run exports it."""
    teacher = load_teacher(str(build(name, folder / "teacher")), resolution=SIZES.get(name))
    ratio = INF if teacher.denoiser.target == "flow" else 2.5
    own_code = options.pop("own_code", False)
    method = SiD(steps=steps, **{"init_ratio": ratio, "input": "unit", **options})
    student, sampler = (adapted if lora else moved)(teacher), method.sampler(teacher.denoiser.process)
    hosted = plan(teacher.denoiser, sampler, classes=teacher.classes, family=teacher.family, own_code=own_code)
    said = call(name, teacher, 0)
    told: dict[str, Any] = {"class_labels": [3, 7]} if name in CLASSES else {"prompt": list(PROMPTS)}
    told |= {"guidance_scale": 1.0} if lora else {}
    write: Callable[..., None] = export_lora if lora else export
    cond = data_free(teacher, asked(teacher), torch.device("cpu")).cond(range(2))
    write(
        student, sampler, hosted, folder / "student", shape=teacher.sample_shape, cond=cond,
        host=Host(teacher, {**said, **told}),
    )  # fmt: skip
    return Made(teacher, student, sampler, folder)


def sampling(made: Made, **options: Any) -> Sampling:
    told: dict[str, Any] = {"labels": (3, 7)} if made.teacher.family.encode is None else {"prompts": PROMPTS}
    return Sampling(source=made.source, **{**told, **options})


def expected(
    made: Made, first: int, *, scale: float = 1.0, negative: str | None = None, **options: Any
) -> torch.Tensor:
    """What every call predicts, as pictures, by networks in memory; ``options`` are ``HybridSampler``'s."""
    told = asked(made.teacher, guidance_scale=scale, negative_prompt=negative)
    data: DataFree = data_free(made.teacher, told, torch.device("cpu"))
    noise, later = SampleNoise(IDS, made.teacher.sample_shape), made.teacher.family.later_noise
    hybrid = HybridSampler(made.sampler, first, **options)
    guided = made.teacher.guided(told, data.null)
    with torch.no_grad():
        said = hybrid.trace(guided, made.student, noise(), data.cond(IDS), renoise=lambda: later(noise()))
        return torch.stack([Decoder(made.teacher)(each) for each in trace_x0(said).unbind(1)], dim=1)


@torch.no_grad()
def found(made: Made, **options: Any) -> torch.Tensor:
    return tracing(sampling(made, **options)).traces(IDS)


same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
FAMILIES = ("sd", "sd-v", "lcm", "sdxl", "sd3", "pixart", "sana", "flux", "dit")


@pytest.mark.parametrize(
    ("name", "lora", "renoising"),
    [(name, False, "fresh") for name in FAMILIES]
    + [(name, True, "fresh") for name in FAMILIES if name not in ("sd-v", "lcm")]
    + [("sd", False, "ddim"), ("repa", False, "ddim")],
)
def test_the_command_is_the_sampler_in_every_family(name, lora, renoising, tmp_path):
    """The teacher guided or not, the trace, and the student alone as its own pipeline draws it."""
    one = made(name, tmp_path, lora=lora, renoising=renoising)
    teacher = {"teacher": str(tmp_path / "teacher")}
    first = {"teacher_first": 1, **teacher}
    plain = expected(one, 1)
    same(found(one, **first, trace=True), plain)
    same(found(one, **first), plain[:, -1:])
    same(found(one, **{**first, "teacher_first": 2, "steps": 7}), expected(one, 2, teacher_steps=7)[:, -1:])
    if not one.teacher.embeds_guidance:
        guided = expected(one, 1, scale=3.0)
        same(found(one, **first, trace=True, guidance_scale=3.0), guided)
        assert (guided[:, 0] - plain[:, 0]).abs().max() > 1e-4
    if name == "repa":  # its process is not that of the scheduler that hosts it
        with pytest.raises(UserError, match=r"FlowMapEuler.* is not supported; supported are"):
            found(one, trace=True)
        same(found(one).clamp(-1, 1), expected(one, 0)[:, -1:].clamp(-1, 1))
        return
    alone = found(one, trace=True, **(teacher if lora else {}))
    assert alone.shape[1] == 3
    same(alone, expected(one, 0))
    same(found(one, **(teacher if lora else {})).clamp(-1, 1), alone[:, -1:].clamp(-1, 1))
    assert (alone[:, -1] - plain[:, -1]).abs().max() > 1e-3, "the teacher must matter"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd", {}),
        ("sd", {"lora": True}),
        ("sd-v", {}),
        ("sd3", {}),
        ("sit", {}),
        ("sd", {"steps": 2, "renoising": "fixed", "own_code": True}),
        ("sit", {"steps": 2, "own_code": True}),
    ],
)
def test_students_of_one_call_and_those_with_a_pipeline_file_are_taken_as_they_were_trained(name, options, tmp_path):
    """What the export folds away to fit a stock scheduler is undone."""
    one = made(name, tmp_path, **{"steps": 1, "init_ratio": 2.5, **options})
    same(found(one, teacher_first=1, teacher=str(tmp_path / "teacher"), trace=True), expected(one, 1))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_one_network_for_both_on_one_grid_is_the_teachers_own_run(name, tmp_path):
    one = made(name, tmp_path, steps=4, init_ratio=INF, renoising="ddim")
    alike = one._replace(student=one.teacher.denoiser)
    data = data_free(one.teacher, asked(one.teacher), torch.device("cpu"))
    noise = SampleNoise(IDS, one.teacher.sample_shape)()
    with torch.no_grad():
        run = trace_x0(trace_ode(one.teacher.denoiser, noise, 4, data.cond(IDS)))
    same(expected(alike, 2), torch.stack([Decoder(one.teacher)(each) for each in run.unbind(1)], dim=1))


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *map(str, words)])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two calls on adapters, from a recipe with prompts and guidance."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "teacher": str(build("sd", folder / "teacher")),
        "output_dir": str(folder / "run"),
        "steps": 1,
        "method": {"name": "sid", "steps": 2, "init_ratio": 2.5, "input": "unit"},
        "data": {"prompts": list(PROMPTS), "guidance_scale": 3.0, "negative_prompt": "a fox"},
        "training": {"batch_size": 2, "trackers": [], "lora": {"student": {"rank": 2}}, "optimizer": {"lr": 1e-2}},
    }
    distill(Config.model_validate(values))
    return folder / "run"


def pictures(folder: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(Image.open(path)).astype(int)) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_finds_teacher_prompts_and_guidance_in_the_card(kind, run, tmp_path):
    told = [run / kind, "--count", 2]
    assert command(*told, "--out", tmp_path / "alone") == 0
    first = [*told, "--teacher-first", 1]
    assert command(*first, "--out", tmp_path / "first", "--trace") == 0
    assert command(*first, "--out", tmp_path / "plain", "--guidance-scale", 1, "--trace") == 0
    assert command(*first, "--out", tmp_path / "same", "--prompt", *PROMPTS, "--guidance-scale", 3) == 0
    assert command(*first, "--out", tmp_path / "other", "--prompt", "a fox") == 0
    names = ("alone", "first", "plain", "same", "other", "first_trace")
    alone, first, plain, again, other, rows = (pictures(tmp_path / name) for name in names)
    assert all(row.shape == (16, 32, 3) for row in rows), "the teacher's call and the student's"
    assert all(torch.equal(row[:, 16:], image) for row, image in zip(rows, first, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], alone[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(rows[0], pictures(tmp_path / "plain_trace")[0]), "the teacher is guided"
    assert len(plain) == 2


def test_adapters_and_the_student_that_they_are_merged_into_draw_the_same(run, tmp_path):
    for kind in KINDS:
        words = [run / kind, "--count", 2, "--trace", "--out", tmp_path / kind]
        assert command(*words) == 0
        assert command(*words[:-1], tmp_path / f"first_{kind}", "--teacher-first", 1) == 0
    for name in ("", "first_"):
        for one, two in zip(*(pictures(tmp_path / f"{name}{kind}_trace") for kind in KINDS), strict=True):
            assert (one - two).abs().max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/student", "--teacher-first", "2"], "must leave one of the student's 2 calls, got 2"),
        (["{run}/student", "--teacher-first", "1", "--steps", "1001"], "--steps: steps must be at most the 1000"),
        (["{run}/student", "--teacher-first", "1", "--teacher", "{dit}"], "are not of one family of pipelines"),
        (["{run}/student", "--teacher-first", "1", "--labels", "3"], "reads prompts; remove --labels"),
        (["{run}/student", "--guidance-scale", "3"], "a student has learned its own"),
        (["{bare}", "--teacher-first", "1"], "names no teacher; give it with --teacher"),
        (["{bare}", "--teacher-first", "1", "--teacher", "{teacher}"], "its card names none; give --prompts"),
        (
            ["{noise}/student", "--teacher-first", "1", "--teacher", "{noise}/teacher"],
            "would see nothing of the teacher's draft",
        ),
    ],
)
def test_bad_input_is_one_clear_line(words, message, run, tmp_path, capsys):
    places: dict[str, Any] = {"run": run, "teacher": run.parent / "teacher", "bare": tmp_path / "bare"}
    if "{bare}" in words:
        shutil.copytree(run / "student", tmp_path / "bare")
        (tmp_path / "bare/README.md").unlink()
    if "{dit}" in words:
        places["dit"] = build("dit", tmp_path / "dit")
    if "{noise}/student" in words:
        places["noise"] = made("sd3", tmp_path / "noise", steps=1).folder
        words = [*words, "--prompt", "a cat"]
    capsys.readouterr()
    assert command(*(word.format(**places) for word in words), "--out", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()
