"""Students that travel with a pipeline file: plain calls are right, grids run that no stock scheduler has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import DiffusionPipeline
from families import build

from stepdistill.backbones import unet2d
from stepdistill.config import Config
from stepdistill.denoiser import Denoiser, Target
from stepdistill.distill import distill
from stepdistill.errors import UserError
from stepdistill.export import export
from stepdistill.hosting import plan
from stepdistill.methods import SiD
from stepdistill.own_code import code_of
from stepdistill.process import VE, VP, Flow, NoiseProcess
from stepdistill.sample import Sampling, sample
from stepdistill.samplers import SampleNoise, StudentSampler
from stepdistill.teacher import load_teacher

SHAPE = (1, 8, 8)
TABLE = VP(torch.linspace(0.999, 0.01, 100).double())


def student(process: NoiseProcess, target: Target, **options: Any) -> Denoiser:
    return Denoiser(tiny_unet(seed=4, **options), process, target, unet2d.call)


GRIDS: list[tuple[NoiseProcess, Target, StudentSampler]] = [
    (TABLE, "eps", StudentSampler((0.8, 0.777, 0.2), "unit", None, "fresh")),
    (TABLE, "v", StudentSampler((1.0, 0.33), "sigma", None, "fixed")),
    (TABLE, "x0", StudentSampler((0.9, 0.5), "unit", None, "ddim", True)),
    (Flow(shift=3.0), "flow", StudentSampler((1.0, 0.9, 0.1), "unit", None, "fresh")),
    (Flow(label_scale=1.0, reversed_label=True), "flow", StudentSampler((1.0, 0.5), "unit", None, "ddim")),
    (VE(), "edm", StudentSampler((0.7, 0.4, 0.3), "sigma", None, "fresh")),
]


@pytest.mark.parametrize(("process", "target", "sampler"), GRIDS)
@pytest.mark.parametrize("classes", [None, 4])
def test_any_grid_under_any_process_runs_in_the_students_own_pipeline(process, target, sampler, classes, tmp_path):
    denoiser = student(process, target, num_class_embeds=classes)
    cond = {"class_labels": torch.tensor([0, 1, 2, 3])} if classes else {}
    with pytest.raises(UserError, match=r"or set export.own_code=true, to load it with trust_remote_code=True"):
        plan(denoiser, sampler, classes=classes)
    hosted = plan(denoiser, sampler, classes=classes, own_code=True)
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond=cond, own_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "student")


PLAIN = """
import torch
from diffusers import DiffusionPipeline
def drawn(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    return pipe, pipe(batch_size=4, generator=generators, output_type="np").images
pipe, image = drawn({folder!r})
pipe.save_pretrained({copy!r})
_, again = drawn({copy!r})
assert (image == again).all()
"""


def test_without_stepdistill_a_plain_call_and_a_saved_copy_give_the_samplers_images(elsewhere, tmp_path):
    process, target, sampler = GRIDS[0]
    denoiser, folder = student(process, target), tmp_path / "student"
    export(denoiser, sampler, plan(denoiser, sampler, classes=None, own_code=True), folder, shape=SHAPE, cond={})
    images = elsewhere(PLAIN.format(folder=str(folder), copy=str(tmp_path / "copy"))).permute(0, 3, 1, 2)
    noise = SampleNoise(range(4), SHAPE)
    with torch.no_grad():
        expected = sampler(denoiser, noise(), renoise=noise) / 2 + 0.5
    torch.testing.assert_close(images, expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert images.std() > 0.05


def test_two_students_in_one_process_do_not_share_their_file(tmp_path):
    names = set()
    for k, sampler in enumerate((GRIDS[0][2], replace(GRIDS[0][2], times=(0.8, 0.3, 0.1)))):
        denoiser, folder = student(TABLE, "eps"), tmp_path / str(k)
        export(denoiser, sampler, plan(denoiser, sampler, classes=None, own_code=True), folder, shape=SHAPE, cond={})
        code = code_of(folder)
        assert code is not None
        names.add(code.name)
    assert len(names) == 2


def test_another_number_of_steps_than_the_grid_has_is_refused(tmp_path):
    denoiser, sampler = student(TABLE, "eps"), GRIDS[0][2]
    export(
        denoiser, sampler, plan(denoiser, sampler, classes=None, own_code=True), tmp_path / "a", shape=SHAPE, cond={}
    )
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"makes 3 calls, got num_inference_steps=8; leave it out"):
        pipeline(num_inference_steps=8)
    assert len(pipeline(num_inference_steps=3).images) == 1


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana", "flux", "dit", "sit"])
def test_plain_calls_of_every_family_are_right(name, folders, cache, tmp_path, capsys):
    """The export itself calls the pipeline with prompt or label alone and compares it with the sampler."""
    data: dict[str, Any] = {"class_labels": [3, 7]} if name in ("dit", "sit") else {"prompts": ["a cat", "a dog"]}
    if name in ("flux", "sana"):
        data["resolution"] = {"flux": 16, "sana": 32}[name]
    ratio = 5.0 if name in ("sd", "sdxl", "pixart", "dit") else float("inf")
    values = {
        "teacher": str(folders(name)),
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "method": {"name": "sid", "steps": 2, "init_ratio": ratio, "input": "unit"},
        "data": data,
        "training": {"batch_size": 2, "trackers": []},
        "export": {"own_code": True},
    }
    folder = distill(Config.model_validate(values))
    sole = name == "sit"
    assert json.loads((folder / "stepdistill.json").read_text())["sole"] == sole
    said = capsys.readouterr().out
    assert ("custom_pipeline" in said) != sole
    lines = said.split("\n\n")[-1].split("\n# or with")[-1].split("\n", 1 if not sole else 0)[-1]
    space: dict[str, Any] = {}
    exec(lines.replace('image.save("sample.png")', ""), space)
    assert "num_inference_steps" not in lines
    assert space["image"].size
    if sole:
        with pytest.raises(UserError, match="--trust-remote-code"):
            sample(Sampling(source=str(folder)), tmp_path / "images", count=2)
        sample(Sampling(source=str(folder), trust_remote_code=True), tmp_path / "images", count=2)
        assert len(list((tmp_path / "images").iterdir())) == 2


def test_a_pipeline_that_does_not_scale_its_input_is_refused_before_training(tmp_path):
    teacher = load_teacher(str(build("sd3", tmp_path / "sd3")))
    sampler = SiD().sampler(teacher.denoiser.process)
    with pytest.raises(UserError, match=r"set method\.input=unit"):
        plan(teacher.denoiser, sampler, classes=None, family=teacher.family, own_code=True)


@pytest.mark.parametrize("description", [None, {"stock": "DDPMPipeline", "sole": False}])
def test_a_teacher_with_code_of_its_own_is_refused(description, teachers, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in Path(teachers()).iterdir():
        (folder / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["evil", "Pipeline"]}))
    (folder / "evil.py").write_text("raise SystemExit(1)")
    if description:
        (folder / "stepdistill.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="pipeline code of its own, which is not run"):
        load_teacher(str(folder))
