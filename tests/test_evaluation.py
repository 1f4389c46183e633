"""Students judged on the way and at the end, by any protocol; the best of them kept."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import families
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from random_networks import StandIn
from test_distill import ROOT, environment, metrics, same, student_weights
from test_families import recipe
from test_stages import DMD, chained

from stepdistill.__main__ import main
from stepdistill.best import FILE, Best
from stepdistill.config import Evaluate
from stepdistill.distill import Run
from stepdistill.errors import UserError
from stepdistill.fid import main as fid
from stepdistill.images import load_digits
from stepdistill.metrics.base import Value
from stepdistill.metrics.weights import KNOWN, VARIABLE, sha256_of

TINY = ["training.batch_size=4", "training.log_every=1", "training.preview_every=0", "training.trackers=[]"]
DIGITS = {"reference": "builtin:digits", "samples": 40, "curve_samples": 40, "teacher_steps": []}


def run(folder, teacher, *overrides, config="digits_sid", **evaluate):
    """``stepdistill distill`` with this section; the exit code."""
    told = [f"teacher={teacher}", f"output_dir={folder}", f"evaluate={json.dumps({**DIGITS, **evaluate})}", *overrides]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", config, *TINY, *told])
    return stopped.value.code


def student(folder):
    return json.loads((folder / "evaluation.json").read_text())["rows"][-1]


def curve(folder, name="fid"):
    return {row["step"]: row[name] for row in metrics(folder) if name in row}


@pytest.fixture(scope="module")
def judged(teachers, tmp_path_factory):
    """A run of 5 steps of 4 images, measured on the way, whose best is kept."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    told = {"metrics": ["fid", "kid", "prdc"], "every_images": 6, "best": "kid"}
    options = ("steps=5", "training.checkpoint_every=3", "training.optimizer.lr=0.003")
    assert run(folder, teachers(), *options, **told) == 0
    return folder


def test_every_metric_is_logged_at_the_step_that_completes_so_many_images(judged):
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert list(curve(judged, name)) == [2, 3, 5], "after 6, 12 and 18 images, and of the last of 20 no second time"


def test_the_last_student_is_measured_alike_on_the_way_and_at_the_end(judged):
    row = student(judged)
    assert row["metrics"]["fid"]["n"] == 40
    assert row["metrics"]["fid"]["value"] == pytest.approx(curve(judged)[5], rel=1e-9)
    assert sum(row["class_shares"]) == pytest.approx(1)
    assert row["diversity"] > 0


def test_the_numbers_are_those_of_the_fid_command(judged, capsys):
    command = ["gen", str(judged / "student"), "builtin:digits", "--metrics", "fid,kid,prdc", "--num", "40", "--json"]
    assert fid(command) == 0
    record = json.loads(capsys.readouterr().out)
    written = json.loads((judged / "evaluation.json").read_text())
    assert written["protocol"] == record["protocol"]
    for name, found in record["metrics"].items():
        assert student(judged)["metrics"][name]["value"] == pytest.approx(found["value"], rel=0.01, abs=1e-4), name


def test_the_best_student_is_a_pipeline_that_says_what_it_is(judged):
    values = curve(judged, "kid")
    told = json.loads((judged / "best" / FILE).read_text())
    assert told["value"] == min(values.values())
    assert values[told["step"]] == told["value"]
    assert (told["metric"], told["images"], told["samples"]) == ("kid", 4 * told["step"], 40)
    pipeline: Any = DiffusionPipeline.from_pretrained(judged / "best")
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 1)
    assert "fd-digits-v1" in (judged / "best/README.md").read_text()
    assert not list(judged.glob("best.*"))


@pytest.mark.parametrize(("value", "replaced"), [(-1e9, False), (1e9, True)])
def test_a_continued_run_remembers_the_best_value(teachers, tmp_path, value, replaced):
    folder, told = tmp_path / "run", {"every_images": 4, "best": "fid"}
    assert run(folder, teachers(), "steps=1", **told) == 0
    file = folder / "best" / FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "value": value, "step": 0}))
    assert run(folder, teachers(), "steps=2", "resume=true", **told) == 0
    assert json.loads(file.read_text())["step"] == (2 if replaced else 0)


