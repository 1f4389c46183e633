"""Data-free batches: noise and conditions, drawn on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditions import NO_COND, Cond
from .config import Data, RealData
from .errors import UserError
from .images import load_images, to_float
from .methods.base import Batch
from .teacher import Teacher


@dataclass(frozen=True, eq=False)
class DataFree:
    """Draws batches for one teacher; randomness is the device's global generator, seeded once per run."""

    shape: tuple[int, ...]
    """Shape of one sample, ``(C, H, W)``."""
    device: torch.device
    labels: Tensor | None = None
    """``(L,)`` class labels to draw from uniformly; ``None`` for an unconditional teacher."""
    images: Tensor | None = None
    """``(N, C, H, W)`` real images of an adversarial term, in [-1, 1]; ``None`` is data-free."""

    def batch(self, size: int) -> Batch:
        """Standard normal noise ``(size, C, H, W)`` and conditions."""
        noise = torch.randn(size, *self.shape, device=self.device)
        return Batch(
            noise, {} if self.labels is None else {"class_labels": self._rows(self.labels, size)}, self._real(size)
        )

    def _real(self, size: int) -> Tensor | None:
        return None if self.images is None else self._rows(self.images, size)

    def _rows(self, table: Tensor, size: int) -> Tensor:
        """``size`` rows of ``table``, each uniformly drawn."""
        return table[torch.randint(len(table), (size,), device=self.device)]

    def cond(self, ids: Sequence[int]) -> Cond:
        """The conditions of the samples ``ids`` in previews and evaluation: label ``id mod L``, hence balanced."""
        if self.labels is None:
            return NO_COND
        return {"class_labels": self.labels[torch.tensor(list(ids), device=self.device) % len(self.labels)]}


def data_free(teacher: Teacher, data: Data, device: torch.device) -> DataFree:
    """The batches that ``data`` asks of ``teacher``; see ``class_labels`` for what is refused."""
    return draws(teacher.sample_shape, class_labels(teacher.source, teacher.classes, data), device)


def real_images(teacher: Teacher, real_data: RealData) -> Tensor:
    """The images of ``real_data``, ``(N, C, H, W)`` in [-1, 1].

    Raises:
        UserError: they are unreadable, or not of the teacher's size; or the teacher wants labels for them.
    """
    images = to_float(load_images(real_data.images))
    if images.shape[1:] != teacher.sample_shape:
        got, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], teacher.sample_shape))
        raise UserError(f"real_data.images: {real_data.images} holds {got} images, the teacher makes {wanted}")
    if teacher.classes is not None:
        raise UserError("real_data: images of a class-conditional teacher would need labels; this is not supported")
    return images


def draws(shape: tuple[int, ...], labels: list[int] | None, device: torch.device) -> DataFree:
    """Noise of ``shape`` with uniform ``labels``."""
    return DataFree(shape, device, None if labels is None else torch.tensor(labels, device=device))


def class_labels(source: str, classes: int | None, data: Data) -> list[int] | None:
    """The labels to draw from for a network with ``classes`` classes; ``None`` for an unconditional one.

    Raises:
        UserError: labels that the network does not have, or a class-conditional network without labels.
    """
    if classes is None:
        if data.class_labels is not None or data.null_label is not None:
            raise UserError(f"class labels are given, but {source} is unconditional; remove them")
        return None
    if data.class_labels is None:
        raise UserError(f"{source} has {classes} classes; set data.class_labels=uniform or a list of labels")
    wanted = range(classes) if data.class_labels == "uniform" else data.class_labels
    labels = [label for label in wanted if label != data.null_label]
    if not labels or max(labels) >= classes or min(labels) < 0:
        raise UserError(f"class labels of {source} must lie in 0..{classes - 1}, got {list(wanted)}")
    return labels
