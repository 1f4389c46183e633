"""What the command lines share: numbers that are checked, and arguments taken into a dataclass by name."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from dataclasses import fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def count(text: str) -> int:
    """A whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise ArgumentTypeError(f"must not be negative, got {value}")
    return value


def amount(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise ArgumentTypeError(f"must be positive, got {value}")
    return value


def taken(kind: type[Kind], told: Namespace) -> Kind:
    """A ``kind``, which is a dataclass, of the arguments that are named as its fields; lists become tuples."""
    every: Any = kind
    given = {field.name: vars(told)[field.name] for field in fields(every) if field.name in told}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