def test_measuring_and_keeping_change_no_training(judged, teachers, tmp_path):
    options = ("steps=5", "training.checkpoint_every=3", "training.optimizer.lr=0.003")
    assert run(tmp_path / "run", teachers(), *options) == 0
    assert curve(tmp_path / "run") == {}
    assert same(student_weights(judged), student_weights(tmp_path / "run"))


def test_writing_a_student_leaves_the_generators_of_the_training_alone(tmp_path):
    """A pipeline with a VAE is checked on torch's global generator."""
    run = Run(recipe("dit", families.build("dit", tmp_path / "dit"), "sid", tmp_path / "run"))
    before = torch.get_rng_state()
    with torch.no_grad(), run.trainer.averaged_weights() as averaged:
        run.outcome.write(averaged, run.sampler, run.hosted, tmp_path / "best")
    assert torch.equal(torch.get_rng_state(), before)
    assert "Not evaluated" in (tmp_path / "best/README.md").read_text()


def test_of_several_stages_all_are_measured_and_the_best_is_the_last_ones(teachers, tmp_path):
    config = chained(tmp_path, teachers(), second=DMD)
    assert run(tmp_path / "run", teachers(), config=config, every_images=8, best="fid") == 0
    assert list(curve(tmp_path / "run")) == [2, 4, 5], "the last is measured for the best alone"
    assert json.loads((tmp_path / "run/best" / FILE).read_text())["step"] > 2


