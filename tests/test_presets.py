"""Every preset of the table from images to numbers, by the command, on networks of random weights."""

import json
import pickle

import numpy as np
import open_clip.factory
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from random_networks import save_all, tell_open_clip

from stepdistill.fid import main
from stepdistill.metrics.presets import PRESETS
from stepdistill.metrics.score import FRECHET
from stepdistill.metrics.weights import VARIABLE

NAMES = {"prdc": ("precision", "recall", "density", "coverage")}
"""What metrics are called in a record, where they are not called what they are."""
COUNT = 20


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
    name, networks, tmp_path, capsys
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

    fits = {}
    for metric in set(preset.metrics) & set(FRECHET):
        main(["ref", str(others), "--preset", name, "--trust", "--metrics", metric, "--out", str(tmp_path / "fit.npz")])
        capsys.readouterr()
        with np.load(tmp_path / "fit.npz") as fit:
            fits[metric] = {"mu": fit["mu"], "sigma": fit["sigma"]}
    reference = published(preset, fits, pictures(COUNT + 1, side, 1), tmp_path)
    if reference is not None:
        assert values(scored(capsys, "calc", images, reference, *told)) == pytest.approx(values(expected), rel=1e-6)

    few = ("--num", COUNT, "--repeats", 1)
    made = scored(capsys, "gen", "builtin:digits_text", reference or others, *told, *few, "--steps", 1)
    assert [*values(made)] == measured(preset)
    assert np.isfinite([*values(made).values()]).all()
    assert values(made) != values(expected)
