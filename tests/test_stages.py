"""Runs that chain methods, and runs whose roles are adapters or go back to kept networks."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from oracles import gaussian
from test_distill import metrics, run, same, student_weights

from stepdistill.config import Config
from stepdistill.distill import Run
from stepdistill.preflight import check_stages
from stepdistill.process import VP, Flow
from stepdistill.recipe import parse
from stepdistill.teacher import load_teacher

LINEAR = VP(DDPMScheduler().alphas_cumprod.double())
SID = {"name": "sid", "init_ratio": 1.0, "input": "unit"}
DMD = {"name": "dmd", "init_ratio": 1.0, "input": "unit", "fake_updates": 1}


def ratio_at(t: float) -> float:
    time = torch.tensor([t], dtype=torch.float64)
    return (LINEAR.sigma(time) / LINEAR.alpha(time)).item()


def recipe(path, teacher, *, name="recipe.yaml", **settings):
    """A config file whose weights move visibly and whose every step is a checkpoint."""
    training = {"optimizer": {"lr": 1e-3}, "checkpoint_every": 1, "checkpoints_kept": 9, "ema_halflife_images": 8}
    values = {"teacher": str(teacher), "output_dir": str(path / "run"), "training": training, **settings}
    (path / name).write_text(yaml.safe_dump(values))
    return str(path / name)


def chained(path, teacher, second_steps=3, first=SID, second=DMD, **options):
    stages = [{"method": first, "steps": 2, **options}, {"method": second, "steps": second_steps}]
    return recipe(path, teacher, stages=stages)


def test_stages_are_one_run_with_one_history_and_one_student(teachers, tmp_path):
    config = chained(tmp_path, teachers())
    assert run(config=config) == 0
    folder = tmp_path / "run"
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5]
    card = (folder / "student/README.md").read_text()
    assert "SiD, then DMD" in card
    assert "stepdistill-dmd" in card
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert [stage["method"]["name"] for stage in written["stages"]] == ["sid", "dmd"]
    assert run(f"output_dir={tmp_path / 'again'}", config=str(folder / "config.yaml")) == 0
    assert same(student_weights(folder), student_weights(tmp_path / "again"))


@pytest.mark.parametrize("lost", ["stage_2/step_00000003", "stage_2/step_0000000[23]", "stage_2"])
def test_a_chain_resumes_exactly_in_any_stage(lost, teachers, tmp_path):
    config, folder = chained(tmp_path, teachers()), tmp_path / "run"
    assert run(config=config) == 0
    whole = student_weights(folder)
    for path in (folder / "checkpoints").glob(lost):
        shutil.rmtree(path)
    shutil.rmtree(folder / "student")
    assert run("resume=true", config=config) == 0
    assert same(student_weights(folder), whole)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SID, DMD),
        ({"name": "boot", "t_max": 0.5}, {**SID, "init_ratio": ratio_at(round(0.5 * 999) / 999)}),
    ],
    ids=["sid-dmd", "boot-sid"],
)
def test_a_stage_starts_as_the_one_before_ended(first, second, teachers, tmp_path):
    """At a learning rate of almost nothing the second stage changes almost nothing: adapters fold, embeddings fold."""
    still = {"optimizer": {"lr": 1e-12}, "checkpoint_every": 0}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stages = [{"method": first, "steps": 2}, {"method": second, "steps": 1, "training": still}]
    assert run(config=recipe(tmp_path / "a", teachers(), stages=stages)) == 0
    assert run(config=recipe(tmp_path / "b", teachers(), method=first, steps=2)) == 0
    chain, alone = student_weights(tmp_path / "a/run"), student_weights(tmp_path / "b/run")
    for name, weight in alone.items():
        torch.testing.assert_close(chain[name], weight, atol=1e-6, rtol=0)


def test_stages_that_do_not_fit_are_refused(teachers, tmp_path, capsys):
    config = chained(tmp_path, teachers(), second={**DMD, "init_ratio": 2.0})
    assert run(config=config) == 2
    error = capsys.readouterr().err
    assert "stages 1 and 2 do not fit" in error
    assert "init_ratio" in error
    assert not (tmp_path / "run").exists()


FEW = {**SID, "steps": 4}
BOOT = {"name": "boot", "t_max": 0.5}
START = ratio_at(round(0.5 * 999) / 999)
FREEFLOW = {"name": "freeflow", "init_ratio": 1.0}
TBCM = {"name": "tbcm", "start_ratio": START, "input": "unit", "route_points": 2, "jvp": "finite"}
TSCD = {"name": "tscd", "init_ratio": 1.0, "segments": [1], "stage_steps": [], "teacher_steps": 4}


def checked(*methods):
    stages = [{"method": method, "steps": 9} for method in methods]
    config = Config.model_validate({"teacher": "nobody", "output_dir": "nowhere", "stages": stages})
    check_stages(config.plan, gaussian(torch.zeros(1), torch.eye(1)).denoiser(Flow(), "flow"))


@pytest.mark.parametrize(
    ("first", "second", "lost"),
    [
        (FREEFLOW, TSCD, "at all levels"),
        ({**SID, "init_ratio": START}, TBCM, "at all levels"),
        (FREEFLOW, FEW, "at all levels"),
        ({**TSCD, "segments": [4]}, FREEFLOW, "leads to its own next level"),
        ({**SID, "clip_sample": True}, DMD, "sees what lies beyond"),
        ({**FEW, "renoising": "ddim"}, FEW, "is fed ddim noise by method.renoising, sid fresh"),
    ],
    ids=["freeflow-tscd", "sid-tbcm", "freeflow-few", "tscd4-freeflow", "clipped", "renoising"],
)
def test_a_hand_over_that_changes_the_student_is_called_a_warm_start(first, second, lost):
    with pytest.warns(UserWarning, match=f"stage 1 is only a warm start for stage 2: .*{lost}"):
        checked(first, second)


def test_a_warm_start_is_one_line_of_the_command(teachers, tmp_path):
    """Python's own form names a place in the code."""
    stages = [{"method": FREEFLOW, "steps": 2}, {"method": TSCD, "steps": 2}]
    config = recipe(tmp_path, teachers(), stages=stages)
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill", "distill", "--config", str(config), "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "warm start" in line]
    assert said == [
        "warning: stage 1 is only a warm start for stage 2: freeflow has not trained the student at all "
        "levels where tscd asks it"
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SID, DMD),
        (FREEFLOW, SID),
        (TSCD, DMD),
        (TBCM, {**FEW, "init_ratio": START}),
        (FEW, SID),
        (FEW, {**DMD, "steps": 4}),
        (SID, {**DMD, "clip_sample": True}),
    ],
    ids=["sid-dmd", "freeflow-sid", "tscd-dmd", "tbcm-few", "few-one", "few-few", "to be clipped"],
)
def test_a_hand_over_of_the_same_student_is_silent(first, second):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(first, second)


