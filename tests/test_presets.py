"""Every preset of the table from images to numbers, by the command, on networks of random weights."""

import json
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip.factory
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from processes import in_processes
from random_networks import save_all, tell_open_clip

from stepdistill.errors import UserError
from stepdistill.fid import main
from stepdistill.metrics.clip import ClipVitB32
from stepdistill.metrics.extractors import PACKAGES
from stepdistill.metrics.frechet import Reference, moments_of
from stepdistill.metrics.presets import PRESETS
from stepdistill.metrics.protocols import FRECHET
from stepdistill.metrics.store import FeatureStore
from stepdistill.metrics.weights import VARIABLE, find_weights
from stepdistill.scoring import ALONE

NAMES = {"prdc": ("precision", "recall", "density", "coverage")}
"""What metrics are called in a record, where they are not called what they are."""
COUNT = 20
PIPELINES = {"prompts": "builtin:digits_text", "none": None}
"""What a law of labels can be followed by: the bundled digits, which have classes, or a tiny teacher that has none."""


def measured(preset):
    return [name for metric in preset.metrics for name in NAMES.get(metric, (metric,))]


def pictures(count, side, seed):
    """Smooth colour images of all levels, uint8 ``(N, H, W, 3)``."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 340 - 40
    smooth = F.interpolate(coarse, size=(side, side + 4 * (side > 8)), mode="bicubic").clamp(0, 255)
    return smooth.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Weights of every network in the folder of the environment variable."""
    folder = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patch:
        for registry in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
            patch.setattr(open_clip.factory, registry, open_clip.factory.__dict__[registry].copy())
        tell_open_clip(folder)
        patch.setenv(VARIABLE, str(save_all(folder)))
        yield


def scored(capsys, *arguments):
    assert main([*map(str, arguments), "--trust", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def values(record):
    return {name: found["value"] for name, found in record["metrics"].items()}


def published(preset, fits, images, folder):
    """The reference in the file that the preset says it is published in, or ``None`` where it is a folder of images."""
    name = preset.reference.split()[0].rpartition("/")[2]
    if name.endswith(".pkl"):
        arrays = {FRECHET[metric].replace("-", "_"): fit for metric, fit in fits.items()}
        (folder / name).write_bytes(pickle.dumps({"num_images": COUNT, **arrays}))
    elif name.startswith("VIRTUAL"):
        np.savez(folder / name, arr_0=images, **fits["fid"], mu_s=np.zeros(2), sigma_s=np.eye(2))
    elif name.endswith(".npz"):
        np.savez(folder / name, **fits["fid"])
    else:
        return None
    return folder / name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if preset.extractor == "inception-pytorch" else ())
        for name, preset in PRESETS.items()
    ],
)
def test_a_preset_scores_images_and_a_pipeline_against_images_and_its_published_reference(
    name, networks, teachers, monkeypatch, tmp_path, capsys
):
    preset = PRESETS[name]
    side = 8 if preset.extractor == "digits" else 36
    images, others = tmp_path / "images.npz", tmp_path / "others.npz"
    np.savez(images, pictures(COUNT, side, 0))
    np.savez(others, pictures(COUNT + 1, side, 1))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a bold handwritten seven, number {k}\n" for k in range(COUNT)))
    told = ("--preset", name, "--prompts", prompts)
    expected = scored(capsys, "calc", images, others, *told)
    assert [*values(expected)] == measured(preset)
    assert np.isfinite([*values(expected).values()]).all()
    for start, package in PACKAGES.items():
        assert (package in expected["versions"]) == any(network.startswith(start) for network in expected["weights"])

    fits = {}
    for metric in set(preset.metrics) & set(FRECHET):
        main(["ref", str(others), "--preset", name, "--trust", "--metrics", metric, "--out", str(tmp_path / "fit.npz")])
        capsys.readouterr()
        with np.load(tmp_path / "fit.npz") as fit:
            fits[metric] = {"mu": fit["mu"], "sigma": fit["sigma"]}
    reference = published(preset, fits, pictures(COUNT + 1, side, 1), tmp_path)
    if reference is not None:
        assert values(scored(capsys, "calc", images, reference, *told)) == pytest.approx(values(expected), rel=1e-6)

    if {*preset.metrics} - {*ALONE}:
        main(["ref", str(others), "--preset", name, "--trust", "--out", str(tmp_path / "ref.npz")])
        capsys.readouterr()
        again = values(scored(capsys, "calc", images, tmp_path / "ref.npz", *told))
        assert again == {name: pytest.approx(value, rel=1e-9) for name, value in values(expected).items()}

    small = replace(preset, samples=COUNT, repeats=1)
    monkeypatch.setitem(PRESETS, name, small)
    pipeline, prompted = PIPELINES.get(preset.labels, "builtin:digits"), preset.labels == "prompts"
    source = teachers() if pipeline is None else pipeline
    made = scored(capsys, "gen", source, reference or others, *(told if prompted else told[:2]), "--steps", 1)
    assert (made["protocol"]["name"], made["protocol"]["digest"]) == (name, small.digest())
    assert [*values(made)] == measured(preset)
    assert np.isfinite([*values(made).values()]).all()
    assert values(made) != values(expected)


