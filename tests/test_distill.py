"""The whole job on a tiny teacher, in one process and in several."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from conftest import tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from stepdistill.__main__ import main
from stepdistill.checkpoints import Checkpoints
from stepdistill.errors import UserError
from stepdistill.methods import AnyMethod
from stepdistill.preflight import check_launch
from stepdistill.samplers import SampleNoise

ROOT = Path(__file__).parents[1]
FAST = [
    "training.batch_size=4",
    "training.log_every=1",
    "training.preview_samples=4",
    "training.trackers=[]",
    "evaluate=null",
]


def run(*overrides, config="digits_sid"):
    """``stepdistill distill`` in this process; the exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", config, *FAST, *overrides])
    return stopped.value.code


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student_weights(folder):
    return load_file(folder / "student/unet/diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_a_student_its_settings_and_a_card(teachers, tmp_path):
    folder = tmp_path / "run"
    options = ["method.low_memory=true", "method.input=sigma", "method.init_ratio=2.5"]
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=2", *options) == 0
    assert (folder / "student/model_index.json").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 2
    card = (folder / "student/README.md").read_text()
    assert "library_name: diffusers" in card
    assert "DiffusionPipeline.from_pretrained" in card
    assert [row["step"] for row in metrics(folder)] == [1, 2]


def test_class_conditional_teacher_needs_labels_and_then_works(teachers, tmp_path, capsys):
    folder = tmp_path / "run"
    teacher = f"teacher={teachers('consistency')}"
    assert run(teacher, f"output_dir={folder}", "steps=1") == 2
    assert "set data.class_labels" in capsys.readouterr().err
    assert not folder.exists()
    guided = ["data.class_labels=uniform", "data.null_label=3", "data.guidance_scale=1.5"]
    assert run(teacher, f"output_dir={folder}", "steps=1", *guided) == 0


def test_demo_in_small_evaluates_draws_and_prints_the_table(teachers, tmp_path, capsys):
    folder = tmp_path / "run"
    evaluate = "evaluate={reference: 'builtin:digits', samples: 40, teacher_steps: [3, 1], curve_samples: 40}"
    options = [o for o in FAST if not o.startswith("evaluate")]
    with pytest.raises(SystemExit) as stopped:
        main(
            ["distill", "--config", "digits_sid", *options, evaluate, f"teacher={teachers()}", f"output_dir={folder}"]
            + ["steps=4", "training.preview_every=2", "training.trackers=[tensorboard]", "evaluate.every_images=8"]
        )
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for expected in ("teacher, 3 steps", "student", "network calls", "speed-up", "images/s", "from_pretrained"):
        assert expected in out
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert [row["network_calls"] for row in rows] == [3, 1, 1]
    assert all(row["metrics"]["fid"]["n"] == 40 for row in rows)
    assert (folder / "student.png").stat().st_size > 1000
    assert {path.name for path in (folder / "previews").iterdir()} == {
        "teacher.png",
        "step_00000002.png",
        "step_00000004.png",
    }
    assert [row["step"] for row in metrics(folder) if "fid" in row] == [2, 4]
    assert list(folder.rglob("events.out.tfevents.*"))
    assert "fd-digits-v1" in (folder / "student/README.md").read_text()


def test_previews_and_evaluation_do_not_change_the_training(teachers, tmp_path):
    for name, every in (("a", 0), ("b", 1)):
        run(f"teacher={teachers()}", f"output_dir={tmp_path / name}", "steps=3", f"training.preview_every={every}")
    assert same(student_weights(tmp_path / "a"), student_weights(tmp_path / "b"))


def test_resumed_command_equals_the_uninterrupted_one(teachers, tmp_path, capsys):
    common = [f"teacher={teachers()}", "training.checkpoint_every=2", "training.lr_schedule=constant"]
    assert run(*common, f"output_dir={tmp_path / 'whole'}", "steps=5") == 0
    assert run(*common, f"output_dir={tmp_path / 'parts'}", "steps=3") == 0
    assert run(*common, f"output_dir={tmp_path / 'parts'}", "steps=5", "resume=true") == 0
    assert "from step 3" in capsys.readouterr().out
    assert same(student_weights(tmp_path / "parts"), student_weights(tmp_path / "whole"))
    kept = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / n)] for n in ("parts", "whole")
    ]
    assert kept[0] == kept[1]


