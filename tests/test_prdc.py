"""Neighbour metrics against other implementations, copies and ties, and their errors against repetition."""

import pytest
import torch
from prdc import compute_prdc
from torch_fidelity.metric_prc import calculate_precision_recall_full

from stepdistill.errors import UserError
from stepdistill.metrics.jackknife import groups
from stepdistill.metrics.prdc import prdc

NAMES = ("precision", "recall", "density", "coverage")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(result):
    return [result.precision.value, result.recall.value, result.density.value, result.coverage.value]


def errors(result):
    return [result.precision.se, result.recall.se, result.density.se, result.coverage.se]


@pytest.mark.parametrize("k", [3, 5])
def test_random_features_agree_with_prdc(k):
    generated, reference = random(150, 6) * 0.8 + 0.2, random(180, 6, seed=1)
    theirs = compute_prdc(reference.numpy(), generated.numpy(), k)
    expected = [theirs[name] for name in NAMES]
    assert min(expected) > 0.2
    assert values(prdc(generated, reference, k=k, closed=False)) == pytest.approx(expected, rel=1e-12)


def test_random_features_agree_with_torch_fidelity():
    generated, reference = random(150, 6) * 0.8 + 0.2, random(180, 6, seed=1)
    theirs = calculate_precision_recall_full(generated, reference, neighborhood=3)
    # Theirs are means of float32 indicators.
    assert values(prdc(generated, reference, k=3, closed=True))[:2] == pytest.approx(theirs, rel=1e-6)


def test_a_set_covers_itself_and_a_distant_one_not_at_all():
    a = random(60, 4)
    same = prdc(a, a, k=3, closed=True)
    # Closed balls of k neighbours hold k + 1 samples of the set.
    assert values(same) == pytest.approx([1, 1, 4 / 3, 1])
    assert values(prdc(a, a, k=3, closed=False)) == pytest.approx([1, 1, 1, 1])
    assert values(prdc(a + 100, a, k=3, closed=True)) == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_are_inside_closed_balls_of_no_radius_and_outside_open_ones(scale, dtype):
    distinct = (random(15, 40) + 20).to(dtype) * scale
    copies = distinct.repeat(6, 1)
    for block in (32, 256):
        assert values(prdc(copies, copies.flip(0), k=3, closed=True, block=block)) == pytest.approx([1, 1, 2, 1])
        assert values(prdc(copies, copies.flip(0), k=3, closed=False, block=block)) == [0, 0, 0, 0]


def test_ties_on_a_lattice_do_not_depend_on_order_or_block():
    lattice = torch.cartesian_prod(*[torch.arange(5.0)] * 3)
    for closed in (True, False):
        expected = values(prdc(lattice, lattice + 0.5, k=3, closed=closed))
        # Shifting both by an irrational number moves every rounding, and no distance.
        moved = prdc(lattice.flip(0) + 0.1234567, lattice.double() + 0.5 + 0.1234567, k=3, closed=closed, block=17)
        assert values(moved) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("block", [3, 19, 500])
def test_block_does_not_matter(block):
    generated, reference = random(70, 6) * 0.7, random(80, 6, seed=1)
    whole, blocked = (
        prdc(generated, reference, k=5, closed=False),
        prdc(generated, reference, k=5, closed=False, block=block),
    )
    assert values(blocked) == pytest.approx(values(whole), rel=1e-9)
    assert errors(blocked) == pytest.approx(errors(whole), rel=1e-9)


def test_the_errors_are_those_of_measuring_again_without_each_group_of_either_side():
    generated, reference = random(60, 3) * 0.8, random(70, 3, seed=1)

    def without(features, members):
        keep = torch.ones(len(features), dtype=torch.bool)
        keep[members] = False
        return features[keep]

    def again(one, two):
        theirs = compute_prdc(two.numpy(), one.numpy(), 3)
        return [theirs[name] for name in NAMES]

    def variance(parts):
        parts = torch.tensor(parts, dtype=torch.float64)
        return (len(parts) - 1) / len(parts) * (parts - parts.mean(0)).square().sum(0)

    one = variance([again(without(generated, members), reference) for members in groups(60)])
    two = variance([again(generated, without(reference, members)) for members in groups(70)])
    assert errors(prdc(generated, reference, k=3, closed=False)) == pytest.approx((one + two).sqrt().tolist(), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(100, 100), (200, 60)])
def test_the_errors_are_between_the_spread_over_new_samples_on_both_sides_and_twice_that(m, n):
    results = [
        prdc(random(m, 4, seed=2 * k) * 0.7 + 0.4, random(n, 4, seed=2 * k + 1), k=3, closed=False, block=200)
        for k in range(60)
    ]
    spread = torch.tensor([values(result) for result in results]).std(0)
    error = torch.tensor([errors(result) for result in results]).square().mean(0).sqrt()
    # 1.0 to 2 is what the docstring promises; 60 repeats know the spread to 9 %.
    assert ((error / spread > 0.9) & (error / spread < 2.2)).all(), error / spread


@pytest.mark.parametrize(
    ("m", "n", "d", "scale", "shift", "least"),
    [
        (100, 100, 4, 0.7, 0.4, 0.86),
        (60, 200, 4, 0.7, 0.4, 0.86),
        (200, 60, 4, 0.7, 0.4, 0.86),
        (100, 100, 2, 1.0, 0.0, 0.86),
        (100, 100, 4, 0.7, 1.5, 0.74),
    ],
)
def test_two_errors_cover_the_value_that_is_expected_of_so_many_samples(m, n, d, scale, shift, least):
    repeats = 100
    results = [
        prdc(random(m, d, seed=2 * k) * scale + shift, random(n, d, seed=2 * k + 1), k=3, closed=False, block=200)
        for k in range(repeats)
    ]
    found = torch.tensor([values(result) for result in results])
    within = (found - found.mean(0)).abs() <= 2 * torch.tensor([errors(result) for result in results])
    # The least that the docstring promises, less three standard deviations of 100 repeats.
    assert (within.double().mean(0) >= least).all(), within.double().mean(0)


def test_too_few_samples_for_the_neighbours_are_refused():
    a = random(20, 3)
    assert prdc(a, a, k=17, closed=False).precision.n == 20
    for k in (0, 18):
        with pytest.raises(UserError, match=f"got k = {k}"):
            prdc(a, a, k=k, closed=False)
    with pytest.raises(UserError, match="at least 20 reference features are needed, got 19"):
        prdc(a, a[1:], k=3, closed=False)
