"""Data-free batches: noise and conditions, drawn on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditions import NO_COND, Cond
from .config import Data
from .errors import UserError
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

    def batch(self, size: int) -> Batch:
        """Standard normal noise ``(size, C, H, W)`` and conditions."""
        noise = torch.randn(size, *self.shape, device=self.device)
        if self.labels is None:
            return Batch(noise)
        return Batch(noise, {"class_labels": self.labels[torch.randint(len(self.labels), (size,), device=self.device)]})

    def cond(self, ids: Sequence[int]) -> Cond:
        """The conditions of the samples ``ids`` in previews and evaluation: label ``id mod L``, hence balanced."""
        if self.labels is None:
            return NO_COND
        return {"class_labels": self.labels[torch.tensor(list(ids), device=self.device) % len(self.labels)]}


def data_free(teacher: Teacher, data: Data, device: torch.device) -> DataFree:
    """The batches that ``data`` asks of ``teacher``.

    Raises:
        UserError: labels that the teacher does not have, or a class-conditional teacher without labels.
    """
    classes = teacher.classes
    if classes is None:
        if data.class_labels is not None or data.null_label is not None:
            raise UserError(f"data.class_labels is set, but {teacher.source} is unconditional; remove it")
        return DataFree(teacher.sample_shape, device)
    if data.class_labels is None:
        raise UserError(f"{teacher.source} has {classes} classes; set data.class_labels=uniform or a list of labels")
    wanted = range(classes) if data.class_labels == "uniform" else data.class_labels
    labels = [label for label in wanted if label != data.null_label]
    if not labels or max(labels) >= classes:
        raise UserError(f"data.class_labels must lie in 0..{classes - 1}, got {list(wanted)}")
    return DataFree(teacher.sample_shape, device, torch.tensor(labels, device=device))
