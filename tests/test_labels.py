"""Labels of samples: each law of protocols in its own words."""

import pytest
import torch

from stepdistill.conditions import in_turn
from stepdistill.labels import followed, turns
from stepdistill.sample import tracing
from stepdistill.sampling import Sampling

SHAPE = (3, 4, 4)


def test_a_random_class_is_drawn_after_the_noise_by_the_samples_own_generator():
    found = turns("random", SHAPE)(range(500), 10)
    for k in (0, 7, 499):
        generator = torch.Generator().manual_seed(k)
        torch.randn(SHAPE, generator=generator)
        assert found[k] == int(torch.randint(10, (), generator=generator))
    assert turns("random", SHAPE)([499, 7], 10) == [found[499], found[7]]
    counts = torch.bincount(torch.tensor(found), minlength=10)
    assert ((counts - 50.0).square() / 50).sum() < 27.9  # The 99.9th percentile of chi squared, 9 degrees of freedom.
    assert counts.unique().numel() > 1


def test_stratified_rows_hold_every_class_once_in_orders_of_their_own():
    found = turns("stratified", SHAPE)(range(70), 10)
    rows = [tuple(found[k : k + 10]) for k in range(0, 70, 10)]
    assert all(sorted(row) == list(range(10)) for row in rows)
    assert len(set(rows)) == 7
    assert turns("stratified", SHAPE)([33, 12], 10) == [found[33], found[12]]


@pytest.mark.parametrize("law", ["balanced", "stratified", "prompts"])
def test_a_repeat_has_the_labels_of_the_first_and_random_ones_are_drawn_anew(law):
    asked = turns(law, SHAPE, period=30)
    assert asked(range(30, 60), 10) == asked(range(30), 10)
    drawn = turns("random", SHAPE, period=30)
    assert drawn(range(30, 60), 10) != drawn(range(30), 10)


def test_samples_are_balanced_where_nothing_is_said():
    assert turns("balanced", SHAPE)(range(25), 10) == in_turn(range(25), 10)


def test_a_pipeline_follows_what_it_can():
    assert [followed("classes", law) for law in ("random", "stratified", "none", "prompts")] == [
        *("random", "stratified", "balanced", "balanced")
    ]
    assert [followed("none", law) for law in ("random", "none", "prompts")] == ["random", "none", "none"]
    assert {followed("prompts", law) for law in ("random", "none", "prompts")} == {"prompts"}


def test_a_teachers_samples_are_of_the_classes_of_the_law(teachers):
    source = str(teachers("consistency"))
    made = tracing(Sampling(source=source, steps=1, law="random"))
    assert made.told == "classes"
    label = turns("random", (1, 8, 8))([11], 4)[0]
    one = [tracing(Sampling(source=source, steps=1, labels=(k,))).traces([11]) for k in range(4)]
    found = made.traces([11])
    assert [torch.equal(found, image) for image in one] == [k == label for k in range(4)]