def test_a_run_of_two_networks_that_is_killed_between_them_continues_with_what_each_lacks(
    networks, tmp_path, monkeypatch, capsys
):
    np.savez(tmp_path / "others.npz", pictures(COUNT + 1, 36, 1))
    told = ("gen", "builtin:digits", tmp_path / "others.npz", "--preset", "edm2-img64", "--num", COUNT, "--repeats", 1)
    told = (*told, "--steps", 1, "--features")
    expected = values(scored(capsys, *told, tmp_path / "whole"))

    def killed():
        kept = FeatureStore.write

        def write(store, first_id, features):
            kept(store, first_id, features)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(FeatureStore, "write", write)  # In the child, which is a fork.
        main([*map(str, told), str(tmp_path / "killed"), "--trust"])

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(200)
    assert child.exitcode == -signal.SIGKILL
    shards = list((tmp_path / "killed").rglob("*.safetensors"))
    assert [shard.parent.name for shard in shards] == ["inception"]
    written = shards[0].stat().st_mtime_ns
    assert values(scored(capsys, *told, tmp_path / "killed")) == pytest.approx(expected, rel=1e-12)
    assert shards[0].stat().st_mtime_ns == written


def test_clip_fid_and_the_subsets_of_kid_are_metrics_of_the_command(networks, tmp_path, capsys):
    images, others = tmp_path / "images.npz", tmp_path / "others.npz"
    np.savez(images, pictures(COUNT, 36, 0))
    np.savez(others, pictures(COUNT + 1, 36, 1))
    found = scored(capsys, "calc", images, others, "--preset", "clean", "--metrics", "clip-fid")["metrics"]["clip-fid"]
    towers = ClipVitB32(find_weights("clip-vit-b-32", trust=True))
    seen = [
        moments_of(towers(torch.from_numpy(pictures(COUNT + k, 36, k)).permute(0, 3, 1, 2)).features) for k in (0, 1)
    ]
    assert found["value"] == pytest.approx(Reference(seen[1]).distance(seen[0]), rel=1e-6)
    assert (found["n"], found["n_ref"]) == (COUNT, COUNT + 1)
    with pytest.raises(UserError, match="at least 1000 generated features are needed, got 20"):
        main(["calc", str(images), str(others), "--preset", "clean", "--metrics", "kid-subsets", "--trust"])


def test_the_clip_score_of_one_image_has_no_error_and_an_empty_prompt_is_named_in_every_process(
    networks, tmp_path, capsys
):
    np.savez(tmp_path / "images.npz", pictures(3, 36, 0))
    (tmp_path / "prompts.txt").write_text('a cat\na dog\n""\n')
    told = ("calc", tmp_path / "images.npz", "--preset", "coco30k-gigagan", "--metrics", "clip")
    told = [*map(str, told), "--prompts", str(tmp_path / "prompts.txt"), "--trust", "--json"]
    assert main([*told, "--num", "1"]) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (record["metrics"]["clip"]["se"], record["metrics"]["clip"]["n"]) == (None, 1)
    errors = in_processes(2, lambda: main(told))
    assert {str(error).partition(" is empty")[0] for error in errors} == {f"prompt 3 of {tmp_path / 'prompts.txt'}"}


def test_the_parts_of_the_inception_score_do_not_depend_on_the_order_of_images_or_batches(networks, tmp_path, capsys):
    images = pictures(40, 36, 0)
    np.savez(tmp_path / "images.npz", images)
    np.savez(tmp_path / "shuffled.npz", images[np.random.default_rng(0).permutation(40)])
    told = ("--preset", "adm-256", "--metrics", "is")
    expected = scored(capsys, "calc", tmp_path / "images.npz", *told)["metrics"]["is"]["repeats"]
    assert len({round(value, 9) for value in expected}) == 10
    for more in ((), ("--batch-size", 7), ("--features", tmp_path / "kept")):
        found = scored(capsys, "calc", tmp_path / "shuffled.npz", *told, *more)["metrics"]["is"]["repeats"]
        assert [value - 1 for value in found] == pytest.approx([value - 1 for value in expected], rel=1e-3)


def test_clip_scores_of_two_runs_compare_without_a_reference(networks, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\n")
    told = ("--preset", "coco30k-gigagan", "--metrics", "clip", "--prompts", tmp_path / "prompts.txt", "--features")
    scores = []
    for k in (0, 1):
        np.savez(tmp_path / f"{k}.npz", pictures(3, 36, k))
        scores.append(values(scored(capsys, "calc", tmp_path / f"{k}.npz", *told, tmp_path / str(k)))["clip"])
    found = scored(capsys, "compare", tmp_path / "0", tmp_path / "1")
    assert values(found)["clip"] == pytest.approx(scores[0] - scores[1], abs=1e-7)


def test_weights_that_are_named_serve_clip_beside_the_digits_which_have_theirs(networks, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "images.npz", pictures(COUNT, 8, 0))
    (tmp_path / "prompts.txt").write_text("a digit\n" * COUNT)
    told = ("calc", tmp_path / "images.npz", "builtin:digits", "--prompts", tmp_path / "prompts.txt")
    told = (*told, "--metrics", "fid,clip", "--weights", os.environ[VARIABLE])
    monkeypatch.delenv(VARIABLE)
    assert scored(capsys, *told)["weights"].keys() == {"digits", "clip score"}


def test_the_script_of_the_clip_score_is_the_command(networks, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "images.npz", pictures(COUNT, 36, 0))
    (tmp_path / "prompts.txt").write_text("".join(f"picture {k}\n" for k in range(COUNT)))
    told = [str(tmp_path / "images.npz"), "--prompts", str(tmp_path / "prompts.txt"), "--trust", "--json"]
    script = Path(__file__).parents[1] / "eval" / "clip_score.py"
    monkeypatch.setattr(sys, "argv", [str(script), *told])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    expected = scored(capsys, "calc", *told[:3], "--preset", "coco30k-gigagan", "--metrics", "clip")
    assert values(found) == values(expected)
    assert found["metrics"].keys() == {"clip"}
