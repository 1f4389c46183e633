"""Every family of pipelines: its teacher is the stock pipeline, its students are stock pipelines."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.models.embeddings import Timesteps
from families import BUILD
from peft import PeftModel

from stepdistill.backbones import FAMILIES
from stepdistill.backbones.stable_diffusion import _scale_embedding
from stepdistill.conditions import Cond
from stepdistill.config import Config, Data
from stepdistill.data import data_free
from stepdistill.decoder import Decoder
from stepdistill.distill import distill
from stepdistill.errors import UserError
from stepdistill.export import DESCRIPTION, Host, empty_parts, export
from stepdistill.hosting import plan
from stepdistill.methods import SiD
from stepdistill.samplers import ode_steps
from stepdistill.sources import pipeline_class
from stepdistill.teacher import Teacher, load_teacher

PROMPTS = ("a cat", "two dogs")
INF = float("inf")
CLASSES = ("dit", "sit", "repa")
"""Those asked for a class and not for a prompt."""
SIZES = {"flux": 16, "flux-schnell": 16, "pixart-alpha": 16}
"""Pixels of the pictures of those whose own are large."""


@pytest.fixture
def family(request, folders, cache) -> tuple[str, Path, Teacher]:
    folder = folders(request.param)
    return request.param, folder, load_teacher(str(folder), resolution=SIZES.get(request.param))


every_family = pytest.mark.parametrize("family", BUILD, indirect=True)


def asked(teacher: Teacher, **options: Any) -> Data:
    told = {"class_labels": (3, 7)} if teacher.family.encode is None else {"prompts": PROMPTS}
    return Data(**told, **options)


def call(name: str, teacher: Teacher, k: int) -> dict[str, Any]:
    """A stock call for condition ``k``."""
    made = dict(teacher.family.arguments)
    made |= {"class_labels": [(3, 7)[k]]} if name in CLASSES else {"prompt": PROMPTS[k]}
    if name in SIZES or name == "sana":
        made |= {"height": teacher.picture_size, "width": teacher.picture_size}
    return made | ({"guidance_scale": 1.0} if teacher.embeds_guidance else {})


def test_every_family_is_tested(folders):
    built = {json.loads((folders(name) / "model_index.json").read_text())["_class_name"] for name in BUILD}
    for family in FAMILIES[1:]:
        assert built & set(family.pipelines)


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart", "sana", "dit"])
def test_networks_in_half_precision_tell_neighbouring_times_apart(name, folders, cache):
    """Flux alone rounds its time itself, in its stock pipeline too."""
    teacher, seen = load_teacher(str(folders(name)), dtype="bfloat16"), []
    for part in teacher.network.modules():
        if isinstance(part, Timesteps):
            part.register_forward_pre_hook(lambda part, told: seen.append(told[0]))
    cond = data_free(teacher, asked(teacher), torch.device("cpu")).cond(range(2))
    times = torch.tensor([0.997, 0.999], dtype=torch.float64)
    teacher.denoiser(torch.zeros(2, *teacher.sample_shape), times, cond)
    torch.testing.assert_close(seen[0].double(), teacher.denoiser.process.label(times), rtol=1e-6, atol=0)


GUIDED = {
    "sd": 3.0,
    "sd-v": 3.0,
    "sdxl": 3.0,
    "sd3": 3.0,
    "sd3-without-t5": 2.0,
    "pixart": 3.0,
    "pixart-alpha": 3.0,
    "sana": 3.0,
    "dit": 3.0,
    "repa": 3.0,
}


@every_family
@pytest.mark.parametrize("scale", [1.0, None])
def test_the_teacher_in_our_sampler_is_the_stock_pipeline(family, scale):
    """Same noise, the pipeline's own scheduler, guidance off and on; Flux is told its scale."""
    same_as_stock(family, scale or GUIDED.get(family[0], 2.5))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "sana", "flux-schnell"], indirect=True)
def test_a_negative_prompt_is_the_stock_pipelines(family):
    same_as_stock(family, GUIDED.get(family[0], 2.5), "a dog")


