"""The groups of the jackknife, and that none of the metrics needs scipy."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import stepdistill.metrics
from stepdistill.metrics.cmmd import cmmd
from stepdistill.metrics.frechet import Reference, moments_of
from stepdistill.metrics.inception_score import inception_score, inception_score_splits
from stepdistill.metrics.influence import paired_difference
from stepdistill.metrics.jackknife import GROUPS, groups, jackknife
from stepdistill.metrics.kid import kid, kid_subsets
from stepdistill.metrics.prdc import prdc
from stepdistill.metrics.vendi import per_prompt_diversity, vendi


@pytest.mark.parametrize("n", [20, 1000, 1007])
def test_every_sample_is_in_one_group_and_groups_are_as_long_as_each_other(n):
    members = groups(n)
    assert torch.cat(members).sort().values.tolist() == list(range(n))
    assert len(members) == GROUPS
    assert max(map(len, members)) - min(map(len, members)) <= 1


@pytest.mark.parametrize("classes", [2, 5, 10, 20, 100, 1000])
def test_labels_dealt_out_in_turn_are_spread_over_all_groups(classes):
    n = 200_000
    counts = torch.stack([torch.bincount(members % classes, minlength=classes) for members in groups(n)]).double()
    # Pearson's chi-square over its degrees of freedom: 1 for independent draws, thousands where groups are classes.
    expected = n / classes / GROUPS
    assert ((counts - expected).square() / expected).sum() / ((GROUPS - 1) * classes) < 1.5


def test_the_jackknife_of_a_mean_is_its_textbook_error_and_takes_the_bias_off_a_square():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = torch.stack([(x.sum() - x[mine].sum()) / 900 for mine in groups(1000)])
    means = torch.stack([x[mine].mean() for mine in groups(1000)])
    result = jackknife(x.mean().item(), parts.tolist())
    assert result.se == pytest.approx(means.std().item() / GROUPS**0.5)
    assert result.debiased == pytest.approx(x.mean().item())
    square = jackknife(x.mean().square().item(), parts.square().tolist())
    assert square.debiased == pytest.approx((x.mean().square() - means.var() / GROUPS).item())


def test_the_library_imports_no_scipy():
    for path in Path(stepdistill.metrics.__file__).parent.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "scipy" not in {name.partition(".")[0] for name in names}, path


def test_every_number_comes_out_where_scipy_cannot_be_imported(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"] + ["scipy"]:
        monkeypatch.setitem(sys.modules, name, None)
    a, b = (torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    shares = prdc(a, b, k=3, closed=True)
    measured = [
        *(kid(a, b), kid_subsets(a, b, subsets=2, size=10), cmmd(a, b), vendi(a), inception_score(a)),
        *(inception_score_splits(a.split(10)), per_prompt_diversity(a, torch.arange(30) // 3)),
        *(shares.precision, shares.recall, shares.density, shares.coverage),
        paired_difference(a, b, Reference(moments_of(b))),
    ]
    assert torch.tensor([value.value for value in measured]).isfinite().all()
