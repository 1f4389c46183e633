"""The feature store: what comes back, what resumes, and what damage or another run does to it."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from processes import in_processes
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.metrics.base import Features
from stepdistill.metrics.collecting import Network, collect
from stepdistill.metrics.sources import Batch
from stepdistill.metrics.store import MANIFEST, FeatureStore, Manifest, read_manifest

MADE = Manifest(protocol="a1b2", made_by="student, 1 step", dimension=4, shard_size=10)


def rows(ids, width=4):
    """Features that tell the id of their sample, exact in float16."""
    return torch.arange(ids.start, ids.stop)[:, None].expand(-1, width) + torch.arange(width) / 8


def filled(folder, *ranges, manifest=MADE):
    store = FeatureStore(folder, manifest)
    for ids in ranges:
        store.write(ids.start, Features(rows(ids)))
    return store


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_was_written_comes_back_in_the_order_of_ids(tmp_path, dtype):
    manifest = replace(MADE, dtype=dtype, classes=3)
    store = FeatureStore(tmp_path / "new" / "folder", manifest)
    for ids in (range(20, 25), range(10), range(10, 20)):
        store.write(ids.start, Features(rows(ids), rows(ids, 3).double() / 3))
    again = FeatureStore(tmp_path / "new" / "folder", manifest)
    assert [ids for ids, _ in again.shards()] == [range(10), range(10, 20), range(20, 25)]
    assert {part.features.dtype for _, part in again.shards()} == {getattr(torch, dtype)}
    read = again.read(range(8, 23))
    assert read.features.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert read.logits is not None
    torch.testing.assert_close(read.features.double(), rows(range(8, 23)).double())
    exact = rows(range(8, 23), 3).double() / 3
    rtol = {"float16": 1e-3, "float32": 1e-6, "float64": 0}[dtype]
    torch.testing.assert_close(read.logits.double(), exact, atol=0, rtol=rtol)
    assert read_manifest(tmp_path / "new" / "folder") == manifest


def test_ranks_share_out_what_is_missing_and_a_longer_run_goes_on(tmp_path):
    store = filled(tmp_path, range(10), range(20, 24))
    assert store.done() == [range(10), range(20, 24)]
    assert store.missing(range(35)) == [range(10, 20), range(24, 30), range(30, 35)]
    assert store.missing(range(3, 8)) == store.missing(range(22, 24)) == store.missing(range(5, 5)) == []
    ranks = [(FeatureStore(tmp_path, MADE), FeatureStore(tmp_path, MADE).missing(range(35))[k::2]) for k in range(2)]
    for rank, left in ranks:
        for ids in left:
            rank.write(ids.start, Features(rows(ids)))
    assert store.done() == [range(35)]
    torch.testing.assert_close(store.read(range(35)).features, rows(range(35)))


def test_missing_samples_are_named(tmp_path):
    store = filled(tmp_path, range(10), range(20, 24))
    with pytest.raises(UserError, match=r"lacks features of \[10, 20\), \[24, 26\)"):
        store.read(range(5, 26))


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "ffff"},
        {"dimension": 5},
        {"made_by": "teacher"},
        {"classes": 2},
        {"dtype": "float32"},
        {"shard_size": 9},
    ],
)
def test_a_store_of_something_else_is_not_reopened(tmp_path, change):
    filled(tmp_path, range(10))
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"holds features with {name} .* and this run makes {value!r}"):
        FeatureStore(tmp_path, replace(MADE, **change))
    assert FeatureStore(tmp_path, MADE).done() == [range(10)]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    store = filled(tmp_path, range(10), range(10, 20))
    shard = tmp_path / "000000010-000000020.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    for use in (store.done, lambda: list(store.shards()), lambda: store.read(range(10))):
        with pytest.raises(UserError, match=r"000000010-000000020.safetensors is damaged .*; delete it"):
            use()
    shard.unlink()
    assert store.missing(range(20)) == [range(10, 20)]


def test_a_shard_of_another_store_or_under_another_name_is_named(tmp_path):
    store = filled(tmp_path / "here", range(10))
    other = filled(tmp_path / "there", range(10, 20), manifest=replace(MADE, protocol="ffff"))
    foreign = next(other.folder.glob("*.safetensors")).rename(store.folder / "000000010-000000020.safetensors")
    with pytest.raises(UserError, match=r"000000010-000000020.safetensors is of another store"):
        store.done()
    foreign.unlink()
    mine = store.folder / "000000000-000000010.safetensors"
    moved = mine.rename(store.folder / "000000000-000000009.safetensors")
    with pytest.raises(UserError, match=r"000000000-000000009.safetensors is of another store, or renamed"):
        store.done()
    moved.rename(mine)
    save_file({"x": torch.zeros(1)}, store.folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights.safetensors is no shard of this store"):
        store.done()


def test_shards_of_the_same_samples_are_named(tmp_path):
    store = filled(tmp_path / "here", range(10))
    twin = filled(tmp_path / "there", range(5, 10))
    next(twin.folder.glob("*.safetensors")).rename(store.folder / "000000005-000000010.safetensors")
    with pytest.raises(UserError, match="hold the same samples"):
        store.done()


def test_a_full_disk_leaves_no_half_shard_and_keeps_what_was_there(tmp_path):
    manifest = replace(MADE, shard_size=10_000)
    store = filled(tmp_path, range(10), manifest=manifest)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Writes beyond fail with OSError, as on a full disk.
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*000000010-000005000.safetensors: .*mend that and run again"
        ):
            store.write(10, Features(rows(range(10, 5000)) / 4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert store.done() == [range(10)]
    store.write(10, Features(rows(range(10, 5000)) / 4096))
    assert store.done() == [range(5000)]


def test_a_write_that_was_killed_is_not_there_and_its_leftover_is_replaced(tmp_path):
    store = filled(tmp_path, range(10))
    (tmp_path / "000000010-000000020.safetensors.tmp").write_bytes(b"half")
    assert store.missing(range(20)) == [range(10, 20)]
    store.write(10, Features(rows(range(10, 20))))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


@pytest.mark.parametrize(
    ("first_id", "features", "problem"),
    [
        (5, Features(torch.zeros(6, 4)), r"ids within one multiple of 10, got \[5, 11\)"),
        (-5, Features(torch.zeros(5, 4)), r"got \[-5, 0\)"),
        (10, Features(torch.zeros(0, 4)), r"got \[10, 10\)"),
        (3, Features(torch.zeros(2, 4)), r"holds samples of \[3, 5\) already"),
        (10, Features(torch.zeros(2, 5)), r"expected features of shape \(2, 4\), got \(2, 5\)"),
        (10, Features(torch.zeros(2, 4), torch.zeros(2, 3)), r"expected logits of shape None, got \(2, 3\)"),
        (10, Features(torch.full((2, 4), 1e5)), "features in float16 must be finite; 2 are not, first row 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path, first_id, features, problem):
    store = filled(tmp_path, range(10))
    with pytest.raises(UserError, match=problem):
        store.write(first_id, features)
    assert store.done() == [range(10)]


def test_logits_that_were_promised_must_come(tmp_path):
    store = FeatureStore(tmp_path, replace(MADE, classes=3))
    for logits in (None, torch.zeros(1, 3)):
        with pytest.raises(UserError, match=r"expected logits of shape \(2, 3\)"):
            store.write(0, Features(torch.zeros(2, 4), logits))


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no feature store: cannot read"):
        read_manifest(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=f"holds shards and no {MANIFEST}"):
        FeatureStore(tmp_path, MADE)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is no feature store: cannot read"):
        FeatureStore(tmp_path, MADE)
    (tmp_path / MANIFEST).write_text(json.dumps({"protocol": "a1b2"}))
    with pytest.raises(UserError, match="is not of a feature store: expected classes, dimension"):
        FeatureStore(tmp_path, MADE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        FeatureStore(tmp_path / "file" / "folder", MADE)
    with pytest.raises(UserError, match="positive sizes and dtype float16 or float32 or float64"):
        FeatureStore(tmp_path / "other", replace(MADE, dimension=0))


@pytest.mark.parametrize("world", [1, 2])
def test_each_store_of_a_run_is_given_what_it_lacks_and_no_sample_is_made_twice(tmp_path, world):
    def see(images, ids):
        return Features(torch.tensor(ids)[:, None] + torch.arange(4) / 8)

    networks = {metric: Network(metric, 4, (), see, "") for metric in ("fid", "kid")}
    filled(tmp_path / "fid", range(10), range(20, 24))
    filled(tmp_path / "kid", range(3, 10), range(10, 20), range(20, 22))

    def run():
        shown = []

        def stream(ids):
            shown.extend(ids)
            yield Batch(list(ids), [torch.zeros(3, 2, 2, dtype=torch.uint8) for _ in ids])

        device, store = torch.device("cpu"), lambda network: FeatureStore(tmp_path / network.name, MADE)
        found = collect(stream, 33, networks, device=device, store=store)
        kept = found["kid"].features
        assert kept is not None
        return shown, kept[:].tolist(), found["fid"].sums.sum.sum(0).tolist()

    parts = in_processes(world, run)
    assert sorted(k for shown, _, _ in parts for k in shown) == [*range(3), *range(10, 20), *range(22, 33)]
    for _, kept, total in parts:
        assert kept == rows(range(33)).tolist()
        assert total == rows(range(33)).sum(0).tolist()
    assert all(FeatureStore(tmp_path / name, MADE).done() == [range(33)] for name in networks)