def test_latents_of_their_own_mean_and_spread_are_those_of_sdxls_pipeline(folders, cache, tmp_path):
    """Playground v2.5's; our encoder is the inverse."""
    shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    settings = tmp_path / "sdxl/vae/config.json"
    own = {"latents_mean": [-1.6, 1.1, 3.3, -3.2], "latents_std": [8.4, 5.9, 9.4, 10.1]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    teacher = load_teacher(str(tmp_path / "sdxl"))
    same_as_stock(("sdxl", tmp_path / "sdxl", teacher), 1.0)
    decoder = Decoder(teacher)
    pictures = torch.rand(1, 3, teacher.picture_size, teacher.picture_size) * 2 - 1
    samples, vae = decoder.encode(pictures, torch.device("cpu")), decoder._loaded()
    spread, mean = (torch.tensor(own[key]).view(1, -1, 1, 1) for key in ("latents_std", "latents_mean"))
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
    torch.testing.assert_close(samples / vae.config["scaling_factor"] * spread + mean, latents, atol=1e-4, rtol=1e-4)


def same_as_stock(family: tuple[str, Path, Teacher], scale: float, negative: str | None = None) -> None:
    name, folder, teacher = family
    wanted = asked(teacher, guidance_scale=scale, negative_prompt=negative)
    data = data_free(teacher, wanted, torch.device("cpu"))
    denoiser = teacher.guided(wanted, data.null)
    kind = pipeline_class(teacher.index)
    pipeline: Any = kind.from_pretrained(folder, **empty_parts(teacher.index))
    pipeline.set_progress_bar_config(disable=True)
    if name in ("sit", "repa"):
        pipeline.scheduler = InDiT.from_config(pipeline.scheduler.config)
    elif name == "lcm":  # its own draws new noise at every step
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    elif name == "sana":  # its own rounds what it tells the network, but not its steps
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    said = call(name, teacher, 1) | {"guidance_scale": scale}
    if name == "flux-schnell" and scale > 1:
        said = call(name, teacher, 1) | {"true_cfg_scale": scale, "negative_prompt": ""}
    if negative is not None:
        said["negative_prompt"] = negative
    torch.manual_seed(5)
    made = pipeline(num_inference_steps=4, output_type="np", **said).images
    torch.manual_seed(5)
    noise = torch.randn(1, *teacher.sample_shape)
    scheduler: Any = cast(Any, pipeline.scheduler)
    times = denoiser.process.time_of_label(scheduler.timesteps.double()).clamp(0, 1).tolist()
    # Stable Diffusion's DDIM ends at the first entry of its table, not at the clean sample.
    end = 0.0 if scheduler.config.get("set_alpha_to_one") is False else None
    solver = "dpmpp_2m" if "DPM" in type(scheduler).__name__ else "euler"

    def ours(cond: Cond) -> torch.Tensor:
        with torch.no_grad():
            *_, last = ode_steps(denoiser, noise, times, cond, solver=solver, end=end)
        return last.x

    last = ours(data.cond([1]))
    pictures = (Decoder(teacher)(last) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(made).permute(0, 3, 1, 2), pictures, atol=1e-4, rtol=0)
    assert (ours(data.cond([0])) - last).abs().max() > 1e-5, "the condition must matter"


class InDiT(FlowMatchEulerDiscreteScheduler):
    """The scheduler of a SiT with what the stock DiT pipeline calls of it: times down to ``1 / steps``, no scaling."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, *rest: Any, **options: Any) -> None:
        grid: Any = [1 - k / num_inference_steps for k in range(num_inference_steps)]
        super().set_timesteps(sigmas=grid, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return sample


def later(teacher: Teacher) -> Callable[[], torch.Tensor]:
    """Noise of later steps, drawn as the stock pipeline does."""
    return lambda: teacher.family.later_noise(torch.randn(1, *teacher.sample_shape))


def moved(teacher: Teacher) -> Any:
    """A student: the teacher with other weights."""
    network = copy.deepcopy(teacher.network)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return replace(teacher.denoiser, network=network)


@every_family
@pytest.mark.parametrize(("steps", "renoising"), [(1, "fresh"), (2, "fresh"), (3, "ddim")])
def test_exported_student_is_its_sampler(family, steps, renoising, tmp_path):
    name, folder, teacher = family
    flow = teacher.denoiser.target == "flow"
    method = SiD(steps=steps, renoising=renoising, init_ratio=INF if flow else 2.5, input="unit")
    sampler = method.sampler(teacher.denoiser.process)
    if name in ("sit", "repa") and (renoising == "fresh" or name == "sit") and steps > 1:
        with pytest.raises(UserError, match="renoising=ddim"):
            plan(teacher.denoiser, sampler, classes=teacher.classes, family=teacher.family)
        return
    guidance = 1.0 if teacher.embeds_guidance and steps == 1 else None
    hosted = plan(teacher.denoiser, sampler, classes=teacher.classes, family=teacher.family, guidance=guidance)
    data = data_free(teacher, asked(teacher), torch.device("cpu"))
    said = [call(name, teacher, k) | ({"guidance_scale": 9.0} if guidance else {}) for k in (0, 1)]
    told = {key: [one[key] for one in said] for key in ("prompt",) if key in said[0]}
    told |= {"class_labels": [3, 7]} if name in CLASSES else {}
    host = Host(teacher, {**said[0], **told})
    export(
        moved(teacher),
        sampler,
        hosted,
        tmp_path / "student",
        shape=teacher.sample_shape,
        cond=data.cond(range(2)),
        host=host,
    )
    assert (tmp_path / "student" / DESCRIPTION).is_file()
    settings = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert settings.get("steps_offset", 1) == 1  # Stable Diffusion's pipeline changes all else as it loads
    for path in folder.rglob("*"):
        part = path.relative_to(folder)
        if path.is_file() and part.parts[0] not in ("scheduler", teacher.family.component, "model_index.json"):
            assert (tmp_path / "student" / part).read_bytes() == path.read_bytes()


METHODS: dict[str, dict[str, Any]] = {
    "sid": {"init_ratio": 5.0, "input": "unit"},
    "tscd": {"init_ratio": 5.0, "segments": [2, 1], "stage_steps": [1], "teacher_steps": 4},
}


def recipe(name: str, folder: Path, method: str, out: Path, **training: Any) -> Config:
    """Two updates of every trained role; ``test_matrix`` has every method and more of them."""
    values = {
        "teacher": str(folder),
        "output_dir": str(out),
        "steps": 2,
        "method": {"name": method, **METHODS[method]},
        "data": {"class_labels": [3, 7]} if name in CLASSES else {"prompts": list(PROMPTS)},
        "training": {"batch_size": 2, "trackers": [], "checkpoint_every": 1, "log_every": 1, **training},
    }
    return Config.model_validate(values)


def test_adapters_on_a_teacher_in_half_precision_run_on_the_whole_one(folders, cache, tmp_path, capsys):
    lora = {role: {"rank": 2, "alpha": 4} for role in ("student", "fake")}
    training = {"lora": lora, "optimizer": {"lr": 1e-2}, "teacher_dtype": "bfloat16"}
    student = distill(recipe("sdxl", folders("sdxl"), "sid", tmp_path / "run", **training))
    (weights,) = (tmp_path / "run/student_lora").glob("*.safetensors")
    assert weights.name.startswith("pytorch_lora")
    assert weights.stat().st_size < (student / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    lines = capsys.readouterr().out.split("own pipeline:\n\n")[1]
    space: dict[str, Any] = {}
    exec(lines.replace('image.save("sample.png")', ""), space)
    assert space["image"].size


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_the_students_of_tscds_stages_are_published_as_adapters(name, folders, cache, tmp_path, monkeypatch):
    lora = {"student": {"rank": 2, "alpha": 4}}
    distill(recipe(name, folders(name), "tscd", tmp_path / "run", lora=lora, optimizer={"lr": 1e-2}))
    kept = list((tmp_path / "run/snapshots").iterdir())
    assert [path.name for path in kept] == ["segments_2"]
    scheduler: Any = DDIMScheduler.from_pretrained(kept[0] / "scheduler")
    scheduler.set_timesteps(2)
    told = json.loads((kept[0] / DESCRIPTION).read_text())["sampler"]["times"]
    assert scheduler.timesteps.tolist() == [round(time * 999) for time in told]
    pipeline: Any = DiffusionPipeline.from_pretrained(folders(name))
    if name == "sdxl":
        pipeline.load_lora_weights(kept[0])
        assert pipeline.get_list_adapters() == {"unet": ["default_0"]}
    else:
        PeftModel.from_pretrained(pipeline.transformer, str(kept[0]))


def test_lcms_network_is_told_its_scale_as_the_stock_pipeline_tells_it():
    scales: Any = torch.tensor([1.0, 4.5, 8.0])
    stock: Any = StableDiffusionPipeline
    torch.testing.assert_close(_scale_embedding(scales), stock.get_guidance_scale_embedding(None, scales - 1, 256))
