"""Networks see so many images at once, on one thread: their features are the same bits however the images come."""

import pytest
import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.metrics.base import Features
from stepdistill.metrics.collecting import reader
from stepdistill.metrics.showing import Network, at_once, shown
from stepdistill.metrics.sources import Batch, MemorySource

CPU = torch.device("cpu")
IMAGES = torch.randint(256, (61, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    """Products of float32 whose last bits tell one, two and seven rows apart, and one thread from two."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 512), nn.GELU(), nn.Linear(512, 64)).requires_grad_(False)
    return Network("products", 64, (), lambda images, ids: Features(layers(images / 255)), "")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seen(network, *, images=IMAGES, batch_size=16, workers=0):
    stream = reader(MemorySource(images), batch_size=batch_size, workers=workers, skip_broken=None)
    found = list(shown(stream, range(len(images)), [network], CPU))
    assert [k for ids, _ in found for k in ids] == list(range(len(images)))
    return torch.cat([features[network].features for _, features in found])


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 2), (7, 0), (61, 3)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_features_are_the_same_bits_in_any_batch_on_any_number_of_threads(network, threads, batch_size, workers, count):
    expected = seen(network)
    threads(count)
    assert torch.equal(seen(network, batch_size=batch_size, workers=workers), expected)
    assert torch.get_num_threads() == count


def test_an_image_has_the_same_features_beside_any_others(network):
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    assert torch.equal(seen(network, images=IMAGES[order]), seen(network)[order])


def test_a_network_sees_so_many_images_the_last_few_with_repeats_under_their_own_ids():
    calls = []

    def see(images, ids):
        calls.append((ids, images[:, 0, 0, 0].tolist(), torch.get_num_threads()))
        return Features(images[:, :, 0, 0].double(), images[:, :1, 0, 0])

    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    told = Network("first pixel", 3, (), see, "")
    [(ids, found)] = shown(lambda ids: [Batch(list(ids), list(pixels))], range(10, 16), [told], CPU)
    assert at_once(CPU) == 4
    assert sorted(calls) == [([10, 11, 12, 13], [0, 1, 2, 3], 1), ([14, 15, 15, 15], [4, 5, 5, 5], 1)]
    assert ids == list(range(10, 16))
    assert torch.equal(found[told].features, torch.arange(6.0).double()[:, None].expand(-1, 3))
    logits = found[told].logits
    assert logits is not None
    assert torch.equal(logits, torch.arange(6, dtype=torch.uint8)[:, None])


def test_precision_is_that_of_the_process_before_and_after(network):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        expected = seen(network)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(seen(network), expected)


@pytest.mark.parametrize("sizes", [(8, 9), (8, 8, 8, 8, 9)])
def test_images_of_two_sizes_are_refused_wherever_the_second_comes(sizes):
    images = [torch.zeros(3, size, 16, dtype=torch.uint8) for size in sizes]
    batches = [Batch([k], [image]) for k, image in enumerate(images)]
    told = Network("none", 1, (), lambda images, ids: Features(torch.zeros(len(ids), 1)), "")
    with pytest.raises(UserError, match=r"one width x height x channels after \[\], got 16x8x3, 16x9x3"):
        list(shown(lambda ids: batches, range(len(images)), [told], CPU))