def test_two_processes_measure_what_one_does(teachers, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    section = {**DIGITS, "metrics": ["fid", "kid"], "samples": 41, "curve_samples": 41, "every_images": 8}
    command += ["training/distill.py", "--config", "digits_sid", *TINY, f"teacher={teachers()}", "steps=2"]
    command += [f"output_dir={folder}", f"evaluate={json.dumps({**section, 'best': 'fid'})}"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(curve(folder)) == [1, 2]
    assert (folder / "best" / FILE).is_file()
    two = student(folder)
    with pytest.raises(SystemExit):
        main(["export", str(folder)])
    one = student(folder)
    assert one["class_shares"] == two["class_shares"]
    for name in ("fid", "kid"):
        for key in ("value", "se", "n"):
            assert two["metrics"][name][key] == pytest.approx(one["metrics"][name][key], rel=1e-6)
        assert curve(folder, name)[2] == pytest.approx(one["metrics"][name]["value"], rel=1e-6)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """Random weights in the place of NVIDIA's, found by the variable."""
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    torch.jit.script(StandIn().eval()).save(folder / KNOWN["inception"].name)
    known = replace(KNOWN["inception"], sha256=sha256_of(folder / KNOWN["inception"].name))
    monkeypatch.setitem(KNOWN, "inception", known)
    monkeypatch.setenv(VARIABLE, str(folder))


def test_another_protocol_judges_with_its_own_network(inception, teachers, tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", load_digits()[0][:30, 0].numpy())
    folder, reference = tmp_path / "run", str(tmp_path / "reference.npz")
    told = {"preset": "clean", "metrics": ["kid", "is"], "reference": reference, "samples": 30, "curve_samples": 20}
    assert run(folder, teachers(), "steps=2", **told, every_images=4, best="is") == 0
    assert list(curve(folder, "kid")) == list(curve(folder, "is")) == [1, 2]
    assert json.loads((folder / "best" / FILE).read_text())["value"] == max(curve(folder, "is").values())
    assert "kid (+- se)" in capsys.readouterr().out
    command = ["gen", str(folder / "student"), reference, "--preset", "clean", "--metrics", "kid,is", "--num", "30"]
    assert fid([*command, "--json", "--features", str(tmp_path / "kept")]) == 0
    record = json.loads(capsys.readouterr().out)["metrics"]
    row = student(folder)
    assert row["class_shares"] == []
    for name in ("kid", "is"):
        assert row["metrics"][name]["value"] == pytest.approx(record[name]["value"], rel=0.01, abs=1e-6)


def statistics(folder, extractor):
    """This package's own file, without single features."""
    told = json.dumps({"kind": "fid", "extractor": extractor})
    np.savez(folder / "ref.npz", mu=np.zeros(80), sigma=np.eye(80), n=100, ddof=1, meta=told)
    return {"reference": str(folder / "ref.npz")}


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"preset": "edm-cifar"}, r"evaluate\.preset: .*did you mean edm-cifar10\?.*digits"),
        ({"metrics": ["fd"]}, "metric is one of fid, kid"),
        ({"metrics": ["fid", "fid"]}, "names one twice"),
        ({"metrics": ["is"]}, "needs a classifier"),
        ({"metrics": ["fid", "vendi"], "best": "vendi", "every_images": 4}, "best is a measured value .*: fid"),
        ({"best": "kid", "every_images": 4}, "best is a measured value .*: fid"),
        ({"best": "fid"}, "set every_images"),
        ({"metrics": ["clip"]}, "clip is of prompts"),
        ({"preset": "clean"}, "weights inception-2015-12-05.pt .* download .* put it into"),
        ({"reference": "nowhere"}, "nowhere is neither a folder"),
        ({"reference": "nowhere.npz"}, "nowhere.npz is neither a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    evaluate, message, teachers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(tmp_path / "run", teachers(), "steps=1", **evaluate) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extractor", "metric", "message"),
    [("inception", "fid", "of extractor inception, expected digits"), ("digits", "kid", "give the reference images")],
)
def test_statistics_that_do_not_serve_are_refused_before_anything_is_written(
    extractor, metric, message, teachers, tmp_path, capsys
):
    assert run(tmp_path / "run", teachers(), "steps=1", metrics=[metric], **statistics(tmp_path, extractor)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_statistics_stand_for_their_images(judged, teachers, tmp_path):
    assert fid(["ref", "builtin:digits", "--preset", "digits", "--out", str(tmp_path / "ref.npz")]) == 0
    options = ("steps=5", "training.checkpoint_every=3", "training.optimizer.lr=0.003")
    assert run(tmp_path / "run", teachers(), *options, reference=str(tmp_path / "ref.npz")) == 0
    expected = student(judged)["metrics"]["fid"]
    assert student(tmp_path / "run")["metrics"]["fid"]["value"] == pytest.approx(expected["value"], rel=1e-9)


def kept(folder, **told):
    return Best(folder, Evaluate(**{**DIGITS, "metrics": ("fid", "prdc"), "every_images": 1, **told}))


def values(number):
    return {"fid": Value(number, None, 40), "recall": Value(number, None, 40)}


def keep(best, number):
    best.keep(values(number), {"step": 1}, lambda folder: folder.mkdir())


@pytest.mark.parametrize(("metric", "better", "worse"), [("fid", 1.0, 3.0), ("recall", 3.0, 1.0)])
def test_better_is_lower_or_higher_as_the_metric_says(tmp_path, metric, better, worse):
    best = kept(tmp_path / "best", best=metric)
    assert best.beaten_by(values(2.0)), "the first is the best so far"
    assert not best.beaten_by(values(float("nan")))
    keep(best, 2.0)
    for seen in (best, kept(tmp_path / "best", best=metric)):
        assert seen.beaten_by(values(better))
        assert not seen.beaten_by(values(2.0))
        assert not seen.beaten_by(values(worse))


def test_a_student_that_was_measured_otherwise_does_not_count(tmp_path):
    keep(kept(tmp_path / "best", best="fid"), 2.0)
    for other in ({"best": "recall"}, {"reference": "images"}, {"curve_samples": 41}):
        assert kept(tmp_path / "best", **{"best": "fid", **other}).beaten_by(values(3.0))


def test_a_write_that_fails_keeps_the_earlier_best(tmp_path):
    best = kept(tmp_path / "best", best="fid")
    keep(best, 2.0)

    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; make room"):
        best.keep(values(1.0), {}, full)
    assert json.loads((tmp_path / "best" / FILE).read_text())["value"] == 2.0
    (tmp_path / "best" / FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        kept(tmp_path / "best", best="fid")


def test_a_dry_run_says_what_will_be_measured(teachers, tmp_path, capsys):
    told = {"metrics": ["fid", "prdc"], "every_images": 1000, "best": "recall"}
    assert run(tmp_path / "run", teachers(), "--dry-run", **told) == 0
    said = "fid, precision, recall, density, coverage of 40 images by digits against builtin:digits"
    assert f"evaluate  {said}; of 40 every 1,000 images, the best by recall kept" in capsys.readouterr().out
