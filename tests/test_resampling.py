"""Resizing and cropping against the libraries that define them, pixel for pixel."""

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from stepdistill.errors import UserError
from stepdistill.metrics import resampling
from stepdistill.metrics.resampling import KINDS, check_steps, prepare, prepare_mixed

SIZES = [(1024, 256), (512, 256), (480, 256), (1024, 512), (640, 299), (32, 299), (64, 256), (333, 256), (512, 299)]
BY = {"pillow": resampling._by_pillow, "products": resampling._by_products}


def noise(height, width, channels=3, *, extreme=False):
    """White noise of all levels, or of 0 and 255 only, uint8 ``(H, W, C)``."""
    rng = np.random.default_rng(height)
    high, scale = (2, 255) if extreme else (256, 1)
    return (rng.integers(0, high, (height, width, channels)) * scale).astype(np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def pixels(images):
    return images[0].permute(1, 2, 0).numpy()


def pillow(image, kind, width, height):
    """Rows first, which is Pillow's own order unless ``turned_round``."""
    return np.asarray(
        Image.fromarray(image).resize((width, len(image)), KINDS[kind]).resize((width, height), KINDS[kind])
    )


def turned_round(image, width, height):
    """Whether Pillow 13 resizes columns first, as found by trying; Pillow 12 never does."""
    return height < image.shape[0] and image.shape[0] - height > 2 * (image.shape[1] - width)


# White noise crosses every rounding, 0 and 255 alone bring the largest sums; a grey strip of each size tells the
# products from Pillow as well as a square does, at a tenth of the time.
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "new"), [*SIZES, (2000, 32), (7, 5), (5, 7), (3, 1), (1, 3)])
def test_products_are_pillows_pixels_along_either_axis(size, new, kind, extreme):
    for height, width, to_height, to_width in ((size, 24, new, 31), (24, size, 31, new)):
        image = noise(height, width, 1, extreme=extreme)
        made = resampling._by_products(tensor(image), kind, to_height, to_width, rounded=True)
        assert made.dtype == torch.uint8
        assert np.array_equal(pixels(made)[..., 0], pillow(image[..., 0], kind, to_width, to_height))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_colour_are_pillows_pixels(kind, by):
    images = [noise(70, 50), noise(50, 70).reshape(70, 50, 3), np.zeros((70, 50, 3), dtype=np.uint8)]
    made = BY[by](torch.cat([tensor(image) for image in images]), kind, 41, 83, rounded=True)
    assert made.shape == (3, 3, 41, 83)
    for image, one in zip(images, made, strict=True):
        assert np.array_equal(one.permute(1, 2, 0), pillow(image, kind, 83, 41))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("new", [(20, 20), (50, 30), (31, 70), (90, 90), (41, 59), (150, 40)])
@pytest.mark.parametrize("size", [(60, 60), (40, 90), (90, 62)])
def test_a_single_call_of_pillow_gives_the_same_pixels_where_every_version_has_the_same_order(size, new, by):
    image, (height, width) = noise(*size), new
    if turned_round(image, width, height):
        image, height, width = image.transpose(1, 0, 2).copy(), width, height
    assert not turned_round(image, width, height)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels(BY[by](tensor(image), "lanczos", height, width, rounded=True)), expected)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_unrounded_bicubic_is_clean_fids(size, by):
    image = noise(size, size, extreme=True)
    expected = make_resizer("PIL", False, "bicubic", (299, 299))(image)
    made = BY[by](tensor(image), "bicubic", 299, 299, rounded=False)
    assert made.dtype == torch.float32
    assert (made.min(), made.max()) == (0, 255)
    # Measured: 0 on the CPU, and 6.1e-5 of 255 for the products.
    np.testing.assert_allclose(pixels(made), expected, rtol=0, atol=0 if by == "pillow" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 32), (17, 64), (64, 40), (8, 8)])
def test_small_images_are_resized_by_doubles_to_pillows_numbers(kind, shape):
    """A few numbers in ten thousand may differ by the last bit, 1.5e-5 of 255."""
    image = tensor(noise(*shape))
    made = prepare(image, [f"{kind}-float 299"])
    assert torch.equal(made, resampling._by_doubles(image, kind, 299, 299))
    expected = resampling._by_pillow(image, kind, 299, 299, rounded=False)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)
    assert (made != expected).float().mean() < 3e-4


def test_a_chain_of_the_literature_is_the_other_tools_chain():
    image = noise(90, 121)
    crop = CenterCrop(90)(Image.fromarray(image))
    small = np.asarray(crop.resize((64, 64), Image.Resampling.LANCZOS))
    expected = make_resizer("PIL", False, "bicubic", (75, 75))(small)
    made = prepare(tensor(image), ["center-crop", "lanczos 64", "bicubic-float 75"])
    np.testing.assert_array_equal(pixels(made), expected)


