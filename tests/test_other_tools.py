"""Whole measurements against those of other tools: the same image files, the same random weights, the same numbers."""

import shutil

import cleanfid.fid
import cleanfid.resize
import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import scipy
import torch
import torch.nn.functional as F  # noqa: N812
import torch_fidelity
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from prdc import compute_prdc
from random_networks import save_nvidia_inception, save_pytorch_inception
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.metrics.extractors import load_extractor
from stepdistill.metrics.frechet import Reference, moments_of
from stepdistill.metrics.presets import PRESETS
from stepdistill.scoring import Options, calc

WIDTH, COUNT = 12, 40
WITH_SQRTM = pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18), reason="clean-fid and pytorch-fid call sqrtm(disp=)"
)


def pictures(count, seed, side=40):
    """Smooth colour images, uint8 ``(N, H, W, 3)``, of seed 1 brighter than of seed 0.

    Where two sets are alike, what other tools round to float32 is visible beside a small distance.
    """
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 340 - 40 + 60 * seed
    smooth = F.interpolate(coarse, size=(side, side + 8 * (side < 299)), mode="bicubic").clamp(0, 255)
    return smooth.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def folder_of(images, folder):
    folder.mkdir()
    for k, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sets of images as folders, archives and arrays, and a small TorchScript under NVIDIA's name."""
    place = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("images", "others")):
        made = pictures(COUNT + 5 * seed, seed)
        shutil.make_archive(str(place / name), "zip", folder_of(made, place / name))
        np.savez(place / f"{name}.npz", made)
        np.save(place / f"{name}.npy", made)
    save_nvidia_inception(place / "inception-2015-12-05.pt", width=WIDTH)
    return place


def measured(place, *metrics, preset="clean", kind="", **changes):
    """What the command finds, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, preset, PRESETS[preset].changed(changes))
        told = Options(preset=preset, metrics=metrics, weights=str(place), trust=True, workers=0)
        record = calc(str(place / f"images{kind}"), str(place / f"others{kind}"), told)
    return {name: found["value"] for name, found in record["metrics"].items()}


class Narrow(InceptionV3W):
    """clean-fid's wrapper for a TorchScript of fewer features; of full width it is tested in ``test_inception.py``."""

    def forward(self, x):
        return self.base(x, return_features=True) if self.resize_inside else self.layers((x - 128) / 128).flatten(1)


def clean_fid(place, *, kind="", **options):
    network = Narrow(str(place), download=False, resize_inside=options.get("mode") == "legacy_tensorflow")
    options |= {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    return cleanfid.fid.compute_fid(
        f"{place}/images{kind}", f"{place}/others{kind}", custom_feat_extractor=network, **options
    )


# clean-fid takes its mean in float32.
@WITH_SQRTM
@pytest.mark.parametrize("kind", ["", ".zip", ".npz", ".npy"])
def test_clean_fid_finds_the_same_distance_in_folders_and_archives(place, kind):
    theirs = clean_fid(place, kind=kind if kind == ".zip" else "")
    assert measured(place, "fid", kind=kind)["fid"] == pytest.approx(theirs, rel=1e-6)


@WITH_SQRTM
@pytest.mark.parametrize("kind", ["", ".npz"])
def test_clean_fid_finds_the_same_distance_as_tensorflow_resized(place, kind):
    theirs = clean_fid(place, mode="legacy_tensorflow")
    assert measured(place, "fid", preset="edm-cifar10", kind=kind)["fid"] == pytest.approx(theirs, rel=1e-6)


@WITH_SQRTM
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear", "lanczos", "box"])
def test_clean_fid_finds_the_same_distance_by_every_filter_in_bytes_and_in_floats(place, resize, rounded):
    theirs = clean_fid(place, custom_fn_resize=cleanfid.resize.make_resizer("PIL", rounded, resize, (299, 299)))
    step = f"{resize} 299" if rounded else f"{resize}-float 299"
    assert measured(place, "fid", prepare=(step,))["fid"] == pytest.approx(theirs, rel=1e-6)


class Script(FeatureExtractorBase):
    """The TorchScript behind torch-fidelity's own arithmetic, images and files."""

    path = ""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.program = torch.jit.load(self.path)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, input):
        features = self.program(input, return_features=True)
        found = {"features": features, "logits": features @ self.program.output.weight.T}
        return tuple(found[name] for name in self.features_list)


