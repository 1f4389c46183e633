"""The pipeline of Stable Diffusion that travels: it is the sampler where stepdistill cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from families import sd, text_unet
from peft.tuners.tuners_utils import BaseTunerLayer
from test_hybrid_families import IDS, PROMPTS, Made, cache, expected, made

FILE = Path(__file__).parents[1] / "pipelines/hybrid_sd_v1.py"
CASES: dict[str, dict[str, Any]] = {
    "sd": {"name": "sd"},
    "sd_ddim": {"name": "sd", "renoising": "ddim"},
    "sd_v": {"name": "sd-v"},
    "lcm": {"name": "lcm"},
    "sdxl": {"name": "sdxl"},
    "sd_adapters": {"name": "sd", "lora": True},
    "sdxl_adapters": {"name": "sdxl", "lora": True},
    "one": {"name": "sd", "steps": 1},
    "one_adapters": {"name": "sdxl", "steps": 1, "lora": True},
}
CHOICES: tuple[dict[str, Any], ...] = (
    {"teacher_first": 0},
    {"teacher_first": 1},
    {"teacher_first": 2, "teacher_steps": 7},
    {"teacher_first": 2, "teacher_renoising": "fresh"},
    {"teacher_first": 1, "teacher_renoising": "fixed"},
    {"teacher_first": 1, "guidance_scale": 3.0},
    {"teacher_first": 1, "guidance_scale": 3.0, "negative_prompt": "a fox"},
)

PLAIN = """
import sys
sys.modules["stepdistill"] = None  # importing it would raise
import json, os, shutil
from pathlib import Path
import torch
from diffusers import DiffusionPipeline, LCMScheduler

root, file, choices, prompts, ids = Path(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])

def generators():
    return [torch.Generator().manual_seed(k) for k in ids]

