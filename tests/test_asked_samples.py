"""What samples of an exported student are asked for: its own classes, and numbers of calls that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import BUILD, build

from stepdistill.__main__ import main
from stepdistill.config import Config
from stepdistill.distill import distill, export_run
from stepdistill.errors import UserError
from stepdistill.sample import tracing
from stepdistill.sampling import Sampling
from stepdistill.teacher import load_teacher

pytestmark = pytest.mark.usefixtures("cache")


def student(teacher: Path, run: Path, method: dict[str, Any], **sections: Any) -> Path:
    training = {"batch_size": 2, "trackers": [], "preview_samples": 2}
    values = {"teacher": str(teacher), "output_dir": str(run), "steps": 1, "method": {"name": "sid", **method}}
    return distill(Config.model_validate({**values, "training": training, **sections}))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that cannot be."""
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *map(str, words)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("law", "null", "expected"),
    [("uniform", 3, [0, 1, 2]), ({1: 1, 2: 3}, None, [1, 2, 2, 2]), ([1], None, [1])],
)
def test_samples_and_card_of_a_student_of_classes_have_those_that_it_learned(law, null, expected, teachers, tmp_path):
    data = {"class_labels": law, "null_label": null}
    made = student(teachers("consistency"), tmp_path / "run", {}, data=data)
    found = tracing(Sampling(source=str(made)))
    assert sorted(found.conditions) == expected
    assert f"class_labels=[{next(iter(found.conditions))}]" in (made / "README.md").read_text()
    asked = tracing(Sampling(source=str(made), labels=(0,)))
    assert list(asked.conditions) == [0]


def test_a_dit_of_other_classes_than_imagenets_is_guided_and_sampled(tmp_path, capsys):
    """Its null label follows its classes, as ImageNet's 1000 does."""
    pipeline = BUILD["dit"]()
    config = {**pipeline.transformer.config, "num_embeds_ada_norm": 10}
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config))
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert (teacher.classes, teacher.null_label) == (10, 10)
    asked = {"class_labels": "uniform", "guidance_scale": 3.0}
    method = {"init_ratio": 5.0, "input": "unit"}
    made = student(tmp_path / "teacher", tmp_path / "run", method, data=asked)
    found = tracing(Sampling(source=str(made)))
    assert list(found.conditions) == list(range(10))
    assert found.traces([11]).isfinite().all()
    for label in (10, 2000):
        said = refused(capsys, made, "--labels", 3, label, "--out", tmp_path / "out")
        assert f"must lie in 0..9, got [3, {label}]" in said


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_student_makes_no_sample_in_a_number_of_calls_that_its_scheduler_cannot(family, tmp_path, capsys):
    teacher = build(family, tmp_path / "teacher")
    method = {"steps": 4, "init_ratio": float("inf"), "input": "unit"}
    made = student(teacher, tmp_path / "run", method, data={"prompts": ["a cat"], "resolution": 16})
    said = refused(capsys, made, "--steps", 1, "--out", tmp_path / "out")
    assert "FlowMatchEulerDiscreteScheduler has no such grid" in said
    assert not (tmp_path / "out").exists()


def test_a_whole_flow_map_is_sampled_in_any_number_of_jumps(teachers, tmp_path, capsys):
    method = {"name": "freeflow", "init_ratio": 9.0, "start_share": 0.5}
    made = student(teachers("ddpm"), tmp_path / "run", method, export={"own_code": True})
    one, four = (
        tracing(Sampling(source=str(made), steps=steps, trust_remote_code=True)).traces([3]) for steps in (None, 4)
    )
    assert four.isfinite().all()
    assert (one - four).abs().max() > 1e-4
    said = refused(capsys, made, "--steps", 1000, "--trust-remote-code", "--out", tmp_path / "out")
    assert "--steps: steps must be 1 to 120, got 1000" in said


def test_a_guidance_range_is_shown_and_exported_at_the_scale_asked_for(teachers, tmp_path):
    """Another strength of a finished run is another export, and nothing is trained for it."""
    asked = {"class_labels": [0, 1], "null_label": 3, "guidance_scale": [1.0, 5.0]}
    training = {"batch_size": 4, "trackers": [], "optimizer": {"lr": 5e-2}, "ema_halflife_images": None}
    values = {"teacher": str(teachers("consistency")), "output_dir": str(tmp_path / "run"), "steps": 5}
    config = Config.model_validate({**values, "method": {"name": "sid"}, "data": asked, "training": training})
    drawn = {}
    for scale in (None, 1.0, 5.0):
        made = distill(config) if scale is None else export_run(tmp_path / "run", [f"data.shown_scale={scale}"])
        drawn[scale] = tracing(Sampling(source=str(made), labels=(0,))).traces([7])
    assert (drawn[1.0] - drawn[5.0]).abs().max() > (drawn[None] - drawn[5.0]).abs().max() > 0
    with pytest.raises(UserError, match=r"shown_scale must lie in a range of guidance_scale, got 7 of"):
        export_run(tmp_path / "run", ["data.shown_scale=7"])
