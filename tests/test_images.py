"""Reading images and the rounding rule between bytes and [-1, 1]."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.images import load_digits, to_float, to_uint8
from stepdistill.metrics.digits import DigitsExtractor
from stepdistill.metrics.sources import load_images


def save(folder, images):
    """``(N, H, W[, C])`` bytes as numbered PNG files, which sort in the order of the array."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return folder


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels)[[0, -1]].tolist() == [-1, 1]
    torch.testing.assert_close(to_uint8(to_float(levels)), levels)


def test_rounding_is_to_the_nearest_level_and_clips():
    levels = torch.arange(256.0)
    for offset in (-0.49, 0.49):
        torch.testing.assert_close(to_uint8((levels + offset) / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_a_folder_an_npz_and_memory_are_the_same_images_with_the_same_features(tmp_path):
    digits = load_digits()[0][:40]
    array = digits[:, 0].numpy()
    folder = save(tmp_path / "folder" / "nested", array).parent
    np.savez(tmp_path / "flat.npz", array)
    np.savez_compressed(tmp_path / "channels.npz", array[..., None])
    extractor = DigitsExtractor()
    for source in (folder, tmp_path / "flat.npz", tmp_path / "channels.npz"):
        images = load_images(source)
        assert torch.equal(images, digits)
        assert torch.equal(extractor(images), extractor(digits))


@pytest.mark.parametrize("suffix", ["bmp", "png", "tif", "webp"])
def test_lossless_rgb_files_come_back_channels_first(tmp_path, suffix):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", lossless=True)
    assert torch.equal(load_images(tmp_path), torch.from_numpy(pixels).permute(2, 0, 1)[None])


def test_grey_images_stored_as_rgb_have_the_features_of_grey_ones():
    digits, extractor = load_digits()[0][:40], DigitsExtractor()
    torch.testing.assert_close(extractor(digits.expand(-1, 3, -1, -1)), extractor(digits), rtol=1e-5, atol=1e-5)


def test_a_folder_is_read_recursively_in_sorted_order_and_other_files_are_left_alone(tmp_path):
    for name, level in (("b.png", 3), ("a/z.PNG", 2), ("a/b/c.png", 1), ("c.png", 4)):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), level, dtype=np.uint8)).save(file)
    (tmp_path / "notes.txt").write_text("not an image")
    assert load_images(tmp_path)[:, 0, 0, 0].tolist() == [1, 2, 3, 4]


def test_builtin_digits_are_scikit_learns_on_the_full_range():
    images, labels = load_digits()
    assert torch.equal(load_images("builtin:digits"), images)
    assert images.shape == (1797, 1, 8, 8)
    assert images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_images_of_different_sizes_are_named(tmp_path):
    save(tmp_path, [noise(8, 8), noise(8, 8), noise(6, 8)])
    with pytest.raises(UserError, match=r"00000\.png is 8x8 with 1 channel and .*00002\.png is 8x6 with 1 channel"):
        load_images(tmp_path)


def test_grey_and_colour_do_not_mix(tmp_path):
    save(tmp_path, [noise(8, 8), noise(8, 8, 3)])
    with pytest.raises(UserError, match=r"1 channel and .*00001\.png is 8x8 with 3 channels"):
        load_images(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_a_truncated_image_is_named(tmp_path, keep):
    file = save(tmp_path, [noise(8, 8)]) / "00000.png"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cannot read the image .*00000\.png"):
        load_images(tmp_path)


def test_an_image_too_large_to_decode_is_named(tmp_path, monkeypatch):
    save(tmp_path, [noise(8, 8)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(UserError, match=r"cannot read the image .*decompression bomb"):
        load_images(tmp_path)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path):
    save(tmp_path, [np.full((8, 8), 40_000, dtype=np.uint16)])
    with pytest.raises(UserError, match=r"00000\.png: it is not 8-bit"):
        load_images(tmp_path)


def test_a_folder_without_images_and_a_missing_source_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no images .*\.png"):
        load_images(tmp_path)
    for missing in (tmp_path / "nowhere", tmp_path / "nowhere.npz", "builtin:digit"):
        with pytest.raises(
            UserError,
            match=r"neither a folder of images .* a file ending in \.zip, \.npz, \.npy, builtin:dig",
        ):
            load_images(missing)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": noise(4, 8, 8)}, "holds images; expected arr_0"),
        ({}, "holds nothing"),
        ({"arr_0": noise(4, 8, 8) / 255}, "must be uint8"),
        ({"arr_0": noise(8, 8)}, r"must be uint8 \(N, H, W\)"),
        ({"arr_0": noise(4, 3, 8, 8)}, "with C = 1 or 3, got uint8"),
        ({"arr_0": np.array([None])}, "cannot read"),
    ],
)
def test_an_npz_with_something_else_in_it_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_images(tmp_path / "x.npz")


def test_a_damaged_npz_is_refused_wherever_the_damage_is(tmp_path):
    file = tmp_path / "x.npz"
    np.savez_compressed(file, noise(30, 8, 8))
    whole = file.read_bytes()
    assert load_images(file).shape == (30, 1, 8, 8)
    for position in range(0, len(whole), 7):
        file.write_bytes(whole[:position])
        with pytest.raises(UserError, match="cannot read"):
            load_images(file)
    for position in (60, 80, 120):  # Inside the compressed stream, where zlib or its checksum notices.
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(UserError, match="cannot read"):
            load_images(file)