@pytest.mark.parametrize(("height", "width"), [(90, 121), (121, 90), (64, 64), (63, 200), (33, 34), (200, 61)])
def test_resizing_the_short_side_and_cropping_are_torchvisions(height, width):
    image = noise(height, width)
    both = Compose([Resize(64), CenterCrop(64)])
    made = prepare(tensor(image), ["short-bilinear 64"])
    assert np.array_equal(pixels(made), np.asarray(Resize(64)(Image.fromarray(image))))
    assert np.array_equal(pixels(prepare(made, ["crop 64"])), np.asarray(both(Image.fromarray(image))))


@pytest.mark.parametrize("size", range(1, 12))
def test_odd_margins_are_placed_as_torchvision_places_them(size):
    image = noise(11, 14)
    assert np.array_equal(pixels(prepare(tensor(image), [f"crop {size}"])), CenterCrop(size)(Image.fromarray(image)))
    assert np.array_equal(pixels(prepare(tensor(image), ["center-crop"])), CenterCrop(11)(Image.fromarray(image)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_the_right_size_stays_as_it_is(kind):
    image = tensor(noise(40, 40))
    assert torch.equal(prepare(image, [f"{kind} 40", f"short-{kind} 40"]), image)
    assert torch.equal(prepare(image, [f"{kind}-float 40"]), image.float())


def test_no_steps_change_nothing():
    image = tensor(noise(9, 12))
    assert torch.equal(prepare(image, []), image)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_restore_the_precision_of_the_process_and_ignore_autocast(precision):
    image = tensor(noise(33, 47))
    expected = resampling._by_products(image, "lanczos", 20, 20, rounded=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resampling._by_products(image, "lanczos", 20, 20, rounded=True), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("size", "new"), SIZES)
def test_a_gpu_makes_the_pixels_of_the_cpu(size, new):
    images = torch.cat([tensor(noise(size, size)), tensor(noise(size, size, extreme=True))])
    for kind in KINDS:
        steps = [f"{kind} {new}"]
        assert torch.equal(prepare(images.cuda(), steps).cpu(), prepare(images, steps))
    steps = [f"bicubic-float {new}"]
    torch.testing.assert_close(prepare(images.cuda(), steps).cpu(), prepare(images, steps), rtol=0, atol=1e-3)


def test_images_of_several_sizes_are_prepared_each_alone_and_stacked_in_order():
    images = [tensor(noise(height, width))[0] for height, width in ((30, 40), (40, 30), (30, 40), (25, 25))]
    steps = ["center-crop", "lanczos 20", "bicubic-float 33"]
    expected = torch.cat([prepare(image[None], steps) for image in images])
    assert torch.equal(prepare_mixed(images, steps, "cpu"), expected)
    with pytest.raises(UserError, match=r"one width x height x channels .* got 20x20x3, 26x20x3"):
        prepare_mixed([images[3], images[0]], ["short-box 20"], "cpu")


@pytest.mark.parametrize(
    "step",
    ["", "resize 256", "lanczos", "lanczos 0", "lanczos 25.6", "lanczos  256", "lanczos 256 ", "Lanczos 256", "crop"]
    + ["crop-center", "center-crop 256", "short-bicubic-float 299", "crop-float 9", "float 299", "bicubic-float"],
)
def test_a_malformed_step_is_answered_with_the_grammar(step):
    with pytest.raises(ValueError, match=r"must be center-crop \| crop N \| KIND N .*bicubic, bilinear, box, lanczos"):
        check_steps(["center-crop", step])
    with pytest.raises(ValueError, match="must be center-crop"):
        prepare(tensor(noise(8, 8)), [step])


@pytest.mark.parametrize("step", ["box 9", "short-box 9", "box-float 9"])
def test_nothing_resizes_after_an_unrounded_resize_but_crops_may_follow(step):
    with pytest.raises(ValueError, match=f"'bicubic-float 12' must be the last step that resizes; '{step}' follows"):
        check_steps(["bicubic-float 12", "crop 10", step])
    assert prepare(tensor(noise(8, 8)), ["bicubic-float 12", "crop 10", "center-crop"]).shape == (1, 3, 10, 10)


def test_images_that_are_too_small_for_a_crop_or_not_bytes_are_refused():
    with pytest.raises(UserError, match="images of 12x8 are too small to crop 9x9 from; resize them first"):
        prepare(tensor(noise(8, 12)), ["crop 9"])
    with pytest.raises(ValueError, match=r"must be uint8 \(B, C, H, W\), got torch.float32 \(1, 3, 8, 8\)"):
        prepare(torch.zeros(1, 3, 8, 8), [])
