"""The digits metric: its file, its scale, what it sees; and the evaluator that uses it."""

import runpy
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812

from stepdistill.bundled import bundled
from stepdistill.errors import UserError
from stepdistill.evaluation import Evaluator
from stepdistill.images import load_digits, to_float
from stepdistill.metrics.digits import DigitsExtractor, DigitsNet

TRAINING = Path(__file__).parents[1] / "training" / "train_digits_features.py"

IMAGES, LABELS = load_digits()
HALF = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))[: len(IMAGES) // 2]
GREY = IMAGES[HALF].float() / 255


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator("builtin:digits")


def as_bytes(grey):
    return (grey * 255).round().clamp(0, 255).to(torch.uint8)


def noisy(strength):
    return as_bytes(GREY + strength * torch.randn(GREY.shape, generator=torch.Generator().manual_seed(0)))


def blurred(sigma):
    offsets = torch.arange(-3.0, 4.0)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(kernel, kernel)[None, None] / kernel.sum() ** 2
    return as_bytes(F.conv2d(F.pad(GREY, (3, 3, 3, 3), mode="reflect"), kernel))


def faded(contrast):
    return as_bytes(GREY.mean() + contrast * (GREY - GREY.mean()))


def without_classes(count):
    return IMAGES[HALF][count <= LABELS[HALF]]


CORRUPTIONS = {
    "noise": (noisy, (0.05, 0.1, 0.2, 0.4)),
    "blur": (blurred, (0.4, 0.5, 0.7, 1.0)),
    "dropped classes": (without_classes, (1, 2, 3, 5)),
    "contrast": (faded, (0.95, 0.9, 0.8, 0.6)),
}


def distance(evaluator, images):
    return evaluator.score(images)["fid"]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_seen_and_more_of_it_is_farther(evaluator, name):
    corrupt, levels = CORRUPTIONS[name]
    floor = distance(evaluator, IMAGES[HALF])
    distances = [distance(evaluator, corrupt(level)).value for level in levels]
    assert distances == sorted(distances)
    assert distances[0] > floor.value + 3 * floor.se


def test_the_real_images_are_at_zero(evaluator):
    assert distance(evaluator, IMAGES).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_independent_draws_from_the_real_images_are_within_error_of_zero(evaluator, seed):
    draws = torch.randint(len(IMAGES), (3000,), generator=torch.Generator().manual_seed(seed))
    real = distance(evaluator, IMAGES[draws])
    assert real.debiased is not None
    assert abs(real.debiased) < 3 * real.se
    assert real.value > abs(real.debiased)


def test_features_are_repeatable_and_belong_to_single_images():
    one, other = DigitsExtractor(), DigitsExtractor()
    assert torch.equal(one(IMAGES), other(IMAGES))
    torch.testing.assert_close(torch.cat([one(part) for part in IMAGES.split(100)]), one(IMAGES), rtol=0, atol=1e-10)


def test_features_are_float64_even_under_autocast():
    extractor = DigitsExtractor()
    features = extractor(IMAGES[:50])
    assert features.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(IMAGES[:50]), features)


def test_every_feature_that_the_digits_fire_has_mean_zero_and_unit_deviation():
    features = DigitsExtractor()(IMAGES)
    std = features.std(0)
    fired = std > 0
    assert fired.sum() > 64
    torch.testing.assert_close(features.mean(0), torch.zeros(80, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(std[fired], torch.ones_like(std[fired]), rtol=1e-5, atol=0)


def test_features_that_no_digit_fires_keep_the_scale_of_the_network():
    weights = load_file(bundled("assets") / "fd-digits-v1.safetensors")
    silent = DigitsExtractor()(IMAGES).std(0) == 0
    assert weights["std"][silent].eq(1).all()
    assert weights["mean"][silent].eq(0).all()


def test_one_image_that_fires_a_silent_feature_does_not_dominate_the_distance(evaluator):
    extractor = DigitsExtractor()
    silent = extractor(IMAGES).std(0) == 0
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))
    stray = as_bytes(IMAGES / 255 + 0.4 * noise)
    fired = extractor(stray)[:, silent].amax(1)
    assert fired.max() > 0
    with_it = distance(evaluator, torch.cat([IMAGES, stray[fired.argmax()][None]])).value
    assert with_it < distance(evaluator, without_classes(1)).value


