"""Which class or prompt every sample of a measurement is asked for, by the laws of ``protocols.LABELS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .conditions import Turns, in_turn
from .identity import of_texts
from .samplers import SampleNoise

Told = Literal["none", "classes", "prompts"]
"""What a pipeline is told beside its noise."""
OF_CLASSES = ("random", "balanced", "stratified")


def followed(told: Told, law: str) -> str:
    """What a pipeline follows that is ``told`` this, under a protocol that says ``law``.

    One without conditions follows every law of classes: there is nothing to draw.
    """
    if told == "prompts":
        return "prompts"
    if law in OF_CLASSES or (law, told) == ("none", "none"):
        return law
    return "balanced" if told == "classes" else "none"


def inputs(told: Told, conditions: Sequence[str] | Sequence[int], count: int) -> dict[str, str]:
    """A checksum of what ``count`` samples are told of ``conditions``, by its name; classes' law is the protocol's."""
    if told == "prompts":
        return {"prompts": of_texts([str(conditions[k % len(conditions)]) for k in range(count)])}
    return {"labels": of_texts([str(label) for label in conditions])} if told == "classes" else {}


def turns(law: str, shape: Sequence[int], period: int | None = None) -> Turns:
    """The conditions of samples under ``law``; classes are ``balanced`` where it says nothing of them.

    Args:
        law: of ``protocols.LABELS``.
        shape: ``(C, H, W)`` of the noise that a sample draws before its class.
        period: samples of a repeat; sample ``k`` of any repeat is told what sample ``k`` of the first is, unless it
            draws.
    """

    def of(ids: Sequence[int], count: int) -> list[int]:
        if law == "random":
            return _drawn(ids, count, shape)
        places = list(ids) if period is None else [k % period for k in ids]
        return _shuffled(places, count) if law == "stratified" else in_turn(places, count)

    return of


def _drawn(ids: Sequence[int], count: int, shape: Sequence[int]) -> list[int]:
    noise = SampleNoise(ids, shape)
    noise()
    return [int(torch.randint(count, (), generator=generator)) for generator in noise.generators]


def _shuffled(places: Sequence[int], count: int) -> list[int]:
    rows = {k // count for k in places}
    orders = {row: torch.randperm(count, generator=torch.Generator().manual_seed(row)) for row in rows}
    return [int(orders[k // count][k % count]) for k in places]
