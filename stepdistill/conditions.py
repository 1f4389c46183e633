"""Conditions: what a network is told beside the state and the time.

A ``Cond`` maps the network's own keyword (``class_labels``, ``encoder_hidden_states``, ...) to a tensor with
one row per sample; the empty mapping is an unconditional network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Cond = Mapping[str, Tensor]

NO_COND: Cond = {}

Turns = Callable[[Sequence[int], int], list[int]]
"""Which of so many conditions the samples of the given ids are told."""


def concatenate(*conds: Cond) -> Cond:
    """Stack conditions with the same keys along the batch."""
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}


def repeat(cond: Cond, batch_size: int) -> Cond:
    """Expand a condition of one row to ``batch_size`` rows; a full one is returned as it is."""
    return {key: value.expand(batch_size, *value.shape[1:]) for key, value in cond.items()}


def in_turn(ids: Sequence[int], count: int) -> list[int]:
    """Which of ``count`` conditions the samples ``ids`` are given: all in turn, one further on every round.

    So they are balanced, and every tenth sample, which an error is estimated without, is not of one class.
    """
    return [(k + k // count) % count for k in ids]


def select(cond: Cond, selected: slice | Tensor) -> Cond:
    """The rows ``selected`` of every tensor."""
    return {key: value[selected] for key, value in cond.items()}
