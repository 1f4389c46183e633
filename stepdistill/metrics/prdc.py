"""Fidelity and coverage by nearest neighbours: precision, recall, density, coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .base import Value
from .feature_sets import Rows, blocks, check_comparable
from .jackknife import GROUPS, MIN_SAMPLES, group_of, groups, jackknife


@dataclass(frozen=True)
class PRDC:
    """Each with an error over new samples on both sides, by the jackknife of either.

    Balls change abruptly as samples leave: the errors come out 1.0 to 2 times the spread of repetitions.  Binomial ones
    take the balls as given, and come out down to a third of it.  Two errors cover what is expected of so many samples
    in 94 to 99 of 100 repetitions where the sets overlap, and in 85 where few reference samples lie near the generated.
    """

    precision: Value
    """Share of generated samples within a ball of a reference sample (Kynkaanniemi et al. 2019)."""
    recall: Value
    """Share of reference samples within a ball of a generated sample."""
    density: Value
    """Balls of reference samples around a generated one, over ``k`` (Naeem et al. 2020); not bounded by 1."""
    coverage: Value
    """Share of reference samples with a generated one in their ball."""


def prdc(generated: Rows, reference: Rows, *, k: int, closed: bool, block: int = 1024) -> PRDC:
    """The four shares; a sample's ball reaches to its ``k``-th nearest other sample of the same set.

    Distances are float64.  Two that differ by less than their rounding count as equal, so that copies and ties do
    not depend on the order or the block.

    Args:
        generated: ``(M, d)`` features.
        reference: ``(N, d)`` features on the same device.
        k: 3 for the precision and recall of ADM, torch-fidelity and Kynkaanniemi; 5 for Naeem's density and coverage.
        closed: whether a ball has its border, which matters for copies only: it does in ADM and torch-fidelity, not in
            Naeem's code.
        block: rows and columns of the distance matrix held at a time; does not change the result.

    Raises:
        UserError: fewer than ``MIN_SAMPLES`` or too few for ``k`` neighbours on a side, values that are not finite,
            other dimensions.
    """
    check_comparable(generated, reference, least=MIN_SAMPLES)
    fewest = min(len(generated), len(reference))
    if not 1 <= k < fewest - math.ceil(fewest / GROUPS):
        raise UserError(
            f"a tenth of the {fewest} samples of the smaller set left out, every sample must have k neighbours, k at "
            f"least 1; got k = {k}"
        )
    centre = torch.stack([part.sum(0) for _, part in blocks(reference)]).sum(0) / len(reference)
    x, y = _Centred(reference, centre), _Centred(generated, centre)
    largest = max(part.square().sum(1).max().item() for each in (x, y) for _, part in blocks(each))
    rounding = 4 * x.shape[1] * torch.finfo(torch.float64).eps * largest
    border = rounding if closed else -rounding
    return _shares(x, _reach(x, k, block) + border, y, _reach(y, k, block) + border, k, block)


@dataclass(frozen=True, eq=False)
class _Centred:
    """Features less the mean of the reference, which is what their distances lose least to rounding from."""

    features: Rows
    centre: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.features.shape

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.features[rows].double() - self.centre


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def _reach(x: _Centred, k: int, block: int) -> Tensor:
    """Squared radii ``(1 + GROUPS, N)``: among all samples, then without each group, whose members have ``-inf``."""
    group = group_of(torch.arange(len(x), device=x.centre.device))
    reach = x.centre.new_full((1 + GROUPS, len(x)), -math.inf)
    for rows, a in blocks(x, block):
        # The nearest k + 1 of every group, oneself among them, hold the nearest of all and of all but one group.
        near = [a[:, :0]] * GROUPS
        for columns, b in blocks(x, block):
            squared = _squared(a, b)
            for g in range(GROUPS):
                found = torch.cat([near[g], squared[:, group[columns] == g]], 1)
                near[g] = found.topk(min(k + 1, found.shape[1]), largest=False).values
        reach[0, rows] = torch.cat(near, 1).kthvalue(k + 1).values
        for g in range(GROUPS):
            reach[1 + g, rows] = torch.cat(near[:g] + near[g + 1 :], 1).kthvalue(k + 1).values
    for g in range(GROUPS):
        reach[1 + g, group == g] = -math.inf
    return reach


def _shares(x: _Centred, reach_x: Tensor, y: _Centred, reach_y: Tensor, k: int, block: int) -> PRDC:
    """The shares of generated ``y`` and reference ``x``, and again without each group of either."""
    of_x, of_y = (groups(len(each), each.centre.device) for each in (x, y))
    group = group_of(torch.arange(len(y), device=y.centre.device))
    balls = torch.zeros(1 + GROUPS, len(y), dtype=torch.int64, device=group.device)
    covered = torch.zeros_like(reach_x, dtype=torch.bool)
    recalled = torch.zeros_like(covered)
    nearest = x.centre.new_full((len(x), GROUPS), math.inf)
    for rows, a in blocks(x, block):
        for columns, b in blocks(y, block):
            squared = _squared(a, b)
            for version in range(1 + GROUPS):
                inside = squared <= reach_x[version, rows, None]
                balls[version, columns] += inside.sum(0)
                covered[version, rows] |= inside.any(1)
                recalled[version, rows] |= (squared <= reach_y[version, columns]).any(1)
            nearest[rows].scatter_reduce_(1, group[columns].expand(len(a), -1), squared, "amin")
    left = torch.stack([torch.cat([nearest[:, :g], nearest[:, g + 1 :]], 1).amin(1) for g in range(GROUPS)])
    balls, covered, recalled = balls.double(), covered.double(), recalled.double()

    def value(samples: Tensor, without_x: Tensor, without_y: Tensor) -> Value:
        full = samples.mean().item()
        se = math.hypot(*(jackknife(full, parts.tolist()).se for parts in (without_x, without_y)))
        return Value(full, se, len(y))

    found, dense = (balls > 0).double(), balls / k
    return PRDC(
        precision=value(found[0], found[1:].mean(1), _means_without(found[:1], of_y)),
        recall=value(recalled[0], _means_without(recalled[:1], of_x), recalled[1:].mean(1)),
        density=value(dense[0], dense[1:].mean(1), _means_without(dense[:1], of_y)),
        coverage=value(covered[0], _means_without(covered[1:], of_x), (left <= reach_x[0]).double().mean(1)),
    )


def _means_without(samples: Tensor, members: list[Tensor]) -> Tensor:
    """Means over all but each group, ``(GROUPS,)``, of ``(GROUPS, n)`` samples or of the same ``(1, n)`` every time."""
    versions = samples.expand(GROUPS, -1)
    pairs = zip(versions, members, strict=True)
    return torch.stack([(row.sum() - row[mine].sum()) / (len(row) - len(mine)) for row, mine in pairs])
