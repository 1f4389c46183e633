"""What a run does with a student once it is written: the comparison with its sampler, and adapters by themselves."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from families import BUILD, build
from peft import PeftModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

from stepdistill import export, outcome, prompts
from stepdistill.__main__ import main
from stepdistill.config import Config
from stepdistill.distill import distill, export_run
from stepdistill.errors import UserError
from stepdistill.teacher import load_teacher


def config(teacher: str, out, **sections: Any) -> Config:
    training = {"batch_size": 2, "trackers": [], "preview_samples": 2, **sections.pop("training", {})}
    values = {"teacher": teacher, "output_dir": str(out), "steps": 1, "method": {"name": "sid"}, "training": training}
    return Config.model_validate({**values, **sections})


def test_a_student_whose_check_breaks_off_is_complete_and_can_be_had_without_one(
    teachers, tmp_path, monkeypatch, capsys
):
    def breaks(*_: object, **__: object) -> float:
        raise MemoryError("no room for a float32 pipeline")

    monkeypatch.setattr(export, "export_error", breaks)
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"student.tmp is complete, but .* broke off: no room .*export.check=false"):
        distill(config(str(teachers()), run))
    assert DiffusionPipeline.from_pretrained(run / "student.tmp").unet.config.sample_size == 8
    assert export_run(run, ["export.check=false"]) == run / "student"
    assert "student, not compared with its sampler" in capsys.readouterr().out
    assert DiffusionPipeline.from_pretrained(run / "student").unet.config.sample_size == 8
    assert not (run / "student.tmp").exists()


def test_a_student_that_is_not_its_sampler_is_one_line_of_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "student.tmp").mkdir()
    command = "stepdistill.distill.distill"
    monkeypatch.setattr(command, lambda _: export.accept(tmp_path / "student.tmp", tmp_path / "student", lambda: 0.1))
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", "digits_sid"])
    assert stopped.value.code == 1
    said = f"error: the exported pipeline differs from the student's sampler by 0.1; kept {tmp_path / 'student.tmp'}\n"
    assert capsys.readouterr().err == said


def test_pictures_that_are_no_numbers_are_not_the_samplers(tmp_path, monkeypatch):
    """A maximum that passes over them would let such a student through."""
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    drawn: Any = StableDiffusionPipeline.__call__

    def blank(self: Any, *parts: Any, **told: Any) -> Any:
        made = drawn(self, *parts, **told)
        made.images = made.images * float("nan")
        return made

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", blank)
    method = {"name": "sid", "init_ratio": 5.0, "input": "unit"}
    place = str(build("sd", tmp_path / "sd"))
    with pytest.raises(RuntimeError, match=r"differs from the student's sampler by nan"):
        distill(config(place, tmp_path / "run", method=method, data={"prompts": ["a", "b"]}))


@pytest.mark.parametrize(("steps", "renoising"), [(1, "fresh"), (2, "fresh"), (4, "ddim")])
def test_a_table_that_ends_in_pure_noise_is_kept_whole(steps, renoising, tmp_path, monkeypatch):
    """The export compares the stock pipeline with the sampler, from the last entry (zero terminal SNR) on."""
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    place = build("sd-v", tmp_path / "sd")
    settings = place / "scheduler/scheduler_config.json"
    told = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **told}))
    index = place / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "DDIMScheduler"]}))
    method = {"name": "sid", "steps": steps, "init_ratio": float("inf"), "input": "unit", "renoising": renoising}
    student = distill(config(str(place), tmp_path / "run", method=method, data={"prompts": ["a", "b"]}))
    pipeline: Any = DiffusionPipeline.from_pretrained(student)
    levels = pipeline.scheduler.alphas_cumprod
    assert levels[-1] == 0
    assert steps == 1 or ((levels[:-1] > 0) & (levels[:-1] < 1)).all()


def test_adapters_of_convolutions_in_another_memory_order_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    training = {"channels_last": True, "lora": {"student": {"rank": 2, "targets": ["conv1", "to_q"]}}}
    method = {"name": "sid", "init_ratio": 5.0, "input": "unit"}
    place = str(build("sd", tmp_path / "sd"))
    distill(config(place, tmp_path / "run", method=method, data={"prompts": ["a", "b"]}, training=training))
    assert (tmp_path / "run/student_lora/pytorch_lora_weights.safetensors").is_file()


def test_adapters_that_no_pipeline_runs_are_kept_as_peft_has_them(teachers, tmp_path, capsys):
    training = {"lora": {"student": {"rank": 2}}, "optimizer": {"lr": 1e-2}, "ema_halflife_images": None}
    student = distill(config(str(teachers()), tmp_path / "run", training=training))
    said = capsys.readouterr().out
    assert "adapters merged into the student: the student runs in a ConsistencyModelPipeline of its own" in said
    assert f"by themselves, for the teacher's network, in {student / 'peft'}" in said
    assert not (tmp_path / "run/student_lora").exists()
    teacher: Any = UNet2DModel.from_pretrained(teachers(), subfolder="unet")
    adapted = PeftModel.from_pretrained(copy.deepcopy(teacher), str(student / "peft")).merge_and_unload()
    whole: Any = UNet2DModel.from_pretrained(student, subfolder="unet")
    for name, weight in adapted.named_parameters():
        if name.endswith("to_q.weight"):
            torch.testing.assert_close(weight, whole.get_parameter(name))
            assert (weight - teacher.get_parameter(name)).abs().max() > 1e-4


def test_text_encoders_and_vae_of_half_precision_do_not_fail_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    method = {"name": "sid", "init_ratio": 5.0, "input": "unit"}
    training = {"parts_dtype": "bfloat16", "lora": {"student": {"rank": 2}}}
    place = str(build("sdxl", tmp_path / "sdxl"))
    told, write = [], outcome.export

    def export_and_look(*parts: Any, **given: Any) -> None:
        told.append(given["cond"]["encoder_hidden_states"])
        write(*parts, **given)

    monkeypatch.setattr(outcome, "export", export_and_look)
    student = distill(config(place, tmp_path / "run", method=method, data={"prompts": ["a", "b"]}, training=training))
    assert (tmp_path / "run/student_lora").is_dir()
    exact, _ = prompts.encode(load_teacher(place), ["a", "b"], None)
    assert torch.equal(told[0], exact["encoder_hidden_states"])
    assert json.loads((student / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]


def test_an_empty_caption_of_sdxl_is_a_row_of_its_own(tmp_path, monkeypatch):
    """Not the zeros that SDXL takes where no negative prompt is given, and nothing that its neighbours feel."""
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    place = str(build("sdxl", tmp_path / "sdxl"))
    teacher = load_teacher(place)
    among, null = prompts.encode(teacher, ["a cat", "", "a dog"], None)
    alone, _ = prompts.encode(teacher, ["a cat", "a dog"], None)
    pipeline: Any = DiffusionPipeline.from_pretrained(place)
    told, _, pooled, _ = pipeline.encode_prompt("", None, "cpu", 1, False)
    for key, stock in (("encoder_hidden_states", told), ("text_embeds", pooled)):
        torch.testing.assert_close(among[key][[0, 2]], alone[key], atol=1e-6, rtol=0)
        torch.testing.assert_close(among[key][1], stock[0], atol=1e-6, rtol=0)
        assert not null[key].any()
        assert among[key][1].any()


def test_a_safety_checker_survives_in_the_student(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4).to_dict()
    text = CLIPTextConfig(**small, vocab_size=10).to_dict()
    both: Any = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    pipeline = BUILD["sd"]()
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(both),
        feature_extractor=CLIPImageProcessor(size=8, crop_size=8),
    )
    pipeline.save_pretrained(tmp_path / "teacher")
    method = {"name": "sid", "init_ratio": 5.0, "input": "unit"}
    recipe = config(str(tmp_path / "teacher"), tmp_path / "run", method=method, data={"prompts": ["a", "b"]})
    weights = tmp_path / "teacher/safety_checker/model.safetensors"
    weights.rename(tmp_path / "kept")
    with pytest.raises(UserError, match="has no weights in safety_checker/"):
        distill(recipe)
    (tmp_path / "kept").rename(weights)
    student = distill(recipe)
    for part in ("safety_checker", "feature_extractor"):
        for path in (tmp_path / "teacher" / part).iterdir():
            assert (student / part / path.name).read_bytes() == path.read_bytes()
    loaded: Any = DiffusionPipeline.from_pretrained(student)
    assert isinstance(loaded.safety_checker, StableDiffusionSafetyChecker)
