"""Checkpoints are whole or not there."""

import errno

import pytest
from accelerate import Accelerator

from stepdistill.checkpoints import Checkpoints
from stepdistill.errors import UserError

IDENTITY = {"method": {"name": "sid"}, "seed": 0}


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", IDENTITY, kept=2)


def save(store, step, content=b"weights"):
    return store.save(step, Accelerator(cpu=True), lambda folder: (folder / "model.bin").write_bytes(content))


def test_newest_is_found_with_its_step_and_old_ones_go(store):
    for step in (1, 2, 10):
        save(store, step)
    assert [path.name for path in store.all()] == ["step_00000002", "step_00000010"]
    assert store.newest() == (store.folder / "step_00000010", 10)


def test_full_disk_leaves_the_older_checkpoint_and_no_debris(store):
    save(store, 1)

    def write(folder):
        (folder / "model.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*step_00000001.*resume=true"):
        store.save(2, Accelerator(cpu=True), write)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
    assert store.newest()[1] == 1


def test_full_disk_while_the_manifest_is_written_is_the_same(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(
        Checkpoints, "_finish", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    with pytest.raises(UserError, match=r"No space left.*step_00000001"):
        save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]


def test_empty_folder_cannot_be_resumed(store):
    with pytest.raises(UserError, match="no checkpoint"):
        store.newest()


def test_truncated_checkpoint_cannot_be_resumed(store):
    (save(store, 1) / "model.bin").write_bytes(b"w")
    with pytest.raises(UserError, match=r"model\.bin is missing or truncated"):
        store.newest()


def test_checkpoint_without_manifest_cannot_be_resumed(store):
    (save(store, 1) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        store.newest()


def test_foreign_checkpoint_names_what_differs(store):
    save(store, 1)
    store.identity = {"method": {"name": "boot"}, "seed": 0}
    with pytest.raises(UserError, match=r"another run: method was .*'sid'.* is .*'boot'"):
        store.newest()


def test_unfinished_folder_of_a_killed_run_is_not_a_checkpoint(store):
    save(store, 1)
    (store.folder / "step_00000002.tmp").mkdir()
    assert store.newest()[1] == 1