for folder in sorted(root.iterdir()):
    teacher = DiffusionPipeline.from_pretrained(folder / "teacher")
    student, told = folder / "student", {"teacher_scheduler": teacher.scheduler}
    adapters = not (student / "unet").is_dir()
    calls = len(json.loads((student / "stepdistill.json").read_text())["sampler"]["times"])
    if adapters:
        teacher.load_lora_weights(student, adapter_name="student")
        told["scheduler"] = LCMScheduler.from_pretrained(student, subfolder="scheduler")
        told["unet"] = teacher.unet
    else:
        told["teacher_unet"] = teacher.unet
    told |= {"custom_pipeline": file, "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(folder / "teacher" if adapters else student, **told)
    found = {}
    for k, choice in enumerate(choices):
        pictures = pipe.trace_x0(prompts, calls, generator=generators(), **choice)
        found[str(k)] = torch.stack(pictures, 1)
    found["images"] = pipe(prompts, calls, generator=generators(), output_type="pt").images
    found["alone"] = pipe(prompts[0], calls, generator=generators()[0], output_type="pt").images
    stock = teacher if adapters else DiffusionPipeline.from_pretrained(student)
    stock.scheduler = pipe.scheduler
    stock.set_progress_bar_config(disable=True)
    found["stock"] = stock(
        prompts, num_inference_steps=calls, generator=generators(), output_type="pt", guidance_scale=1.0
    ).images
    if not adapters:
        pipe.save_pretrained(folder / "hybrid")
        shutil.rmtree(Path(os.environ["HF_MODULES_CACHE"]) / "diffusers_modules")
        pipe = DiffusionPipeline.from_pretrained(folder / "hybrid", trust_remote_code=True)
        found["again"] = pipe(prompts, calls, generator=generators(), output_type="pt").images
    torch.save(found, folder / "found.pt")
"""


@pytest.fixture(scope="module")
def travelled(tmp_path_factory, cache) -> dict[str, tuple[Made, dict[str, torch.Tensor]]]:
    """Every case: teacher and student, and what the pipeline gave where stepdistill cannot be imported."""
    root = tmp_path_factory.mktemp("hybrids")
    cases = {key: made(folder=root / key, **options) for key, options in CASES.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    words = [str(root), str(FILE), *(json.dumps(each) for each in (CHOICES, PROMPTS, IDS))]
    done = subprocess.run([sys.executable, "-c", PLAIN, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for complaint in ("cannot get type annotation", "are not expected", "Expected types"):
        assert complaint not in done.stderr + done.stdout
    return {key: (one, torch.load(root / key / "found.pt", weights_only=True)) for key, one in cases.items()}


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_the_pipeline_that_travels_is_the_sampler(key, choice, travelled):
    (one, found), told = travelled[key], dict(CHOICES[choice])
    if key == "lcm" and "negative_prompt" in told:
        return
    first, scale = told.pop("teacher_first"), told.pop("guidance_scale", 1.0)
    wanted = expected(one, first, scale=scale, negative=told.pop("negative_prompt", None), **told)
    same(found[str(choice)], wanted)
    if choice:
        assert (found[str(choice)][:, -1] - found["0"][:, -1]).abs().max() > 1e-3, "the teacher must matter"


@pytest.mark.parametrize("key", CASES)
def test_without_the_teacher_it_is_the_stock_pipeline_and_images_are_the_last_of_a_trace(key, travelled):
    one, found = travelled[key]
    same(found["stock"], (found["0"][:, -1] / 2 + 0.5).clamp(0, 1))
    same(found["images"], (found["1"][:, -1] / 2 + 0.5).clamp(0, 1))
    same(found["alone"], found["images"][:1])
    if "again" in found:
        same(found["again"], found["images"])
        assert (one.folder / "hybrid" / FILE.name).read_bytes() == FILE.read_bytes()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, cache) -> Any:
    """A pipeline on adapters, two of them, in this process."""
    folder = tmp_path_factory.mktemp("adapters")
    one = made("sd", folder, lora=True)
    teacher: Any = StableDiffusionPipeline.from_pretrained(folder / "teacher")
    teacher.load_lora_weights(one.source, adapter_name="student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("local")))
        yield DiffusionPipeline.from_pretrained(
            folder / "teacher",
            custom_pipeline=str(FILE),
            trust_remote_code=True,
            unet=teacher.unet,
            scheduler=LCMScheduler.from_pretrained(one.source, subfolder="scheduler"),
            teacher_scheduler=teacher.scheduler,
            student_adapter="student",
        )


def state(unet: Any) -> list[tuple[bool, list[str]]]:
    """Of every adapted layer: whether its adapters are off, and which are active."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    return [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]


@pytest.mark.parametrize("others", [0, 1])
def test_adapters_are_back_after_the_teachers_calls_whatever_happens(others, pipe, monkeypatch):
    """Those of a style stay on for both, as the paper transfers control."""
    before, seen = state(pipe.unet), []
    if others:
        lora = {key: 0.5 * torch.randn_like(value) for key, value in pipe.unet.state_dict().items() if "lora_" in key}
        lora = {key.replace(".student", ""): value for key, value in lora.items()}
        pipe.unet.load_lora_adapter(lora, prefix=None, adapter_name="style")
        pipe.unet.set_adapter(["student", "style"])
        before = state(pipe.unet)
    forward = pipe.unet.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(state(pipe.unet)[0])
        if len(seen) == 5:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", watched)
    pipe(["a cat"], 3)
    drafts = (False, ["style"]) if others else (True, ["student"])
    assert seen == [drafts] * 2 + [before[0]] * 2
    assert state(pipe.unet) == before
    with pytest.raises(KeyboardInterrupt):
        pipe(["a cat"], 3)
    assert state(pipe.unet) == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"teacher_first": 3}, r"0\.\.2 for a student of 3 calls"),
        ({"teacher_first": -1}, r"0\.\.2 for a student of 3 calls"),
        ({"teacher_steps": 0}, r"teacher_steps must lie in 1\.\.1000, got 0"),
        ({"teacher_renoising": "none"}, "teacher_renoising must be one of"),
        ({"height": 15}, "multiples of 2, got 15"),
    ],
)
def test_what_cannot_work_is_refused(choice, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe("a cat", 3, **choice)


def test_pipelines_that_cannot_be_are_refused(pipe, tmp_path):
    parts = {key: value for key, value in pipe.components.items() if value is not None}
    kind: Any = type(pipe)
    with pytest.raises(ValueError, match="must be LCMScheduler or DDIMScheduler, got EulerDiscreteScheduler"):
        kind(**{**parts, "scheduler": EulerDiscreteScheduler()})
    with pytest.raises(ValueError, match="cross_attention_dim of student and teacher differ: 8, 16"):
        kind(**parts, teacher_unet=text_unet(cross_attention_dim=16))
    with pytest.raises(ValueError, match="give teacher_unet, or a unet with the student's adapters"):
        kind(**{**parts, "unet": sd().unet})("a cat", 3)
    with pytest.raises(ValueError, match="got 'nobody', active are"):
        kind(**parts, student_adapter="nobody")("a cat", 3)
    with pytest.raises(ValueError, match="adapters cannot be saved in a pipeline"):
        pipe.save_pretrained(tmp_path / "hybrid")


def test_one_call_at_pure_noise_sees_nothing_of_a_draft(pipe):
    alone = LCMScheduler(num_train_timesteps=1000, original_inference_steps=1, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="would see nothing of the teacher's draft"):
        type(pipe)(**{**pipe.components, "scheduler": alone}, student_adapter="student")("a cat", 1)


def test_pictures_of_another_size_are_made(pipe):
    (image,) = pipe("a cat", 3, height=24, width=20).images
    assert image.size == (20, 24)


__all__ = ["cache"]
