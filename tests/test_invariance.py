"""No value depends on how it was computed: batches, processes, threads, the order of files, memory or disk."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from processes import in_processes
from random_networks import (
    TINY_CLIP,
    save_dinov2,
    save_nvidia_inception,
    save_openai_clip,
    tell_open_clip,
    timm_dinov2,
)

from stepdistill.metrics import score
from stepdistill.metrics.clip import ARCHITECTURES
from stepdistill.metrics.kid import kid_subsets
from stepdistill.metrics.weights import KNOWN
from stepdistill.scoring import Options, calc

COUNT = 60
PROMPTS = tuple(f"picture number {k % 20}" for k in range(COUNT))
METRICS = ("fid", "kid", "kid-subsets", "prdc", "diversity", "vendi", "is")
"""Of Inception; those of DINOv2 and CLIP follow."""
METRICS += ("fd-dinov2", "clip-fid", "clip", "cmmd")
BY_ORDER = "kid-subsets"
"""Draws images by their place, as the tools do whose numbers it repeats."""


def pictures(seed):
    """Smooth colour images, uint8 ``(N, H, W, 3)``, of seed 1 brighter than of seed 0."""
    coarse = torch.rand(COUNT, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 340 - 40 + 60 * seed
    smooth = F.interpolate(coarse, size=(40, 48), mode="bicubic").clamp(0, 255)
    return smooth.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sets of images, the first in several places and orders, and small networks under their known names."""
    import open_clip

    place = tmp_path_factory.mktemp("place")
    images, others = pictures(0), pictures(1)
    np.savez(place / "images.npz", images)
    np.savez(place / "shuffled.npz", images[order()])
    np.savez(place / "others.npz", others)
    (place / "folder").mkdir()
    for k, pixels in enumerate(images):
        Image.fromarray(pixels).save(place / "folder" / f"{k:03d}.png")
    save_nvidia_inception(place / KNOWN["inception"].name, width=12)
    save_dinov2(timm_dinov2(224, width=64, depth=1), place / KNOWN["dinov2-vit-l-14"].name)
    tell_open_clip(place)
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        state = open_clip.CLIP(**TINY_CLIP).state_dict()
        openai = "openaipublic" in KNOWN[name].url
        save_openai_clip(state, place / KNOWN[name].name) if openai else torch.save(state, place / KNOWN[name].name)
    return place


@pytest.fixture(scope="module", autouse=True)
def small_subsets():
    """Of the sixty images that there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(score._PAIRS, BY_ORDER, partial(kid_subsets, subsets=5, size=20))
        yield


def order():
    return np.random.default_rng(0).permutation(COUNT)


def measured(place, images="images.npz", *, prompts=PROMPTS, **options):
    told = {"preset": "clean", "weights": str(place), "trust": True, "workers": 0, **options}
    told = Options(metrics=METRICS, prompts=prompts, **told)
    record = calc(str(place / images), str(place / "others.npz"), told)
    return {name: found["value"] for name, found in record["metrics"].items()}


@pytest.fixture(scope="module")
def expected(place):
    """Every value of 60 images in one batch."""
    found = measured(place)
    assert len(found) == 14
    assert all(abs(value) > 1e-6 for value in found.values())
    return {name: pytest.approx(value, rel=1e-9) for name, value in found.items()}


@pytest.mark.parametrize("batch_size", [1, 7, 16, 59])
def test_batches_of_any_size_give_the_same_values(place, expected, batch_size):
    assert measured(place, batch_size=batch_size) == expected


@pytest.mark.parametrize(("world", "batch_size"), [(1, 64), (2, 64), (3, 7)])
def test_any_number_of_processes_gives_the_same_values(place, expected, world, batch_size):
    for found in in_processes(world, lambda: measured(place, batch_size=batch_size)):
        assert found == expected


def test_files_in_another_order_give_the_same_values(place, expected):
    prompts = tuple(PROMPTS[k] for k in order())
    found = measured(place, "shuffled.npz", prompts=prompts)
    assert {**found, BY_ORDER: expected[BY_ORDER]} == expected


def test_any_number_of_threads_gives_the_same_values(place, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(before % 2 + 1)
    try:
        assert measured(place, batch_size=16) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 3])
def test_single_files_give_the_values_of_an_array(place, expected, workers):
    assert measured(place, "folder", workers=workers) == expected


@pytest.mark.parametrize("world", [1, 2])
def test_features_that_are_kept_on_disk_give_the_values_of_those_in_memory(place, expected, tmp_path, world):
    for _ in range(2):  # The second reads what the first has kept.
        for found in in_processes(world, lambda: measured(place, batch_size=7, features=tmp_path / "kept")):
            assert found == expected
