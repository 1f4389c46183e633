"""Data-free batches: noise and conditions, drawn on the device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .conditions import NO_COND, Cond, Turns, in_turn, select
from .config import Data, RealData, Stage
from .errors import UserError
from .images import to_float
from .methods.base import Batch
from .metrics.sources import load_images
from .prompts import encode, read_prompts
from .teacher import Teacher

_LAW = 10_000
"""Entries that a law of labels is written as."""


class Scales(NamedTuple):
    """A range of guidance scales."""

    keyword: str
    """What a scale is called among the conditions."""
    low: float
    high: float
    shown: float
    """In previews and evaluation."""


@dataclass(frozen=True, eq=False)
class DataFree:
    """Draws batches for one teacher; randomness is the global generators, seeded once per run."""

    shape: tuple[int, ...]
    """Shape of one sample, ``(C, H, W)``."""
    device: torch.device
    table: Cond = field(default_factory=dict)
    """Conditions to draw from uniformly, one row each, on the CPU or on disk; empty for an unconditional teacher."""
    order: Tensor | None = None
    """``(N,)`` rows of ``table`` in the order given, where some are given more than once."""
    null: Cond | None = None
    """The encoded negative prompt, of one row."""
    prompts: tuple[str, ...] = ()
    """The prompt of every row."""
    scales: Scales | None = None
    """The range of guidance scales that samples draw from, where there is one."""
    turns: Turns = in_turn
    """Which conditions samples have in previews and evaluation."""
    images: Tensor | None = None
    """``(N, C, H, W)`` real images of an adversarial term, in [-1, 1]; ``None`` is data-free."""

    def batch(self, size: int) -> Batch:
        """Standard normal noise ``(size, C, H, W)`` and conditions."""
        noise = torch.randn(size, *self.shape, device=self.device)
        cond = self._told(self._ordered(torch.randint(self.count, (size,)))) if self.table else NO_COND
        if self.scales is not None:
            keyword, low, high, _ = self.scales
            cond = {**cond, keyword: low + (high - low) * torch.rand(size, device=self.device)}
        return Batch(noise, cond, self._real(size))

    def _real(self, size: int) -> Tensor | None:
        if self.images is None:
            return None
        return self.images[torch.randint(len(self.images), (size,), device=self.device)]

    @property
    def told(self) -> Literal["none", "classes", "prompts"]:
        """What samples are told."""
        return "prompts" if self.prompts else "classes" if self.table else "none"

    @property
    def conditions(self) -> list[str] | list[int]:
        """The prompts or class labels that ``rows`` takes samples' from, in their order."""
        if self.prompts:
            return [self.prompts[row] for row in self._ordered(torch.arange(self.count)).tolist()]
        return self.table["class_labels"].tolist() if self.table else []

    @property
    def digest(self) -> str | None:
        """What tells the prompts, their order and their repeats from others; ``None`` without prompts."""
        if not self.prompts:
            return None
        told = hashlib.sha256(json.dumps(self.conditions).encode()).hexdigest()
        return f"{len(self.conditions)} of SHA-256 {told[:16]}"

    @property
    def count(self) -> int:
        """Conditions to draw from, repeats counted."""
        return len(next(iter(self.table.values()))) if self.order is None else len(self.order)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Rows of ``table`` of the samples ``ids`` in previews and evaluation, by ``turns``."""
        return self._ordered(torch.tensor(self.turns(ids, self.count)))

    def cond(self, ids: Sequence[int]) -> Cond:
        """The conditions of the samples ``ids``; of a range of scales, the one that is shown."""
        cond = self._told(self.rows(ids)) if self.table else NO_COND
        if self.scales is None:
            return cond
        return {**cond, self.scales.keyword: torch.full((len(ids),), self.scales.shown, device=self.device)}

    def _ordered(self, picks: Tensor) -> Tensor:
        return picks if self.order is None else self.order[picks]

    def _told(self, rows: Tensor) -> Cond:
        return _moved(select(self.table, rows), self.device)


def data_free(teacher: Teacher, data: Data, device: torch.device) -> DataFree:
    """The batches that ``data`` asks of ``teacher``; prompts are encoded here, or read where they were.

    Raises:
        UserError: see ``check_conditions``.
    """
    prompts, scales = check_conditions(teacher, data), scales_drawn(teacher, data)
    if prompts is None:
        labels = class_labels(teacher.source, teacher.classes, data, teacher.null_label)
        return replace(draws(teacher.sample_shape, labels, device), scales=scales)
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: row for row, prompt in enumerate(distinct)}
    table, null = encode(teacher, distinct, data.negative_prompt, device=device)
    if teacher.embeds_guidance:
        table = {**table, "guidance": torch.full((len(distinct),), data.scale)}
    return DataFree(
        teacher.sample_shape,
        device,
        table,
        order=torch.tensor([place[prompt] for prompt in prompts]),
        null=_moved(null, device),
        prompts=tuple(distinct),
        scales=scales,
    )


def _moved(cond: Cond, device: torch.device) -> Cond:
    """``cond`` on ``device``, in float32 where it is not whole numbers; of pinned memory, which nobody waits for."""
    if device.type == "cuda":
        cond = {key: value.pin_memory() for key, value in cond.items()}
    moved = {key: value.to(device, non_blocking=True) for key, value in cond.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in moved.items()}


def scales_drawn(teacher: Teacher, data: Data) -> Scales | None:
    """From which range every sample draws its guidance scale, where there is one."""
    return data.scales and Scales("guidance" if teacher.embeds_guidance else "guidance_scale", *data.scales, data.scale)


def check_conditions(teacher: Teacher, data: Data) -> list[str] | None:
    """The prompts of ``data``; ``None`` for a teacher that reads none.

    Raises:
        UserError: prompts or labels that the teacher does not take, or none where it needs them.
    """
    if teacher.family.encode is None:
        if data.prompts is not None or data.negative_prompt is not None:
            raise UserError(f"{teacher.source} reads no prompts; remove data.prompts and data.negative_prompt")
        class_labels(teacher.source, teacher.classes, data, teacher.null_label)
        return None
    if data.class_labels is not None or data.null_label is not None:
        raise UserError(f"{teacher.source} reads prompts, not class labels; set data.prompts")
    if teacher.embeds_guidance and (data.negative_prompt is not None or data.guidance_interval != (0.0, 1.0)):
        raise UserError(f"{teacher.source} is told its scale; remove data.negative_prompt and data.guidance_interval")
    if data.prompts is None:
        raise UserError(f"{teacher.source} reads prompts; set data.prompts to a text file with one prompt a line")
    return read_prompts(data.prompts)


def check_guided(data: Data, scales: Sequence[float | Tensor | None]) -> None:
    """Refuse what only guidance reads where neither the teacher nor a network of ``scales`` is guided.

    Raises:
        UserError: as said.
    """
    usual = {"negative_prompt": None, "guidance_interval": (0.0, 1.0)}
    unread = [f"data.{name}" for name, value in usual.items() if vars(data)[name] != value]
    if unread and data.scales is None and all(scale == 1 for scale in (data.scale, *scales)):
        raise UserError(
            f"{' and '.join(unread)} is for guidance, and every scale here is 1; set data.guidance_scale, or remove it"
        )


def real_images(teacher: Teacher, real_data: RealData) -> Tensor:
    """The images of ``real_data``, ``(N, C, H, W)`` in [-1, 1], as pictures; ``Decoder.encode`` makes samples of them.

    Raises:
        UserError: they are unreadable, or not of the teacher's size; or nothing makes samples of them.
    """
    if teacher.decode is not None:
        raise UserError(
            f"real_data: {teacher.source} has a function that decodes samples, and none that encodes images"
        )
    images = to_float(load_images(real_data.images))
    made = (3, teacher.picture_size, teacher.picture_size) if teacher.makes_latents else teacher.sample_shape
    if images.shape[1:] != made:
        got, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], made))
        raise UserError(f"real_data.images: {real_data.images} holds {got} images, the teacher makes {wanted}")
    return images


def check_images(stages: tuple[Stage, ...], real_data: RealData | None, teacher: Teacher) -> None:
    """Refuse images that nothing looks at, an adversarial term without images, and conditions that they do not have.

    Raises:
        UserError: as said.
    """
    takers = [stage.method.name for stage in stages if stage.method.takes_images]
    if real_data is not None and not takers:
        names = ", ".join(stage.method.name for stage in stages)
        raise UserError(
            f"real_data is given, but {names} takes no images; remove it, or set method.adversarial={{}} of a method "
            "that has one (sid, dmd, swiftbrush)"
        )
    if real_data is None and takers:
        raise UserError(f"the adversarial term of {takers[0]} needs real_data.images; set it, or adversarial=null")
    asking = [stage.method.name for stage in stages if stage.method.judges_conditions]
    if asking and (teacher.classes is not None or teacher.family.encode is not None):
        raise UserError(
            f"real_data holds images without {'labels' if teacher.classes else 'prompts'}: let {asking[0]} judge them "
            "without, by fake_guidance=0 (Zero-CFG)"
        )


def draws(shape: tuple[int, ...], labels: list[int] | None, device: torch.device) -> DataFree:
    """Noise of ``shape`` with uniform ``labels``."""
    return DataFree(shape, device, NO_COND if labels is None else {"class_labels": torch.tensor(labels)})


def class_labels(source: str, classes: int | None, data: Data, null_label: int | None = None) -> list[int] | None:
    """The labels to draw from for a network with ``classes`` classes; ``None`` for an unconditional one.

    Raises:
        UserError: labels that the network does not have, or a class-conditional network without labels.
    """
    if classes is None:
        if data.class_labels is not None or data.null_label is not None:
            raise UserError(f"class labels are given, but {source} is unconditional; remove them")
        return None
    if data.class_labels is None:
        raise UserError(
            f"{source} has {classes} classes; set data.class_labels=uniform, a list of labels or {{label: weight, ...}}"
        )
    told = data.class_labels
    wanted = range(classes) if told == "uniform" else repeated(told) if isinstance(told, dict) else told
    null = null_label if data.null_label is None else data.null_label
    labels = [label for label in wanted if label != null]
    if not labels or max(wanted) >= classes or min(wanted) < 0:
        raise UserError(f"class labels of {source} must lie in 0..{classes - 1}, got {sorted(set(wanted))}")
    return labels


def repeated(law: Mapping[int, float]) -> list[int]:
    """Labels as often as they weigh, evenly mixed: every stretch of the list follows the law as well as it can."""
    total = sum(law.values())
    whole = total <= _LAW and all(float(weight).is_integer() for weight in law.values())
    counts = {label: int(weight) if whole else max(1, round(_LAW * weight / total)) for label, weight in law.items()}
    places = sorted(((k + 0.5) / count, label) for label, count in counts.items() for k in range(count))
    return [label for _, label in places]