def test_torch_fidelity_finds_the_same_of_everything(place, monkeypatch):
    monkeypatch.setattr(Script, "path", str(place / "inception-2015-12-05.pt"))
    torch_fidelity.register_feature_extractor("script", Script)
    theirs = torch_fidelity.calculate_metrics(
        **{f"input{k}": str(place / name) for k, name in ((1, "images"), (2, "others"))},
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        feature_extractor="script",
        cuda=False,
        cache=False,
        verbose=False,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=COUNT,
        save_cpu_ram=True,
    )
    ours = measured(place, "fid", "is", "prdc", preset="adm-256", is_splits=1)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


def uint8(place, name):
    return torch.from_numpy(np.load(place / f"{name}.npy")).permute(0, 3, 1, 2)


class Program(nn.Module):
    """The TorchScript as torchmetrics takes a network of one's own."""

    def __init__(self, path, *, logits=False):
        super().__init__()
        self.program, self.logits = torch.jit.load(path), logits
        self.num_features = WIDTH

    def forward(self, images):
        features = self.program(images, return_features=True)
        return features @ self.program.output.weight.T if self.logits else features


def test_torchmetrics_finds_the_same_distances_and_score(place):
    path = place / "inception-2015-12-05.pt"
    images, others = uint8(place, "images"), uint8(place, "others")[:COUNT]
    np.savez(place / "images.few.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez(place / "others.few.npz", others.permute(0, 2, 3, 1).numpy())
    distance = FrechetInceptionDistance(Program(path), normalize=False)
    kernel = KernelInceptionDistance(Program(path), subsets=1, subset_size=COUNT)
    score = InceptionScore(Program(path, logits=True), splits=1)
    for metric in (distance, kernel):
        metric.update(others, real=True)
        metric.update(images, real=False)
    score.update(images)
    ours = measured(place, "fid", "kid", "is", preset="edm-cifar10", kind=".few.npz", is_splits=1)
    assert ours["fid"] == pytest.approx(distance.compute().item(), rel=1e-6)
    assert ours["kid"] == pytest.approx(kernel.compute()[0].item(), abs=1e-6)  # Float32 sums of values near 1.
    assert ours["is"] == pytest.approx(score.compute()[0].item(), rel=1e-4)  # In float32.


def test_prdc_finds_the_same_shares(place):
    network = load_extractor("inception", weights=place, trust=True)
    features = [network(uint8(place, name)).features.numpy() for name in ("others", "images")]
    theirs = compute_prdc(*features, nearest_k=5)
    ours = measured(place, "prdc", preset="edm-cifar10")
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-6)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """20 images a side of the size that Inception reads, as folders, and pytorch-fid's Inception in full size."""
    place = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("images", "others")):
        folder_of(pictures(20, seed, side=299), place / name)
    save_pytorch_inception(place / "pt_inception-2015-12-05-6726825d.pth")
    return place


@pytest.mark.slow
@WITH_SQRTM
def test_pytorch_fid_finds_the_same_distance_with_the_whole_inception(large, monkeypatch):
    state = torch.load(large / "pt_inception-2015-12-05-6726825d.pth", weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    paths = [str(large / "images"), str(large / "others")]
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths(paths, 10, "cpu", 2048, num_workers=0)
    # pytorch-fid's root of a singular product leaves 2e-5 of it; features are float32 in two orders.
    ours = measured(large, "fid", preset="mjhq30k-sana", prepare=())["fid"]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_torch_fidelity_and_torchmetrics_find_the_same_distance_with_the_whole_inception(large):
    weights = str(large / "pt_inception-2015-12-05-6726825d.pth")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(large / "images"),
        input2=str(large / "others"),
        fid=True,
        cuda=False,
        feature_extractor_weights_path=weights,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights)
    network, features = load_extractor("inception-pytorch", weights=weights, trust=True), []
    for name in ("others", "images"):
        files = sorted((large / name).iterdir())
        images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
        metric.update(images, real=name == "others")
        # They take (x - 128) / 128 where pytorch-fid takes 2 x / 255 - 1; what is the one of x is the other of this.
        features.append(network((images.float() - 128) / 128 * 127.5 + 127.5).features)
    ours = Reference(moments_of(features[0])).distance(moments_of(features[1]))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
    assert ours == pytest.approx(theirs, rel=1e-4)