@pytest.mark.parametrize(
    "methods",
    [
        [FREEFLOW, SID],
        [TSCD, DMD],
        [{**TSCD, "segments": [2, 1], "stage_steps": [1], "score": {"name": "dmd", "fake_updates": 1}}],
    ],
    ids=["freeflow-sid", "tscd-dmd", "tscd with its last stage scored"],
)
def test_chains_of_different_families_train_and_export(methods, teachers, tmp_path):
    stages = [{"method": method, "steps": 2} for method in methods]
    assert run(config=recipe(tmp_path, teachers(), stages=stages)) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 2 * len(methods) + 1))
    assert (tmp_path / "run/student/model_index.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": SID, "steps": 2, "stages": [{"method": SID, "steps": 2}]}, "either method and steps, or stages"),
        ({"method": SID}, "steps is missing"),
        ({"steps": 3}, "method is missing"),
        ({}, "stages"),
    ],
)
def test_a_run_is_described_in_one_way(settings, message, teachers, tmp_path, capsys):
    assert run(config=recipe(tmp_path, teachers(), **settings)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mixed_precision", "bf16"),
        ("guidance_in_two_passes", True),
        ("trackers", ["wandb"]),
        ("preview_samples", 5),
        ("teacher_dtype", "bfloat16"),
    ],
)
def test_a_stage_has_no_say_in_what_all_share_and_need_not_repeat_it(key, value, teachers, tmp_path, capsys):
    second = {"method": DMD, "steps": 2, "training": {"batch_size": 3, key: value}}
    config = recipe(tmp_path, teachers(), stages=[{"method": SID, "steps": 2}, second])
    assert run(config=config) == 2
    assert f"stage 2: training.{key} is " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    del second["training"][key]
    written = {"teacher": "x", "output_dir": "y", "training": {key: value}, "stages": [second]}
    for values in (written, Config.model_validate(written).dump()):
        [stage] = Config.model_validate(values).plan
        told = stage.model_dump(mode="json")["training"]
        assert (told["batch_size"], told[key]) == (3, value)


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ({"name": "disback", "method": DMD, "record_steps": 4, "points": 2, "switch_every": 3}, 8),
        ({"name": "tscd", "segments": [2, 1], "stage_steps": [6], "teacher_steps": 4, "init_ratio": 2.0}, 7),
    ],
    ids=["disback", "tscd"],
)
def test_a_run_too_short_for_all_phases_is_refused(method, least, teachers, tmp_path, capsys):
    assert run(config=recipe(tmp_path, teachers(), method=method, steps=least - 1)) == 2
    assert f"at least {least} steps" in capsys.readouterr().err
    assert run(config=recipe(tmp_path, teachers(), method=method, steps=least)) == 0


