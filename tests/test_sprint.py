"""Students whose pipelines are told a scale and make the same picture whatever it is: in Sana-Sprint's, Flux, LCM."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline, SCMScheduler
from families import build

from stepdistill import outcome
from stepdistill import prompts as prompts_module
from stepdistill.backbones.sana import SANA
from stepdistill.config import Config
from stepdistill.decoder import Decoder
from stepdistill.distill import Run
from stepdistill.errors import UserError
from stepdistill.hosting import plan
from stepdistill.methods import SiD
from stepdistill.sample import Sampling, sample
from stepdistill.samplers import StudentSampler
from stepdistill.teacher import Teacher, load_teacher

TBCM = {"name": "tbcm", "route_points": 3, "jvp": "finite", "input": "unit"}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "CACHE", tmp_path / "prompts")


def trained(teacher: Path, out: Path, method: dict[str, Any], resolution: int | None, **sections: Any) -> Run:
    data = {"prompts": ["a cat", "two dogs"], "resolution": resolution, **sections.pop("data", {})}
    training = {"batch_size": 2, "trackers": [], "optimizer": {"lr": 1e-2}, "ema_halflife_images": None}
    values = {"teacher": str(teacher), "output_dir": str(out), "steps": 2, "method": method, "data": data}
    run = Run(Config.model_validate({**values, "training": training, **sections}))
    run.begin()
    run.train()
    run.finish()
    return run


def lines_of(folder: Path) -> str:
    """The lines of a card, for pictures as numbers."""
    (lines,) = re.findall(r"^## Use\n\n```python\n(.*?)\n```", (folder / "README.md").read_text(), re.M | re.S)
    lines = lines.replace(outcome.PLACE, str(folder)).replace(").images[0]", ', output_type="np").images[0]')
    return lines.replace('image.save("sample.png")', "")


def sampled(run: Run) -> torch.Tensor:
    """What the sampler of the training makes of the noise that the card's lines draw from seed 1."""
    torch.manual_seed(1)
    with torch.no_grad(), run.trainer.averaged_weights() as student:
        shape, cond = run.teacher.sample_shape, run.data.cond([0])
        later = run.teacher.family.later_noise
        made = run.sampler(student, torch.randn(1, *shape), cond, renoise=lambda: later(torch.randn(1, *shape)))
    return (Decoder(run.teacher)(made) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


@pytest.mark.parametrize(("scale", "steps"), [(0.001, 2), (1.0, 1)])
def test_a_student_of_sana_runs_in_sana_sprints_pipeline_where_stepdistill_is_not(
    scale, steps, quick, elsewhere, tmp_path
):
    teacher = build("sana", tmp_path / "teacher", timestep_scale=scale)
    run = trained(teacher, tmp_path / "run", {**TBCM, "steps": steps}, 32, export={"sana_sprint": True})
    folder = run.outcome.student_folder
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == ("SanaSprintPipeline", "SCMScheduler")
    lines = lines_of(folder)
    assert "guidance_scale" not in lines
    image = elsewhere(lines, seed=1)
    torch.testing.assert_close(image, sampled(run), atol=1e-5, rtol=0)
    assert image.std() > 0.01
    sample(Sampling(source=str(folder)), tmp_path / "images", count=2)
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_sana_sprints_own_call_and_any_guidance_are_right_for_a_consistency_student(quick, tmp_path):
    """Two steps by its own default angles, which are levels that TBCM trains as it does all others."""
    teacher = build("sana", tmp_path / "teacher", timestep_scale=0.001)
    run = trained(teacher, tmp_path / "run", {**TBCM, "steps": 2}, 32, export={"sana_sprint": True})
    pipeline: Any = DiffusionPipeline.from_pretrained(run.outcome.student_folder)
    assert isinstance(pipeline, SanaSprintPipeline)
    angles = torch.tensor([torch.pi / 2, 1.3], dtype=torch.float64)
    levels = angles.sin() / (angles.sin() + angles.cos())
    times = run.taught.process.time_at_log_snr(2 * ((1 - levels) / levels).log()).tolist()
    run.sampler = replace(run.sampler, times=tuple(times))
    for guidance in (0.0, 4.5, 20.0):
        torch.manual_seed(1)
        asked: dict[str, Any] = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "np"}
        made: Any = pipeline("a cat", guidance_scale=guidance, **asked)
        image = torch.from_numpy(made.images[0])
        torch.testing.assert_close(image, sampled(run), atol=1e-5, rtol=0)


