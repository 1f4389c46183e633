"""The Inceptions against clean-fid, pytorch-fid and torch-fidelity on the same random weights."""

from typing import Any

import cleanfid.inception_torchscript
import pytest
import pytorch_fid.inception
import torch
import torch.nn.functional as F  # noqa: N812
from random_networks import save_nvidia_inception, save_pytorch_inception
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import inception_v3

from stepdistill.errors import UserError
from stepdistill.metrics.base import Extractor, Features
from stepdistill.metrics.extractors import load_extractor
from stepdistill.metrics.network import FrozenNetwork
from stepdistill.metrics.precision import full_precision
from stepdistill.metrics.resampling import resize


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A folder with a TorchScript under NVIDIA's name."""
    folder = tmp_path_factory.mktemp("nvidia")
    save_nvidia_inception(folder / "inception-2015-12-05.pt")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights under pytorch-fid's names."""
    return save_pytorch_inception(tmp_path_factory.mktemp("pytorch-fid") / "pt_inception-2015-12-05-6726825d.pth")


@pytest.fixture(scope="module")
def images():
    """Two images, half as large again as wide, that are neither flat nor noise."""
    grid = torch.randint(256, (2, 3, 12, 8), generator=torch.Generator().manual_seed(2)).float()
    return F.interpolate(grid, size=(96, 64), mode="bilinear").round().to(torch.uint8)


@pytest.fixture(scope="module")
def large(images):
    return F.interpolate(images.float(), size=(299, 299), mode="bicubic").clamp(0, 255)


@pytest.fixture(scope="module")
def pytorch_inception(checkpoint):
    return load_extractor("inception-pytorch", weights=checkpoint, trust=True)


def close(got, expected, rtol=1e-4):
    scale = expected.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * scale.item())


def test_the_torchscript_is_called_as_clean_fid_calls_it(script, images):
    theirs = cleanfid.inception_torchscript.InceptionV3W(str(script), download=False, resize_inside=True)
    ours = load_extractor("inception", weights=script, trust=True)
    assert (ours.name, ours.dimension) == ("inception", 2048)
    with torch.no_grad():
        close(ours(images).features, theirs(images), rtol=1e-6)
    close(ours(images.float()).features, ours(images).features, rtol=1e-6)


def test_the_torchscript_resizes_as_tensorflow_1_did(script, images):
    ours, clean = (load_extractor(name, weights=script, trust=True) for name in ("inception", "inception-clean"))
    resized = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    close(ours(images).features, clean(resized).features)


def test_its_layers_are_called_as_clean_fid_calls_them(script, large):
    theirs = cleanfid.inception_torchscript.InceptionV3W(str(script), download=False, resize_inside=False)
    ours = load_extractor("inception-clean", weights=script, trust=True)
    with torch.no_grad():
        close(ours(large).features, theirs(large), rtol=1e-6)


@pytest.mark.parametrize("name", ["inception", "inception-clean"])
def test_logits_are_those_of_the_torchscript_without_bias(script, large, name):
    program = torch.jit.load(script / "inception-2015-12-05.pt")
    with torch.no_grad():
        expected, biased = program(large, no_output_bias=True), program(large)
    logits = load_extractor(name, weights=script, trust=True)(large).logits
    assert logits is not None
    probabilities = logits.softmax(1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-9)
    assert (probabilities - biased).abs().max() > 1e-5


def test_the_clean_inception_takes_only_images_of_its_size(script, images):
    with pytest.raises(UserError, match=r"needs images resized to 299x299 .*, got 64x96"):
        load_extractor("inception-clean", weights=script, trust=True)(images)


def test_pytorch_fid_gives_the_same_features(pytorch_inception, checkpoint, images, monkeypatch):
    state = torch.load(checkpoint, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = pytorch_fid.inception.InceptionV3().eval()
    with torch.no_grad():
        close(pytorch_inception(images[:1]).features, theirs(images[:1] / 255)[0].flatten(1))


def test_torch_fidelity_gives_the_same_features_and_logits_behind_its_own_scaling(pytorch_inception, checkpoint, large):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checkpoint
    )
    large = large[1:].round()
    with torch.no_grad():
        features, logits = theirs(large.to(torch.uint8))
    # It takes (x - 128) / 128 where pytorch-fid takes 2 x / 255 - 1; what is the one of x is the other of this.
    got = pytorch_inception((large - 128) / 128 * 127.5 + 127.5)
    close(got.features, features)
    close(got.logits, logits)


def test_pooling_is_that_of_the_2015_graph_and_not_of_torchvision(pytorch_inception, checkpoint, large):
    plain = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(torch.load(checkpoint, weights_only=True))
    plain.add_module("fc", nn.Identity())
    with torch.no_grad():
        other = plain(2 * large[:1] / 255 - 1)
    assert (pytorch_inception(large[:1]).features - other).abs().max() > 0.01 * other.abs().max()


@pytest.mark.parametrize("name", ["inception", "inception-clean", "inception-pytorch"])
def test_foreign_files_are_refused(tmp_path, name):
    torch.jit.script(nn.Sequential(nn.Linear(1, 1))).save(tmp_path / "linear.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "state.pth")
    (tmp_path / "text.pt").write_text("no weights")
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{file}"):
            load_extractor(name, weights=file, trust=True)


class Probe(FrozenNetwork):
    """Says under which settings it runs."""

    name = "probe"
    dimension = 1
    weights = ""

    def _features(self, images):
        self.seen = settings(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        return Features(images.mean((1, 2, 3))[:, None])


def settings():
    backends: Any = torch.backends
    switches = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul
    return tuple(switch.fp32_precision for switch in switches)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_networks_run_in_full_precision_and_leave_the_settings_as_they_were(precision):
    probe, standing = Probe(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before = settings()
        with torch.autocast("cpu", torch.bfloat16):
            probe(torch.zeros(1, 3, 2, 2))
        assert probe.seen == (("ieee",) * 3, False, False)
        assert settings() == before
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            raise ZeroDivisionError
        assert settings() == before
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(standing)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_images_that_are_not_rgb_are_refused(shape):
    probe: Extractor = Probe()
    with pytest.raises(UserError, match=r"probe needs RGB images \(B, 3, H, W\), got \("):
        probe(torch.zeros(shape))


def test_float_images_are_not_resized_as_if_they_were_bytes():
    with pytest.raises(UserError, match=r"only uint8 images can be resized to 4x2 here, got torch\.float32"):
        resize(torch.zeros(1, 3, 8, 8), "bicubic", 2, 4)
    assert resize(torch.zeros(1, 3, 8, 8), "bicubic", 8, 8).dtype == torch.float32
