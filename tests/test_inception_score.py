"""The inception score against closed forms, torch-fidelity and repetition."""

import math

import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from stepdistill.errors import UserError
from stepdistill.metrics.inception_score import inception_score, inception_score_splits


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_scores(results, truth):
    measured = torch.tensor([[result.debiased, result.se] for result in results], dtype=torch.float64)
    return (measured[:, 0] - truth) / measured[:, 1]


def sure(labels, classes):
    """Logits of a classifier that gives all its probability to one class."""
    return torch.nn.functional.one_hot(labels, classes).double() * 1000


def test_sure_and_even_is_the_number_of_classes_and_unsure_or_one_class_is_one():
    labels = torch.arange(60)
    assert inception_score(sure(labels % 6, 8)).value == pytest.approx(6)
    assert inception_score(torch.zeros(60, 8)).value == pytest.approx(1)
    assert inception_score(sure(labels * 0, 8)).value == pytest.approx(1)


def test_parts_agree_with_torch_fidelity():
    logits = random(205, 12) * 2
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_score_splits([logits[205 * i // 10 : 205 * (i + 1) // 10] for i in range(10)])
    assert ours.value == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-12)
    spread = torch.tensor(ours.repeats).std(correction=0).item()
    assert spread == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-6)
    assert ours.se == pytest.approx(theirs[KEY_METRIC_ISC_STD] / 3, rel=1e-12)
    assert ours.n == 205


def test_one_part_is_the_whole_set_and_has_no_error():
    logits = random(50, 4)
    one = inception_score_splits([logits])
    assert one.value == pytest.approx(inception_score(logits).value, rel=1e-12)
    assert one.se is None


@pytest.mark.parametrize("block", [1, 13])
def test_block_and_order_do_not_matter(block):
    logits = random(90, 10) * 3
    assert inception_score(logits.flip(0), block=block).value == pytest.approx(inception_score(logits).value, rel=1e-9)


@pytest.mark.parametrize(("n", "known"), [(49, False), (50, True)])
def test_no_debiased_score_below_five_images_a_class(n, known):
    assert (inception_score(random(n, 10)).debiased is not None) == known


def test_labels_dealt_out_in_turn_do_not_inflate_the_error():
    in_turn, drawn = torch.arange(1000) % 10, random(1000).argsort() % 10
    # Deleting a class at a time, as groups of id % 10 would, makes a score of 9 of each part, and 19 of their debiased.
    assert inception_score(sure(in_turn, 10)).debiased == pytest.approx(10, abs=0.2)
    assert inception_score(sure(drawn, 10)).debiased == pytest.approx(10, abs=0.2)


def test_two_errors_around_the_debiased_score_cover_the_truth():
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    truth = math.exp(torch.special.entr(share).sum())
    generator = torch.Generator().manual_seed(0)
    draws = [torch.multinomial(share, 400, replacement=True, generator=generator) for _ in range(200)]
    results = [inception_score(sure(labels, 4)) for labels in draws]
    z = z_scores(results, truth)
    # Ten groups make a t of nine degrees: 92 % within two errors, 184 of 200; 4 standard deviations below is 169.
    assert (z.abs() < 2).sum() >= 169
    bias = torch.tensor([[result.value, result.debiased] for result in results]).mean(0) - truth
    assert bias[1].abs() < bias[0].abs()


def test_two_errors_of_a_mean_over_parts_cover_the_score_of_such_parts():
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def parts(number):
        labels = torch.multinomial(share, number * 40, replacement=True, generator=generator)
        return sure(labels, 4).split(40)

    expected = inception_score_splits(parts(4000)).value
    results = [inception_score_splits(parts(10)) for _ in range(200)]
    errors = torch.tensor([[result.value - expected, result.se] for result in results])
    # As above: 184 of 200 expected, 169 at least; and the error is the spread, which 200 repeats know to 5 %.
    assert (errors[:, 0].abs() < 2 * errors[:, 1]).sum() >= 169
    assert 0.85 < errors[:, 1].square().mean().sqrt() / errors[:, 0].std() < 1.15


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 20 logits are needed, got 19"):
        inception_score(random(19, 3))
    with pytest.raises(UserError, match="at least one part"):
        inception_score_splits([])
    with pytest.raises(UserError, match="at least 1 logits of a part are needed, got 0"):
        inception_score_splits([random(3, 3), random(0, 3)])
