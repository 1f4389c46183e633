"""Arrays read by rows from files of any order and compression, in memory that does not grow with them."""

import os
import tracemalloc

import numpy as np
import pytest

from stepdistill import arrays
from stepdistill.arrays import open_npy, open_npz
from stepdistill.errors import UserError
from stepdistill.metrics.sources import open_source

ROWS = np.random.default_rng(0).integers(0, 256, (23, 5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_are_those_of_numpy_whatever_the_order_and_the_compression(tmp_path, save, order):
    labels = np.arange(23.0) / 7
    save(tmp_path / "x.npz", labels=labels, arr_0=np.asarray(ROWS, order=order))
    np.save(tmp_path / "x.npy", np.asarray(ROWS, order=order))
    for found in (open_npz(tmp_path / "x.npz", "arr_0"), open_npy(tmp_path / "x.npy")):
        assert (len(found), found.shape, found.dtype) == (23, ROWS.shape, ROWS.dtype)
        for rows in (slice(0, 23), slice(7, 8), slice(20, 99), slice(9, 9), slice(9, 2), slice(-2, None)):
            np.testing.assert_array_equal(found[rows], ROWS[rows])
    np.testing.assert_array_equal(open_npz(tmp_path / "x.npz", "labels")[0:23], labels)


def test_a_stored_array_that_fails_its_checksum_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, ROWS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x\.npz: Bad CRC"):
        open_npz(path, "arr_0")


def test_a_file_that_is_cut_is_refused_when_opened_or_read(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, ROWS)
    found = open_npy(path)
    os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(found[0:22], ROWS[:22])
    with pytest.raises(UserError, match=r"cannot read .*x\.npy\[22\]: the file ends"):
        found[22:23]
    with pytest.raises(UserError, match=r"cannot read .*x\.npy: it ends before"):
        open_npy(path)


def test_a_disk_without_room_to_unpack_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    np.savez_compressed(tmp_path / "x.npz", ROWS)
    monkeypatch.setattr(arrays.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"cannot unpack .*x\.npz into .*: No space left on device; point TMPDIR"):
        open_npz(tmp_path / "x.npz", "arr_0")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_archive_are_never_all_in_memory(tmp_path, save):
    images = np.zeros((4000, 32, 32, 3), np.uint8)  # 12 MB
    save(tmp_path / "x.npz", images)
    np.save(tmp_path / "x.npy", images)
    del images
    for name in ("x.npz", "x.npy"):
        tracemalloc.start()
        source = open_source(tmp_path / name)
        for k in range(0, len(source), 100):
            source.read(k)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6  # Buffers of a megabyte, and one image.
