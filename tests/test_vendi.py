"""Diversity against closed forms, the definition over pairs, and repetition."""

import math

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.metrics.vendi import per_prompt_diversity, vendi


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_scores(results, truth):
    measured = torch.tensor([[result.debiased, result.se] for result in results], dtype=torch.float64)
    return (measured[:, 0] - truth) / measured[:, 1]


@pytest.mark.parametrize("q", [0.3, 1.0, 2.0, math.inf])
def test_orthogonal_kinds_are_counted(q):
    kinds = torch.linalg.qr(random(8, 8)).Q[:5]
    assert vendi(kinds.repeat(6, 1) * 3, q=q).value == pytest.approx(5, rel=1e-9)
    assert vendi(kinds[:1].repeat(30, 1), q=q).value == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("q", "expected"),
    [(0.5, (0.8**0.5 + 0.2**0.5) ** 2), (1.0, 0.8**-0.8 * 0.2**-0.2), (2.0, 1 / 0.68), (math.inf, 1.25)],
)
def test_two_uneven_kinds_have_the_entropy_of_their_shares(q, expected):
    features = torch.eye(2)[[0] * 40 + [1] * 10]
    assert vendi(features, q=q).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [30, 90])
@pytest.mark.parametrize("q", [1.0, 3.0])
def test_the_small_matrix_gives_what_the_matrix_of_cosines_gives(n, q):
    features = random(n, 40).exp()
    u = features / features.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(u @ u.T / n).clamp_min(0)
    entropy = torch.special.entr(eigenvalues).sum() if q == 1 else eigenvalues.pow(q).sum().log() / (1 - q)
    assert vendi(features, q=q).value == pytest.approx(entropy.exp().item(), rel=1e-9)


def test_order_and_length_do_not_matter():
    features = random(70, 6) + 0.5
    other = vendi((features * (1 + torch.rand(70, 1))).flip(0))
    assert other.value == pytest.approx(vendi(features).value, rel=1e-9)


def test_two_errors_around_the_debiased_score_cover_the_truth():
    share = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    truth = math.exp(torch.special.entr(share).sum())
    kinds = torch.linalg.qr(random(4, 4)).Q
    generator = torch.Generator().manual_seed(1)
    results = [vendi(kinds[torch.multinomial(share, 400, True, generator=generator)]) for _ in range(200)]
    z = z_scores(results, truth)
    # Ten groups make a t of nine degrees: 92 % within two errors, 184 of 200; 4 standard deviations below is 169.
    assert (z.abs() < 2).sum() >= 169
    bias = torch.tensor([[result.value, result.debiased] for result in results]).mean(0) - truth
    assert bias[1].abs() < bias[0].abs()


@pytest.mark.parametrize("q", [0.0, -1.0, math.nan])
def test_an_order_that_is_not_above_zero_is_refused(q):
    with pytest.raises(UserError, match="must be above 0"):
        vendi(random(30, 2), q=q)


def test_per_prompt_diversity_is_the_mean_over_all_pairs_of_a_prompt():
    features, prompts = random(11, 5), torch.tensor([7, 3, 7, 3, 9, 7, 9, 9, 3, 9, 7])
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    means = []
    for prompt in (3, 7, 9):
        mine = (prompts == prompt).nonzero()[:, 0]
        means.append(torch.stack([1 - cosine[i, j] for i in mine for j in mine if i < j]).mean())
    result = per_prompt_diversity(features, prompts)
    assert result.value == pytest.approx(torch.stack(means).mean().item(), rel=1e-12)
    assert result.se == pytest.approx(torch.stack(means).std().item() / 3**0.5, rel=1e-12)
    assert result.n == 11


def test_copies_of_an_image_have_no_diversity_and_opposites_the_most():
    ids = torch.tensor([0, 0, 1, 1])
    assert per_prompt_diversity(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), ids[:2]).value == pytest.approx(0, abs=1e-15)
    assert per_prompt_diversity(torch.tensor([[1.0], [-3.0], [2.0], [-1.0]]), ids).value == pytest.approx(2)


def test_two_errors_cover_the_true_diversity_of_prompts():
    # Seeds around a direction of their prompt at random angles: E cos of two is the square of E cos of one.
    ids = torch.arange(60).repeat_interleave(4)
    generator = torch.Generator().manual_seed(2)
    truth, results = 1 - math.sin(1) ** 2, []
    for _ in range(200):
        angle = (torch.rand(60, generator=generator) * 6.28).repeat_interleave(4) + torch.rand(
            240, generator=generator
        ) * 2
        results.append(per_prompt_diversity(torch.stack([angle.cos(), angle.sin()], 1), ids))
    measured = torch.tensor([[result.value, result.se] for result in results])
    assert ((measured[:, 0] - truth).abs() < 2 * measured[:, 1]).sum() >= 179


def test_a_prompt_of_one_image_and_missing_ids_are_refused():
    with pytest.raises(UserError, match="got 1 of prompt 5"):
        per_prompt_diversity(random(3, 2), torch.tensor([1, 1, 5]))
    with pytest.raises(UserError, match=r"expected one prompt id a sample, 3, got shape \(2,\)"):
        per_prompt_diversity(random(3, 2), torch.tensor([1, 1]))