def test_occupied_output_folder_is_refused_and_untouched(teachers, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert run(f"teacher={teachers()}", f"output_dir={tmp_path}", "steps=1") == 2
    assert "holds another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_resume_of_nothing_and_of_a_foreign_run_is_refused(teachers, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=1", "resume=true") == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not folder.exists()
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=1") == 0
    before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=2", "resume=true", "method.alpha=1.2") == 2
    assert "another run" in capsys.readouterr().err
    assert sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_a_student_of_another_shape_than_its_teacher_is_not_resumed(tmp_path, capsys):
    """The folder of the teacher holds another network than the one the run began with."""
    teacher, folder = tmp_path / "teacher", tmp_path / "run"
    made = [f"teacher={teacher}", f"output_dir={folder}", "steps=1"]
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(teacher)
    assert run(*made) == 0
    DDPMPipeline(tiny_unet(block_out_channels=(8, 16)), DDPMScheduler()).save_pretrained(teacher)
    assert run(*made, "resume=true") == 2
    said = capsys.readouterr().err
    assert re.search(r"network was 'UNet2DModel of [\d,]+ parameters for samples of 1x8x8', is 'UNet2DModel of", said)


def test_bad_input_is_refused_before_anything_is_written(teachers, tmp_path, capsys):
    folder = tmp_path / "run"
    cases = {
        "does not exist": [f"teacher={tmp_path / 'nowhere'}"],
        "training.trackers: 'wandbb' is not one of": [f"teacher={teachers()}", "training.trackers=[wandbb]"],
        "names ['critic']": [f"teacher={teachers()}", "training.role_optimizers={critic: {lr: 1}}"],
        "did you mean steps?": [f"teacher={teachers()}", "stepps=4"],
        "is not valid YAML": [f"teacher={teachers()}", "training.trackers=[a"],
        "at most the 1000 entries": [
            f"teacher={teachers()}",
            "evaluate={reference: 'builtin:digits', teacher_steps: [2000]}",
        ],
        "levels must be 2 falling positive numbers": [
            f"teacher={teachers()}",
            "method.steps=2",
            "method.levels=[1, 2]",
        ],
        "levels 2.5 and 2.499 are one level of the teacher, which is told 440 at both": [
            f"teacher={teachers()}",
            "method={name: disback, method: {name: sid, steps: 2, levels: [2.5, 2.499]}}",
        ],
    }
    for message, overrides in cases.items():
        assert run(f"output_dir={folder}", "steps=1", *overrides) == 2
        assert message in capsys.readouterr().err
        assert not folder.exists()


def test_method_that_cannot_take_the_prediction_type_says_why(teachers, tmp_path, capsys):
    from conftest import tiny_unet
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "cm")
    for kind in get_args(AnyMethod):
        told = [f"output_dir={tmp_path / 'run'}", "steps=9999", f"method={{name: {kind().name}}}"]
        assert run(f"teacher={tmp_path / 'cm'}", *told) == 2
        assert "got 'consistency' (a consistency function is not a posterior mean)" in capsys.readouterr().err
    options = [f"output_dir={tmp_path / 'run'}", "steps=1", "method.t_max=1.0"]
    assert run(f"teacher={teachers()}", *options, config="digits_boot") == 2
    assert "set method.t_max=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(teachers, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    from stepdistill.trainer import Trainer

    save = Trainer.save

    def full(self, path):
        if self.progress.step >= 2:
            (path / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path)

    monkeypatch.setattr(Trainer, "save", full)
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=3", "training.checkpoint_every=1") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "resume=true" in error
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    assert run(f"teacher={teachers()}", f"output_dir={folder}", "steps=3", "resume=true") == 0


def test_diverged_run_names_the_term_and_keeps_the_last_good_checkpoint(teachers, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [
        "steps=50",
        "training.checkpoint_every=1",
        "training.optimizer.lr=1e30",
        "training.ema_halflife_images=null",
    ]
    assert run(f"teacher={teachers()}", f"output_dir={folder}", *options) == 1
    error = capsys.readouterr().err
    assert "fake/loss is" in error or "student/loss is" in error or "no longer finite" in error
    assert "Lower training.optimizer.lr" in error
    for checkpoint in Checkpoints(folder / "checkpoints", {}, kept=9).all():
        for file in checkpoint.glob("model*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def test_sample_writes_the_students_images_by_id(teachers, tmp_path):
    run(f"teacher={teachers()}", f"output_dir={tmp_path / 'run'}", "steps=1")
    for name, count, batch in (("a", 5, 2), ("b", 3, 3)):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(tmp_path / "run/student"), "--out", str(tmp_path / name), "--count", str(count)]
                 + ["--batch-size", str(batch)])  # fmt: skip
        assert stopped.value.code == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{k:06d}.png" for k in range(5)]
    for name in names[:3]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(teachers()), "--out", str(tmp_path / "a")])
    assert stopped.value.code == 2


