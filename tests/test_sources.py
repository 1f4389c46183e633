"""Images from folders, archives and memory: the same ones in the same order, read by any number of threads."""

import os
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.images import load_digits
from stepdistill.metrics.base import Source
from stepdistill.metrics.sources import AHEAD, MemorySource, batches, load_images, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 9, 7, 3), dtype=np.uint8)


def save(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{k:03d}.{suffix}")
    return folder


def zipped(folder, path):
    """A zip of everything in ``folder``, last names first."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def read(source, **options):
    """Ids and pixels of everything in ``source``."""
    found = list(batches(source, range(len(source)), **{"batch_size": 5, **options}))
    return [k for batch in found for k in batch.ids], [image for batch in found for image in batch.images]


@pytest.fixture
def places(tmp_path):
    """The same images in every kind of place."""
    folder = save(tmp_path / "folder", PIXELS)
    np.savez(tmp_path / "images.npz", PIXELS)
    np.save(tmp_path / "images.npy", PIXELS)
    shards = tmp_path / "shards"
    (shards / "b").mkdir(parents=True)
    for name, part in (("a.npy", PIXELS[:4]), ("b/0.npy", PIXELS[4:5]), ("b/1.NPY", PIXELS[5:])):
        with (shards / name).open("wb") as file:
            np.save(file, part)
    (shards / "readme.txt").write_text("neither image nor array")
    return [folder, zipped(folder, tmp_path / "images.ZIP"), *tmp_path.glob("*.np?"), shards]


def test_the_same_images_come_from_every_kind_of_place(places):
    assert len(places) == 5
    for place in places:
        source = open_source(place)
        ids, images = read(source)
        assert ids == list(range(len(PIXELS)))
        assert np.array_equal(torch.stack(images).permute(0, 2, 3, 1), PIXELS), place
        assert len({source.name(k) for k in ids}) == len(ids)
        assert all(str(place) in source.name(k) for k in ids)


def test_memory_and_the_builtin_digits_are_sources():
    digits = load_digits()[0]
    for source in (MemorySource(digits), open_source("builtin:digits")):
        assert len(source) == 1797
        assert torch.equal(torch.stack(read(source, batch_size=500)[1]), digits)
    text = open_source("builtin:digits_text")
    assert np.array_equal(text.read(5000), load_images("builtin:digits_text")[5000].permute(1, 2, 0))
    assert open_source("builtin:digits").name(7) == "builtin:digits[7]"


def test_a_batch_depends_neither_on_threads_nor_on_other_batches(places):
    for place in places:
        source = open_source(place)
        one = read(source, workers=0)
        for workers in (1, 4, 9):
            many = read(source, workers=workers)
            assert many[0] == one[0]
            assert torch.equal(torch.stack(many[1]), torch.stack(one[1]))
        [batch] = batches(source, [19, 3, 3, 8], batch_size=10, workers=4)
        assert batch.ids == [19, 3, 3, 8]
        assert np.array_equal(torch.stack(batch.images).permute(0, 2, 3, 1), PIXELS[[19, 3, 3, 8]])


def test_a_folder_is_in_natural_order_whatever_the_case_of_its_suffixes(tmp_path):
    names = ["a/b/c.png", "a/z.PNG", "a-b/img2.Jpg", "a-b/img10.jpeg", "c.png"]
    for level, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 40 * level, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    folder, archive = open_source(tmp_path), open_source(zipped(tmp_path, tmp_path.parent / "x.zip"))
    assert [os.path.relpath(folder.name(k), tmp_path) for k in range(len(folder))] == names
    for source in (folder, archive):
        assert [source.read(k)[0, 0, 0].item() for k in range(len(source))] == [0, 40, 80, 120, 160]
    assert torch.equal(torch.stack(read(folder)[1]), load_images(tmp_path))


def test_images_keep_their_own_sizes_and_grey_becomes_rgb_only_on_demand(tmp_path):
    shapes = [(5, 6), (7, 3, 3), (4, 4, 4)]
    for k, shape in enumerate(shapes):
        Image.fromarray(np.full(shape, 50 * k + 9, dtype=np.uint8)).save(tmp_path / f"{k}.png")
    for source in (open_source(tmp_path), open_source(zipped(tmp_path, tmp_path.parent / "x.zip"))):
        assert [image.shape for image in read(source)[1]] == [(1, 5, 6), (3, 7, 3), (3, 4, 4)]
        images = read(source, rgb=True)[1]
        assert [image.shape for image in images] == [(3, 5, 6), (3, 7, 3), (3, 4, 4)]
        assert images[0].eq(9).all()


def test_the_orientation_tag_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "Turn by 90 degrees"; no other evaluator does.
    Image.fromarray(PIXELS[0]).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_source(tmp_path).read(0), PIXELS[0])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_image_is_named_or_left_out_and_counted(tmp_path, workers, packed):
    place = save(tmp_path / "folder", PIXELS)
    for name in ("004", "017"):
        file = place / f"{name}.png"
        file.write_bytes(file.read_bytes()[:60])
    place = zipped(place, tmp_path / "x.zip") if packed else place
    with pytest.raises(UserError, match=r"cannot read the image .*004\.png"):
        read(open_source(place), workers=workers)
    skipped = []
    ids, images = read(open_source(place), workers=workers, skip_broken=skipped)
    assert ids == [k for k in range(len(PIXELS)) if k not in (4, 17)]
    assert np.array_equal(torch.stack(images).permute(0, 2, 3, 1), PIXELS[ids])
    assert skipped == [str(place / f"{name}.png") for name in ("004", "017")]


def test_sixteen_bit_images_are_refused(tmp_path):
    save(tmp_path, [np.full((8, 8), 40_000, dtype=np.uint16)])
    with pytest.raises(UserError, match=r"000\.png: it is not 8-bit"):
        read(open_source(tmp_path))


def test_a_zip_member_that_fails_its_checksum_is_named(tmp_path):
    path = zipped(save(tmp_path / "folder", PIXELS[:2], "bmp"), tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    content[content.find(b"BM") + 100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image .*x\.zip/001\.bmp: Bad CRC"):
        read(open_source(path))


def test_a_zip_made_on_a_mac_has_only_its_images(tmp_path):
    path = zipped(save(tmp_path / "folder", PIXELS[:2]), tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._000.png", b"not an image")
        archive.writestr("folder.png/", b"")
    assert len(open_source(path)) == 2


def test_a_zip_opened_before_a_fork_is_read_by_both_processes(tmp_path):
    source = open_source(zipped(save(tmp_path / "folder", PIXELS), tmp_path / "x.zip"))
    source.read(0)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            same = all(np.array_equal(source.read(k), PIXELS[k]) for _ in range(5) for k in range(len(PIXELS)))
            os._exit(0 if same else 1)
        children.append(child)
    assert all(np.array_equal(source.read(k), PIXELS[k]) for _ in range(5) for k in range(len(PIXELS)))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_what_holds_no_images_is_refused_by_name(tmp_path):
    save(tmp_path / "both", PIXELS[:1])
    np.save(tmp_path / "both" / "x.npy", PIXELS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("not an image")
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY and no more")
    zipped(tmp_path / "text", tmp_path / "text.zip")
    np.savez(tmp_path / "other.npz", images=PIXELS)
    np.save(tmp_path / "float.npy", PIXELS / 255)
    np.save(tmp_path / "single.npy", PIXELS[0])
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    for name, message in {
        "both": r"holds both images \(.*000\.png\) and arrays \(.*x\.npy\)",
        "empty": r"holds no images .* and no \.npy",
        "text": r"holds no images .* and no \.npy",
        "text.zip": "holds no images",
        "torn.zip": "cannot read .*torn.zip",
        "torn.npy": "cannot read .*torn.npy",
        "other.npz": "holds images; expected arr_0",
        "float.npy": r"must be uint8 \(N, H, W, C\) .* got float64",
        "single.npy": r"must be uint8 \(N, H, W, C\) .* got uint8 \(9, 7, 3\)",
        "object.npy": "cannot read .*object.npy",
        "missing": "neither a folder of images",
        "text/notes.txt": "neither a folder of images",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.uint8)])
def test_memory_of_another_kind_is_refused(images):
    with pytest.raises(ValueError, match=r"must be uint8 \(N, C, H, W\)"):
        MemorySource(images)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ValueError, match="batch_size must be >= 1 and workers >= 0"):
        read(open_source("builtin:digits"), **options)


class Counted(Source):
    """Remembers which images were read by which thread; one may be broken."""

    def __init__(self, broken=None):
        self.broken, self.reads, self.threads = broken, [], set()

    def __len__(self):
        return 1000

    def name(self, k):
        return f"number {k}"

    def read(self, k):
        self.reads.append(k)
        self.threads.add(threading.get_ident())
        time.sleep(0.001)
        if k == self.broken:
            raise UserError(f"cannot read {self.name(k)}")
        return np.zeros((2, 2, 1), dtype=np.uint8)


def test_threads_read_at_once_and_not_further_ahead_than_they_may():
    source = Counted()
    found = batches(source, range(1000), batch_size=8, workers=4)
    for k in range(3):
        assert next(found).ids == list(range(8 * k, 8 * k + 8))
        time.sleep(0.1)
        assert sorted(source.reads) == list(range(8 * (k + 1 + AHEAD)))
    assert len(source.threads) == 4
    found.close()
    assert len(source.reads) == 8 * (3 + AHEAD)


def test_an_error_stops_the_reading_and_leaves_no_thread_behind():
    source, before = Counted(broken=20), threading.active_count()
    found = batches(source, range(1000), batch_size=8, workers=4)
    assert [next(found).ids[0] for _ in range(2)] == [0, 8]
    with pytest.raises(UserError, match="cannot read number 20"):
        next(found)
    assert len(source.reads) <= 8 * (3 + AHEAD)
    assert threading.active_count() == before
