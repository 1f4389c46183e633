"""A network of the user's own as a teacher: what must be known of it, and the Python function that builds it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor, nn

from .backbones.plain import PLAIN
from .denoiser import Target
from .errors import UserError, first_line
from .process import VE, VP, Flow, NoiseProcess, Trig

PYTHON = "python:"
"""What a teacher's name begins with that is a function; whoever writes it consents to its being run."""

PROCESSES: dict[str, type[NoiseProcess]] = {kind.__name__: kind for kind in (VP, VE, Flow, Trig)}
"""The processes that a student's description can name."""

_TARGETS = tuple(target for target in get_args(Target) if target != "consistency")


@dataclass(frozen=True)
class Plain:
    """A trained network of one's own: the process that it was trained under, and what it predicts.

    It is called as ``network(x, label)``, or ``network(x, label, class_labels)`` where there are classes, with states
    ``x (B, C, H, W)``, what the process tells a network of their times, ``process.label(t) (B,)`` in float32, and whole
    numbers ``class_labels (B,)``; it returns ``(B, C, H, W)``.  A network that is called otherwise is wrapped in a
    module that is called so.
    """

    network: nn.Module
    _: KW_ONLY
    process: NoiseProcess
    """``VP``, ``VE``, ``Flow`` or ``Trig`` of ``stepdistill.process``."""
    target: Target
    """What it outputs: ``eps``, ``v``, ``x0``, ``flow`` or ``edm``."""
    shape: tuple[int, int, int]
    """``(C, H, W)`` of one sample."""
    classes: int | None = None
    """Number of class labels; ``None`` for a network without."""
    sigma_data: float = 0.5
    """Data standard deviation of the ``edm`` preconditioning."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Makes pictures ``(B, 3, k H, k W)`` in [-1, 1] of samples, on their device, that are no pictures themselves."""

    def __post_init__(self) -> None:
        problem = None
        if not isinstance(self.network, nn.Module) or not list(self.network.parameters()):
            problem = f"network must be a torch.nn.Module with weights, got {type(self.network).__name__}"
        elif type(self.process) not in PROCESSES.values():
            problem = f"process must be of stepdistill.process, {', '.join(PROCESSES)}, got {self.process!r}"
        elif self.target not in _TARGETS:
            problem = f"target must be one of {', '.join(_TARGETS)}, got {self.target!r}"
        elif not isinstance(self.shape, tuple) or len(self.shape) != 3 or min(self.shape) < 1:
            problem = f"shape must be (C, H, W) of one sample, got {self.shape!r}"
        elif self.decode is None and self.shape[0] not in (1, 3):
            problem = f"samples of {self.shape[0]} channels are no pictures; give decode, which makes RGB ones of them"
        elif self.classes is not None and self.classes < 1:
            problem = f"classes must be at least 1, or None, got {self.classes}"
        if problem:
            raise UserError(f"Plain: {problem}")


def plain_of(source: str) -> Plain:
    """What the function ``python:PACKAGE.MODULE:FUNCTION`` or ``python:FILE.py:FUNCTION`` returns.

    An error within the function is left as it is, with its traceback.

    Raises:
        UserError: there is no such function, or it returns something else.
    """
    place, _, name = source.removeprefix(PYTHON).rpartition(":")
    if not place:
        raise UserError(f"teacher {source!r} must be python:PACKAGE.MODULE:FUNCTION or python:FILE.py:FUNCTION")
    try:
        module = _run(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        hint = "" if place.endswith(".py") else "; a file is named by its path, python:FILE.py:FUNCTION"
        raise UserError(f"teacher {source!r}: cannot import {place}: {error}{hint}") from None
    function = vars(module).get(name)
    if not callable(function):
        raise UserError(f"teacher {source!r}: {place} has no function {name}")
    plain = function()
    if not isinstance(plain, Plain):
        raise UserError(f"teacher {source!r} must return stepdistill.Plain(...), got {type(plain).__name__}")
    return plain


def _run(file: Path) -> ModuleType:
    """The module in ``file``, which may import its neighbours, as ``python FILE.py`` lets it."""
    spec = importlib.util.spec_from_file_location(str(file.resolve()), file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError("there is no such file")
    if str(file.resolve().parent) not in sys.path:
        sys.path.insert(0, str(file.resolve().parent))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def check_plain(plain: Plain, source: str) -> int:
    """Call the network, and ``decode``, once on the CPU.

    Returns:
        Pixels of a picture per pixel of a sample, along each side.

    Raises:
        UserError: they cannot be called, or return something else than they should.
    """
    weight = next(plain.network.parameters())
    x, label = weight.new_zeros(2, *plain.shape), plain.process.label(torch.tensor([0.5, 1.0]))
    cond = {} if plain.classes is None else {"class_labels": torch.zeros(2, dtype=torch.long)}
    told = "(x, label)" if plain.classes is None else "(x, label, class_labels)"
    output = _returned(lambda: PLAIN.call(plain.network, x, label, cond), f"{source}: network{told}")
    if output.shape != x.shape:
        raise UserError(f"{source}: network{told} must return {tuple(x.shape)} as x is, got {tuple(output.shape)}")
    if plain.decode is None:
        return 1
    decode, (_, height, width) = plain.decode, plain.shape
    pictures = _returned(lambda: decode(x.float()), f"{source}: decode(samples)")
    scale = max(1, pictures.shape[-1] // width)
    if pictures.shape != (2, 3, scale * height, scale * width):
        raise UserError(
            f"{source}: decode(samples) must return pictures (2, 3, k * {height}, k * {width}) of samples "
            f"{tuple(x.shape)}, got {tuple(pictures.shape)}"
        )
    return scale


def _returned(run: Callable[[], object], what: str) -> Tensor:
    try:
        found = run()
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{what} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UserError(f"{what} must return a tensor of floating-point numbers, got {type(found).__name__}")
    return found