def environment(**extra):
    return {**os.environ, "ACCELERATE_USE_CPU": "true", **extra}


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(teachers, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "stepdistill", "distill", "--config", "digits_sid", *FAST]
    command += [f"teacher={teachers()}", f"output_dir={folder}", "steps=100000"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "resume=true" in out
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < 100000
    assert metrics(folder)[-1]["step"] == step
    resumed = [o for o in command[3:] if not o.startswith("steps=")] + [f"steps={step + 1}", "resume=true"]
    with pytest.raises(SystemExit) as stopped:
        main(resumed)
    assert stopped.value.code == 0
    assert (folder / "student/model_index.json").is_file()


def test_two_processes_train_one_model(teachers, tmp_path):
    """A real two-process run: one student, both ranks' noise in it, and the same laws as one process."""
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["training/distill.py", "--config", "digits_sid", *FAST, f"teacher={teachers()}", f"output_dir={folder}"]
    command += ["steps=3", "training.checkpoint_every=2", "training.ema_halflife_images=null"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["images"] for row in metrics(folder)] == [8, 16, 24], "4 samples on each of 2 processes"
    random_states = {path.name for path in (folder / "checkpoints/step_00000003").glob("random_states_*")}
    assert random_states == {"random_states_0.pkl", "random_states_1.pkl"}
    single = tmp_path / "one"
    run(
        f"teacher={teachers()}",
        f"output_dir={single}",
        "steps=3",
        "training.batch_size=8",
        "training.ema_halflife_images=null",
    )
    two, one = (metrics(path)[0]["fake/loss"] for path in (folder, single))
    # step 1: same networks, other noise; 8 samples, each a mean of 64 squared errors weighted by 1/sigma^2
    assert two == pytest.approx(one, rel=1.0)


GRADIENT = """
import sys, torch
sys.path[:0] = [sys.argv[1]]
from accelerate import Accelerator
from test_trainer import Regression, build, weights
from stepdistill.config import Optimizer
from stepdistill.methods import Batch
accelerator = Accelerator(cpu=True)
noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
trainer = build(Regression(), optimizer=Optimizer(lr=0.3, eps=1.0))
mine = noise.chunk(accelerator.num_processes)[accelerator.process_index]
trainer.batches = lambda size: Batch(mine)
for _ in range(3):
    trainer.step()
twin = trainer.frozen["student"].network
assert all(a.data_ptr() == b.data_ptr() for a, b in zip(twin.parameters(), trainer.student.parameters())), "one memory"
torch.save(weights(trainer.student), f"{sys.argv[2]}_{accelerator.num_processes}_{accelerator.process_index}.pt")
"""


def test_two_processes_on_halves_of_a_batch_equal_one_process_on_the_batch(tmp_path):
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT)
    arguments = [str(script), str(ROOT / "tests"), str(tmp_path / "weights")]
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]):
        subprocess.run([sys.executable, *launcher, *arguments], env=environment(), check=True, timeout=300)
    one, *two = (torch.load(tmp_path / f"weights_{n}.pt", weights_only=True) for n in ("1_0", "2_0", "2_1"))
    assert torch.equal(*two), "the two processes hold the same weights"
    torch.testing.assert_close(two[0], one, atol=2e-5, rtol=1e-3)


def test_accelerate_launch_works_and_its_quiet_single_process_is_refused(teachers, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    common = ["--config", "digits_sid", *FAST, f"teacher={teachers()}", "steps=1"]
    plain = {key: value for key, value in environment().items() if key != "ACCELERATE_USE_CPU"}
    for name, start in (("script", ["training/distill.py"]), ("module", ["-m", "stepdistill", "distill"])):
        command = [*launch, "--num_processes", "1", *start, *common, f"output_dir={tmp_path / name}"]
        done = subprocess.run(command, env=plain, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / name / "student/model_index.json").is_file()
    assert same(student_weights(tmp_path / "script"), student_weights(tmp_path / "module"))
    command = [*launch, "--num_processes", "2", "training/distill.py", *common, f"output_dir={tmp_path / 'quiet'}"]
    done = subprocess.run(command, env=plain, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "torchrun --nproc_per_node" in done.stderr
    assert not (tmp_path / "quiet").exists()


def test_launch_check_lets_real_groups_pass(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="single process"):
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch()


def test_sample_noise_of_an_id_is_what_a_pipeline_generator_draws():
    noise = SampleNoise(range(5, 7), (1, 8, 8))()
    for row, index in zip(noise, (5, 6), strict=True):
        assert torch.equal(row, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)))