def test_the_classifier_knows_the_real_digits():
    assert (DigitsExtractor().classify(IMAGES) == LABELS).float().mean() > 0.95


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 9, 12), (1, 12, 12), (3, 8, 16), (4, 8, 8), (2, 16, 16)])
def test_images_that_are_no_square_multiples_of_8x8_are_refused(channels, height, width):
    with pytest.raises(UserError, match=rf"compares 8x8 digits, .* got images of {width}x{height} with {channels}$"):
        DigitsExtractor()(torch.zeros(2, channels, height, width, dtype=torch.uint8))


def test_larger_rgb_images_are_seen_as_their_8x8_area_means():
    extractor = DigitsExtractor()
    grey = torch.randint(2, 254, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    large = torch.kron(grey, torch.ones(1, 1, 2, 2, dtype=grey.dtype)).repeat(1, 3, 1, 1)
    # Within every 2x2 block and over the channels what is added is taken away again.
    large[:, :, ::2, ::2] += 1
    large[:, :, 1::2, 1::2] -= 1
    large[:, 0] += 1
    large[:, 2] -= 1
    seen, expected = (extractor(images.to(torch.uint8)) for images in (large, grey))
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    tripled = torch.kron(IMAGES[:9], torch.ones(1, 1, 3, 3, dtype=torch.uint8))
    assert torch.equal(extractor.classify(tripled), extractor.classify(IMAGES[:9]))


def test_the_bundled_file_is_what_the_training_script_writes(tmp_path, capsys):
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        runpy.run_path(str(TRAINING))["main"](str(tmp_path / "new.safetensors"), epochs=1)
    torch.set_num_threads(threads)
    assert "accuracy on 449 held-out digits" in capsys.readouterr().out
    assets = [file for file in bundled("assets").rglob("*") if file.is_file()]
    assert {file.suffix for file in assets} <= {".css", ".json", ".safetensors", ".txt", ".png"}
    ours, new = load_file(bundled("assets") / "fd-digits-v1.safetensors"), load_file(tmp_path / "new.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    assert ours.keys() == {*DigitsNet().state_dict(), "mean", "std"}
    assert sum(parameter.numel() for parameter in DigitsNet().parameters()) == 18_506


@pytest.mark.parametrize("batch_size", [64, 250, 1000])
def test_measuring_a_generator_is_measuring_its_images(evaluator, batch_size):
    measured = Evaluator("builtin:digits", batch_size=batch_size).measure(
        "real", 3, lambda ids: to_float(IMAGES[ids[0] : ids[-1] + 1]), samples=1000
    )
    found = measured.metrics["fid"]
    expected = distance(evaluator, IMAGES[:1000])
    assert (measured.label, measured.network_calls, found.n) == ("real", 3, 1000)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.se == pytest.approx(expected.se, rel=1e-6)
    features = DigitsExtractor()(IMAGES[:1000]).double()
    pairs = torch.pdist(features).square().mean().sqrt().item()
    assert measured.diversity == pytest.approx(pairs, rel=1e-6)
    seen = DigitsExtractor().classify(IMAGES[:1000])
    assert measured.class_shares == pytest.approx([(seen == digit).float().mean().item() for digit in range(10)])


def test_the_speed_counts_generation_and_not_a_slow_first_batch(monkeypatch):
    evaluator = Evaluator("builtin:digits", batch_size=20)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def generate(ids):
        clock[0] += 0.5 if ids[0] else 60.0
        return to_float(IMAGES[ids[0] : ids[-1] + 1])

    measured = evaluator.measure("slow start", 1, generate, samples=100)
    assert measured.images_per_second == pytest.approx(20 / 0.5)