def test_students_that_sana_sprints_pipeline_does_not_run_are_refused_before_training(tmp_path):
    teacher, other = (load_teacher(str(build(name, tmp_path / name)), resolution=32) for name in ("sana", "sd3"))

    def refused(sampler: StudentSampler, message: str, of: Teacher = teacher) -> None:
        with pytest.raises(UserError, match=message):
            plan(of.denoiser, sampler, classes=None, family=of.family, sana_sprint=True)

    def sampler(**options: Any) -> StudentSampler:
        settings: dict[str, Any] = {"init_ratio": float("inf"), "input": "unit", **options}
        return SiD(**settings).sampler(teacher.denoiser.process)

    refused(sampler(), "is for students of Sana; remove it", other)
    refused(sampler(steps=3), "set method.init_ratio .* method.steps to 1 or 2")
    refused(sampler(init_ratio=5.0), "one step from sigma 1")
    refused(sampler(steps=2, renoising="ddim"), "renoising=fresh")
    refused(sampler(steps=2), "told 1000 sigma, which can be folded in for one step only")
    hosted = plan(teacher.denoiser, sampler(), classes=None, family=SANA, sana_sprint=True)
    assert isinstance(hosted.scheduler, SCMScheduler)


@pytest.mark.parametrize(("name", "method"), [("flux", "sid"), ("flux", "boot"), ("lcm", "dmd")])
def test_any_guidance_gives_the_picture_of_a_student_that_was_told_one_scale(name, method, quick, tmp_path):
    settings = {"name": method} | ({"t_max": 1.0} if method == "boot" else {"input": "unit", "init_ratio": 5.0})
    if name == "flux" and method == "sid":
        settings["init_ratio"] = float("inf")
    size, teacher = 16, build(name, tmp_path / "teacher")
    run = trained(teacher, tmp_path / "run", settings, size, data={"guidance_scale": 2.0})
    lines = lines_of(run.outcome.student_folder)
    assert "guidance_scale" not in lines
    for said in ("", ", guidance_scale=0.0", ", guidance_scale=1.0", ", guidance_scale=2.0", ", guidance_scale=9.0"):
        space: dict[str, Any] = {}
        for line in lines.replace(', output_type="np"', f'{said}, output_type="np"').splitlines():
            torch.manual_seed(1)
            exec(line, space)
        torch.testing.assert_close(torch.from_numpy(space["image"]), sampled(run), atol=1e-5, rtol=0)


def test_a_student_that_was_told_a_range_of_scales_is_still_told_one(quick, tmp_path):
    settings = {"name": "sid", "input": "unit", "init_ratio": float("inf")}
    teacher = build("flux", tmp_path / "teacher")
    run = trained(teacher, tmp_path / "run", settings, 16, data={"guidance_scale": [2.0, 4.0]})
    assert "guidance_scale=3.0" in lines_of(run.outcome.student_folder)
    pipeline: Any = DiffusionPipeline.from_pretrained(run.outcome.student_folder)
    assert pipeline.transformer.config.guidance_embeds


def test_adapters_rest_on_a_network_that_must_still_be_told_the_scale(quick, tmp_path):
    """The export compares them with the sampler by the lines' own call."""
    settings = {"name": "sid", "input": "unit", "init_ratio": float("inf")}
    training = {"batch_size": 2, "trackers": [], "lora": {"student": {"rank": 2}}, "optimizer": {"lr": 1e-2}}
    teacher = build("flux", tmp_path / "teacher")
    data = {"guidance_scale": 2.0}
    run = trained(teacher, tmp_path / "run", settings, 16, data=data, training=training)
    assert "guidance_scale=2.0" in lines_of(run.folder / "student_lora")
    assert "guidance_scale" not in lines_of(run.outcome.student_folder)
