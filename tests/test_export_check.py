"""What a run does with a student once it is written: the comparison with its sampler, and adapters by themselves."""

import json
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families import build

from stepdistill import export, outcome, prompts
from stepdistill.config import Config
from stepdistill.distill import distill, export_run
from stepdistill.teacher import Teacher, load_teacher


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


def test_a_run_says_why_no_adapters_are_written(teachers, tmp_path, capsys):
    distill(config(str(teachers()), tmp_path / "run", training={"lora": {"student": {"rank": 2}}}))
    said = capsys.readouterr().out
    assert "adapters merged into the student alone: the student runs in a ConsistencyModelPipeline of its own" in said
    assert not (tmp_path / "run/student_lora").exists()


def test_text_encoders_and_vae_of_half_precision_do_not_fail_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(Teacher, "picture_steps", 2)
    monkeypatch.setattr(outcome, "_SHOWN", 4)
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
