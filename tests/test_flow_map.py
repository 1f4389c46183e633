"""A student that keeps its second time travels with ``flow_map_v1.py``: as many jumps as asked, as its sampler's."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from stepdistill.backbones import conditioned, unet2d
from stepdistill.config import Config
from stepdistill.decoder import Decoder
from stepdistill.denoiser import Denoiser, Target
from stepdistill.distill import Run
from stepdistill.errors import UserError
from stepdistill.export import export
from stepdistill.hosting import plan
from stepdistill.methods import FreeFlow
from stepdistill.process import VE, VP, Flow, NoiseProcess
from stepdistill.sample import Sampling, sample
from stepdistill.samplers import SampleNoise
from stepdistill.student import learned
from stepdistill.teacher import load_teacher

SHAPE, INF = (1, 8, 8), float("inf")
TABLE = VP(DDPMScheduler().alphas_cumprod.double())
STEPS = (1, 2, 3, 7)


def speak(network: conditioned.Conditioned) -> conditioned.Conditioned:
    """Let the second time matter."""
    torch.manual_seed(2)
    embedding = cast(Any, network.embeddings["target_label"])
    nn.init.normal_(embedding.linear_2.weight, std=0.3)
    return network


def mapped(process: NoiseProcess, target: Target, **options: Any) -> Denoiser:
    network = speak(conditioned.Conditioned(tiny_unet(seed=4, **options)))
    return Denoiser(network.eval(), process, target, unet2d.call)


CODE = """
import torch
from diffusers import DiffusionPipeline
def drawn(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    def made(**told):
        generators = [torch.Generator().manual_seed(k) for k in range(4)]
        return torch.from_numpy(pipe(batch_size=4, generator=generators, output_type="np", **told).images)
    return pipe, torch.stack([made(), *(made(num_inference_steps=n) for n in {steps})])
pipe, image = drawn({folder!r})
pipe.save_pretrained({folder!r} + "_copy")
_, again = drawn({folder!r} + "_copy")
assert (image == again).all()
"""


@pytest.mark.parametrize(
    ("process", "target", "fields"),
    [
        (TABLE, "eps", {"init_ratio": 9.0, "clip_sample": True}),
        (Flow(shift=3.0), "flow", {}),
        (VE(), "edm", {"input": "sigma"}),
    ],
)
def test_any_number_of_jumps_is_the_samplers_and_a_saved_copy_keeps_its_code(
    process, target, fields, elsewhere, tmp_path
):
    denoiser, folder = mapped(process, target), tmp_path / "student"
    sampler = FreeFlow(start_share=0.5, **fields).sampler(process)
    hosted = plan(denoiser, sampler, classes=None, own_code=True)
    export(denoiser, sampler, hosted, folder, shape=SHAPE, cond={}, own_code=True)
    images = elsewhere(CODE.format(folder=str(folder), steps=STEPS)).permute(0, 1, 4, 2, 3)
    assert torch.equal(images[0], images[1]), "a plain call is one jump"
    with torch.no_grad():
        for steps, found in zip(STEPS, images[1:], strict=True):
            expected = sampler.in_steps(steps)(denoiser, SampleNoise(range(4), SHAPE)()) / 2 + 0.5
            torch.testing.assert_close(found, expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert (images[1] - images[2]).abs().max() > 1e-3, "where to go must matter"


def test_without_starts_on_the_way_a_student_is_folded_for_one_step(tmp_path):
    denoiser, sampler = mapped(Flow(), "flow"), FreeFlow().sampler(Flow())
    assert not plan(denoiser, sampler, classes=None, own_code=True).is_map
    free = FreeFlow(start_share=0.5).sampler(Flow())
    assert not plan(denoiser, free, classes=None).is_map
    with pytest.raises(ValueError, match="steps must be 1 to 120, got 121"):
        free.in_steps(121)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana", "flux", "dit", "sit"])
def test_every_family_keeps_its_map(name, folders, cache, elsewhere, tmp_path):
    size = {"flux": 16, "sana": 32}.get(name)
    data: dict[str, Any] = {"class_labels": [3, 7]} if name in ("dit", "sit") else {"prompts": ["a cat", "a dog"]}
    ratio = 5.0 if name in ("sd", "sdxl", "pixart", "dit") else INF
    values = {
        "teacher": str(folders(name)),
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "method": {"name": "freeflow", "init_ratio": ratio, "start_share": 0.5},
        "data": {**data, "resolution": size},
        "training": {"batch_size": 4, "trackers": []},
        "export": {"own_code": True},
    }
    run = Run(Config.model_validate(values))
    run.begin()
    run.train()
    speak(cast(Any, run.trainer.learners["student"]))
    run.trainer.ema = None
    folder = run.finish()
    asked = "'a cat'" if "prompts" in data else "class_labels=[3]"
    asked += f", height={size}, width={size}" if size else ""
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
torch.manual_seed(1)
image = pipe({asked}, num_inference_steps=3, output_type="np").images[0]
"""
    torch.manual_seed(1)
    with torch.no_grad(), run.trainer.averaged_weights() as student:
        made = run.sampler.in_steps(3)(student, torch.randn(1, *run.teacher.sample_shape), run.data.cond([0]))
    expected = (Decoder(run.teacher)(made) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    torch.testing.assert_close(elsewhere(code), expected, atol=1e-5, rtol=0)
    assert "num_inference_steps=4" in (folder / "README.md").read_text()


def test_its_folder_says_what_it_is_and_is_not_read_without_its_code(tmp_path, teachers):
    denoiser, folder = mapped(TABLE, "eps"), tmp_path / "student"
    sampler = FreeFlow(start_share=0.5, init_ratio=9.0).sampler(TABLE)
    export(denoiser, sampler, plan(denoiser, sampler, classes=None, own_code=True), folder, shape=SHAPE, cond={})
    index = json.loads((folder / "model_index.json").read_text())
    (code,) = folder.glob("flow_map_v1_*.py")
    assert index["_class_name"] == [code.stem, "FlowMapPipeline"]
    assert (folder / "target_embedding" / code.name).read_bytes() == code.read_bytes()
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="told where to go by its own pipeline file alone"):
        learned(str(folder), load_teacher(str(teachers())))
    pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="num_inference_steps must be 1 to 120, got 121"):
        pipe(num_inference_steps=121)
    sample(Sampling(source=str(folder), trust_remote_code=True), tmp_path / "images", count=2)
    assert len(list((tmp_path / "images").iterdir())) == 2
