"""Guidance scales drawn per sample: the teacher guides each by its own, the student is told it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_unet
from families import build

from stepdistill import prompts as prompts_module
from stepdistill.backbones import unet2d
from stepdistill.backbones.conditioned import Conditioned
from stepdistill.config import Config, Data
from stepdistill.data import data_free
from stepdistill.denoiser import Denoiser, Guidance
from stepdistill.distill import Run, distill
from stepdistill.errors import UserError
from stepdistill.methods import AnyMethod
from stepdistill.process import VP
from stepdistill.recipe import parse
from stepdistill.sample import Sampling, sample
from stepdistill.teacher import load_teacher

TABLE = VP(torch.linspace(0.999, 0.01, 100).double())
UNCOND = {"class_labels": torch.tensor([3])}


def guided(scale: float | torch.Tensor | None, *, two_passes: bool = False) -> Denoiser:
    guidance = Guidance(scale, UNCOND, (0.2, 0.8), two_passes=two_passes)
    return Denoiser(tiny_unet(num_class_embeds=4), TABLE, "eps", unet2d.call, guidance=guidance)


@pytest.mark.parametrize("two_passes", [False, True])
@torch.no_grad()
def test_every_sample_is_guided_by_its_own_scale(two_passes):
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.7])
    labels, scales = torch.tensor([0, 1, 2]), torch.tensor([1.5, 3.0, 7.0])
    cond = {"class_labels": labels, "guidance_scale": scales}
    mine = guided(None, two_passes=two_passes)(x, t, cond).x0
    for k, scale in enumerate(scales.tolist()):
        row = slice(k, k + 1)
        alone = guided(scale)(x[row], t[row], {"class_labels": labels[row]}).x0
        torch.testing.assert_close(mine[row], alone)


@torch.no_grad()
def test_a_network_that_is_not_told_the_scale_never_sees_it():
    bare = replace(guided(2.0), guidance=None)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]), {"class_labels": torch.tensor([0, 1])}
    torch.testing.assert_close(
        bare(x, t, {**labels, "guidance_scale": torch.tensor([1.0, 9.0])}).x0, bare(x, t, labels).x0
    )


@pytest.mark.parametrize("target", [None, 17.0])
@torch.no_grad()
def test_a_folded_network_is_the_told_one_at_its_scale(target):
    told: Any = Conditioned(tiny_unet(), target=target is not None, scale=4.0).eval()
    for embedding in told.embeddings.values():
        torch.nn.init.normal_(embedding.linear_2.weight, std=0.5)
    x, label = torch.randn(2, 1, 8, 8), torch.full((2,), 30.0)
    numbers = {} if target is None else {"target_label": torch.full((2,), target)}
    at, beside = (told(x, label, guidance_scale=torch.full((2,), scale), **numbers)[0] for scale in (4.0, 5.0))
    torch.testing.assert_close(told.folded(target)(x, label)[0], at, atol=1e-5, rtol=1e-4)
    assert (at - beside).abs().max() > 1e-2, "the scale must matter"


def test_a_new_embedding_can_learn_from_the_first_step():
    told: Any = Conditioned(tiny_unet(), target=False, scale=4.0)
    output = told(torch.randn(2, 1, 8, 8), torch.full((2,), 30.0), guidance_scale=torch.tensor([1.0, 5.0]))[0]
    output.square().sum().backward()
    assert told.embeddings["guidance_scale"].linear_2.weight.grad.abs().max() > 0


def recipe(teacher: Path, out: Path, method: dict[str, Any], **data: Any) -> Config:
    values = {
        "teacher": str(teacher),
        "output_dir": str(out),
        "steps": 3,
        "method": method,
        "data": data,
        "training": {"batch_size": 4, "trackers": [], "log_every": 1, "optimizer": {"lr": 1e-2}},
    }
    return Config.model_validate(values)


METHODS: dict[str, dict[str, Any]] = {kind().name: {} for kind in get_args(AnyMethod) if not kind.frozen_roles} | {
    "sid": {"delta_guidance": 2.0},
    "dmd": {},
    "swiftbrush": {"init_ratio": 5.0},
    "freeflow": {"init_ratio": 5.0},
    "boot": {"t_max": 0.7},
    "tbcm": {"start_ratio": 5.0, "route_points": 2, "jvp": "finite"},
    "tscd": {"init_ratio": 5.0, "segments": [1], "stage_steps": [], "teacher_steps": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_range_and_is_exported_at_its_middle(method, teachers, tmp_path):
    """The export compares the stock pipeline with the student at the middle of the range."""
    settings = {"name": method, **METHODS[method]}
    asked = {"class_labels": [0, 1], "null_label": 3, "guidance_scale": [1.0, 5.0]}
    config = recipe(teachers("consistency"), tmp_path / "run", settings, **asked)
    run = Run(config)
    run.begin()
    run.train()
    student: Any = run.trainer.student
    fakes = [net.network for role, net in run.trainer.frozen.items() if role == "fake"]
    assert all(isinstance(fake, Conditioned) for fake in fakes), "what follows the student must know the scale"
    assert student.embeddings["guidance_scale"].linear_2.weight.abs().max() > 0
    assert (run.finish() / "model_index.json").is_file()


def test_a_network_that_embeds_its_scale_is_told_the_drawn_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "CACHE", tmp_path / "prompts")
    folder = build("flux", tmp_path / "flux")
    asked = {"prompts": ["a cat", "a dog"], "resolution": 16, "guidance_scale": [1.0, 5.0]}
    teacher = load_teacher(str(folder), resolution=16)
    data = data_free(teacher, Data(**asked), torch.device("cpu"))
    drawn = data.batch(1000).cond["guidance"]
    assert drawn.min() < 1.1
    assert drawn.max() > 4.9
    assert data.cond(range(2))["guidance"].tolist() == [3.0, 3.0]
    student = distill(
        recipe(folder, tmp_path / "run", {"name": "sid", "init_ratio": float("inf"), "input": "unit"}, **asked)
    )
    assert json.loads((student / "stepdistill.json").read_text())["call"]["guidance_scale"] == 3.0


def test_adapters_learn_a_range_without_being_told(teachers, tmp_path):
    asked = {"class_labels": [0, 1], "null_label": 3, "guidance_scale": [1.0, 5.0]}
    config = recipe(teachers("consistency"), tmp_path / "run", {"name": "sid"}, **asked)
    lora = {"student": {"rank": 2, "targets": ["to_q", "to_k"]}}
    run = Run(
        config.model_copy(
            update={"training": config.training.model_validate({**config.training.model_dump(), "lora": lora})}
        )
    )
    assert not isinstance(run.trainer.student, Conditioned)
    run.trainer.step()


@pytest.mark.parametrize("scales", [[5.0, 1.0], [-1.0, 2.0], [1.0], -1, "strong", [1, 2, 3]])
def test_ranges_that_are_none_are_refused(scales, teachers, tmp_path):
    words = [f"data.guidance_scale={scales}", "data.class_labels=uniform", "data.null_label=3"]
    words += [
        f"teacher={teachers('consistency')}",
        f"output_dir={tmp_path / 'run'}",
        "evaluate=null",
        "method.clip_sample=false",
    ]
    with pytest.raises(UserError, match=r"1 invalid value\n.*guidance_scale: must be a number from 0 on, or a range"):
        distill(parse(Config, "digits_sid", words))
    assert not (tmp_path / "run").exists()


def test_a_conditioned_network_is_copied_whole():
    told = Conditioned(tiny_unet(), target=True, scale=2.5)
    assert copy.deepcopy(told).scale == 2.5


@torch.no_grad()
def test_a_guided_network_that_is_told_scales_is_told_them_in_both_halves():
    told: Any = Conditioned(tiny_unet(num_class_embeds=4), target=False, scale=4.0).eval()
    torch.nn.init.normal_(told.embeddings["guidance_scale"].linear_2.weight, std=0.5)
    fake = replace(guided(2.0), network=told, told_scale=True)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([0, 1])
    cond = {"class_labels": labels, "guidance_scale": torch.tensor([1.0, 9.0])}
    bare = replace(fake, guidance=None)
    null = {**cond, "class_labels": torch.tensor([3, 3])}
    outside = bare(x, t, null).x0 + 2.0 * (bare(x, t, cond).x0 - bare(x, t, null).x0)
    torch.testing.assert_close(fake(x, t, cond).x0, outside, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "lora"),
    [({"name": "swiftbrush", "init_ratio": 5.0}, ["fake"]), ({"name": "disback", "method": {"name": "sid"}}, [])],
)
def test_a_range_whose_other_network_cannot_be_told_is_refused(method, lora, teachers, tmp_path):
    asked = {"class_labels": [0, 1], "null_label": 3, "guidance_scale": [1.0, 5.0]}
    values = recipe(teachers("consistency"), tmp_path / "run", method, **asked).model_dump(mode="json")
    values["training"]["lora"] = {role: {"rank": 2, "targets": ["to_q"]} for role in lora}
    values["steps"] = 2000
    with pytest.raises(UserError, match="must be told the scale that a sample drew"):
        distill(Config.model_validate(values))


def test_a_hybrid_of_a_student_of_a_range_takes_the_middle(teachers, tmp_path):
    asked = {"class_labels": [0, 1], "null_label": 3, "guidance_scale": [1.0, 5.0]}
    student = distill(
        recipe(teachers("consistency"), tmp_path / "run", {"name": "sid", "steps": 2, "input": "unit"}, **asked)
    )
    sample(Sampling(source=str(student), labels=(0, 1), teacher_first=1), tmp_path / "images", count=2)
    assert len(list((tmp_path / "images").iterdir())) == 2