def lora(**roles):
    return {role: {"rank": rank, "alpha": rank, "targets": ["to_q", "to_v", "conv1"]} for role, rank in roles.items()}


def test_a_student_of_adapters_trains_resumes_and_exports_merged(teachers, tmp_path):
    training = {
        "lora": lora(student=4, fake=2),
        "optimizer": {"lr": 1e-2},
        "checkpoint_every": 1,
        "ema_halflife_images": 8,
    }
    config = recipe(tmp_path, teachers(), method=DMD, steps=3, training=training)
    assert run(config=config) == 0
    folder = tmp_path / "run"
    learned, before = student_weights(folder), student_weights_of(teachers())
    assert learned.keys() == before.keys()
    moved = {name for name in learned if (learned[name] - before[name]).abs().max() > 1e-5 and "conv_out" not in name}
    assert moved
    assert all(any(end in name for end in ("to_q", "to_v", "conv1")) for name in moved)
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
    shutil.rmtree(folder / "student")
    assert run("resume=true", config=config) == 0
    assert same(student_weights(folder), learned)


def student_weights_of(teacher):
    from safetensors.torch import load_file

    return load_file(teacher / "unet/diffusion_pytorch_model.safetensors")


def test_adapters_that_match_nothing_are_refused_with_the_layers_there_are(teachers, tmp_path, capsys):
    training = {"lora": {"fake": {"targets": ["to_z"]}}}
    assert run(config=recipe(tmp_path, teachers(), method=DMD, steps=1, training=training)) == 2
    error = capsys.readouterr().err
    assert "to_z matches no layer" in error
    assert "to_q" in error
    assert not (tmp_path / "run").exists()


def test_backtracking_resumes_exactly_while_a_kept_network_teaches(teachers, tmp_path):
    method = {"name": "disback", "method": DMD, "record_steps": 2, "points": 2, "switch_every": 3}
    config, folder = recipe(tmp_path, teachers(), method=method, steps=6), tmp_path / "run"
    assert run(config=config) == 0
    whole = student_weights(folder)
    assert [path.name for path in (folder / "snapshots").iterdir()] == ["target_1.safetensors"]
    for step in (5, 6, 4):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(folder / "student")
    assert run("resume=true", config=config) == 0
    assert same(student_weights(folder), whole)


def test_a_later_stage_of_adapters_is_resumed_without_touching_the_teacher(teachers, tmp_path):
    """The checkpoint holds the weights that the adapters rest on, which are an earlier student's."""
    lora = {"student": {"rank": 2, "targets": ["to_q", "to_k"]}}
    second = {"method": DMD, "steps": 2, "training": {"batch_size": 4, "lora": lora, "checkpoint_every": 1}}
    file = recipe(tmp_path, teachers(), stages=[{"method": SID, "steps": 2}, second])
    assert run(config=file) == 0
    resumed = Run(parse(Config, str(tmp_path / "run/config.yaml"), ["resume=true"]))
    resumed.resume()
    assert resumed.index == 1
    for mine, given in zip(
        resumed.teacher.network.parameters(), load_teacher(str(teachers())).network.parameters(), strict=True
    ):
        assert torch.equal(mine, given)
