"""Teachers: a diffusers pipeline folder or hub id, or a network of the user's own, read as a ``Denoiser``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .backbones import Family
from .backbones.plain import PLAIN
from .conditions import Cond
from .config import Config, Data, Precision
from .denoiser import Denoiser, Guidance
from .errors import UserError, first_line
from .plain import PYTHON, check_plain, plain_of
from .process import VP
from .schedulers import read_scheduler
from .sources import components, locate, part, read_index, read_json, whole


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline: where it came from, and its network read as a denoiser."""

    source: str
    """Folder, hub id or function as the user gave it."""
    folder: Path
    """Where its files are, if it has any."""
    index: dict[str, Any]
    """Its ``model_index.json``; empty for a plain network, as it is no pipeline."""
    family: Family
    denoiser: Denoiser
    network: Any
    sample_shape: tuple[int, ...]
    """``(C, H, W)`` of one sample: latents where there is a VAE."""
    scale: int
    """Pixels of a picture per pixel of a sample, along each side."""
    classes: int | None
    """Number of class labels; ``None`` for a network without."""
    null_label: int | None = None
    """The label that means "no class", where the family fixes it."""
    embeds_guidance: bool = False
    """Whether the network is told a guidance scale, instead of being called twice."""
    parts_dtype: Precision = "float32"
    """Of the weights of its text encoders and VAE."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Makes pictures of samples, see ``Plain``."""

    @property
    def makes_latents(self) -> bool:
        """Whether a VAE, or ``decode``, makes pictures of the samples."""
        return self.decode is not None or bool(components(self.index).get("vae"))

    @property
    def network_size(self) -> str:
        """In words; networks that differ in this cannot take one another's weights."""
        count, shape = sum(value.numel() for value in self.network.parameters()), "x".join(map(str, self.sample_shape))
        return f"{type(self.network).__name__} of {count:,} parameters for samples of {shape}"

    @property
    def picture_size(self) -> int:
        """Height in pixels of a picture."""
        return self.sample_shape[-1] * self.scale

    @property
    def picture_steps(self) -> int:
        """Steps for pictures of this teacher: 50, or every entry of a shorter table."""
        process = self.denoiser.process
        return min(50, len(process.alphas_cumprod)) if isinstance(process, VP) else 50

    def guided(self, data: Data, null: Cond | None = None, *, two_passes: bool = False) -> Denoiser:
        """The denoiser with the guidance that ``data`` asks for.

        Args:
            data: scale, interval and null label.
            null: the encoded negative prompt, of one row, where the network reads prompts.
            two_passes: see ``Guidance``.
        """
        if self.embeds_guidance:
            return self.denoiser
        null_label = self.null_label if data.null_label is None else data.null_label
        if self.family.encode is not None:
            uncond = null or {}
        elif self.classes is not None and null_label is not None:
            device = next(self.denoiser.network.parameters()).device
            uncond = {"class_labels": torch.tensor([null_label], device=device)}
        else:
            uncond = None
        told_null = data.null_label is not None or data.negative_prompt is not None
        if data.scale == 1.0 and data.scales is None and (uncond is None or not told_null):
            return self.denoiser
        known = data.null_label in (None, self.null_label) or cast(int, data.null_label) < (self.classes or 0)
        if uncond is None or not known:
            raise UserError(
                f"data.guidance_scale={data.guidance_scale} needs a class-conditional teacher and data.null_label, "
                f"the label that means 'no class'; {self.source} has "
                + (f"labels 0..{self.classes - 1}, null_label={data.null_label}" if self.classes else "no classes")
            )
        try:
            scale = None if data.scales else data.scale
            guidance = Guidance(scale, uncond, data.guidance_interval, two_passes=two_passes)
        except ValueError as error:
            raise UserError(f"data.guidance_interval: {error}") from None
        return replace(self.denoiser, guidance=guidance)


def load_teacher(
    source: str,
    *,
    resolution: int | None = None,
    dtype: Precision = "float32",
    parts_dtype: Precision = "float32",
    weights: bool = True,
) -> Teacher:
    """Load a frozen teacher on the CPU; its text encoders and VAE stay on disk.

    Args:
        source: a pipeline folder, a hub id, a bundled teacher such as ``builtin:digits``, or a Python function, which
            is run, see ``plain_of``.
        resolution: height and width of its pictures in pixels; the pipeline's own by default.
        dtype: of its weights.
        parts_dtype: of those of its text encoders and VAE.
        weights: ``False`` reads settings alone: the network is on the meta device, until ``with_weights``.  What a
            function returns has its weights at once.

    Raises:
        UserError: nothing there, or a pipeline, network or scheduler that is not supported; raised from the
            settings files, before weights are downloaded or read.
    """
    if source.startswith(PYTHON):
        return _plain(source, resolution, dtype)
    folder = locate(source)
    index, family = read_index(folder / "model_index.json", source)
    network = _skeleton(folder, family, source)
    config = dict(network.config)
    if reason := family.refuse(config):
        raise UserError(f"{source}: {reason}")
    scale = _pixels(folder, index, source)
    shape = _shape(family, config, resolution, scale)
    read_json(part(folder, "scheduler") / "scheduler_config.json", source)
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(part(folder, "scheduler"))
    reading = read_scheduler(scheduler, tokens=family.tokens(config, shape))
    network = nn.Module.to(network, getattr(torch, dtype)).eval().requires_grad_(False)
    teacher = Teacher(
        source=source,
        folder=folder,
        index=index,
        family=family,
        denoiser=Denoiser(network, **reading, call=family.call, bottleneck=family.bottleneck),
        network=network,
        sample_shape=shape,
        scale=scale,
        classes=family.classes(config),
        null_label=family.null_label(config),
        embeds_guidance=family.embeds_guidance(config),
        parts_dtype=parts_dtype,
    )
    return with_weights(teacher) if weights else teacher


def settings_of(config: Config) -> Teacher:
    """The teacher of a run, without weights, see ``load_teacher``."""
    return load_teacher(
        config.teacher,
        resolution=config.data.resolution,
        dtype=config.training.teacher_dtype,
        parts_dtype=config.training.parts_dtype,
        weights=False,
    )


def with_weights(teacher: Teacher) -> Teacher:
    """``teacher``, of which settings were read, with the weights of its network; downloaded where it is a hub id.

    Raises:
        UserError: they cannot be had or read.
    """
    if teacher.family is PLAIN:
        return teacher
    family, source, dtype = teacher.family, teacher.source, teacher.network.dtype
    folder = whole(source, teacher.folder, teacher.index)
    try:
        network = family.network.from_pretrained(part(folder, family.component), torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the weights in {family.component}/: {first_line(error)}") from None
    network = network.eval().requires_grad_(False)
    return replace(teacher, folder=folder, network=network, denoiser=replace(teacher.denoiser, network=network))


def _plain(source: str, resolution: int | None, dtype: Precision) -> Teacher:
    """The network that a function returns."""
    plain = plain_of(source)
    network = plain.network.to("cpu", getattr(torch, dtype)).eval().requires_grad_(False)
    scale = check_plain(plain, source)
    if resolution not in (None, plain.shape[1] * scale):
        raise UserError(f"data.resolution={resolution}: {source} makes {plain.shape[1] * scale} only; remove it")
    return Teacher(
        source=source,
        folder=Path(),
        index={},
        family=PLAIN,
        denoiser=Denoiser(network, plain.process, plain.target, PLAIN.call, sigma_data=plain.sigma_data),
        network=network,
        sample_shape=plain.shape,
        scale=scale,
        classes=plain.classes,
        decode=plain.decode,
    )


def _skeleton(folder: Path, family: Family, source: str) -> Any:  # noqa: ANN401
    """The network on the meta device: its settings with every default, without its weights."""
    written = read_json(part(folder, family.component) / "config.json", source)
    try:
        with torch.device("meta"):
            return family.network.from_config(written)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{source}: cannot read {family.component}/config.json: {first_line(error)}") from None


def _pixels(folder: Path, index: dict[str, Any], source: str) -> int:
    """Pixels of a picture per pixel of a sample."""
    if index.get("vae", [None, None])[1] is None:
        return 1
    config = read_json(folder / "vae" / "config.json", source)
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if levels is None:
        raise UserError(f"{source}: vae/config.json names no block_out_channels; this VAE is not supported")
    return 2 ** (len(levels) - 1)


def _shape(family: Family, config: dict[str, Any], resolution: int | None, scale: int) -> tuple[int, int, int]:
    """``(C, H, W)`` of one sample."""
    channels, height, width = family.shape(config)
    if resolution is None:
        return channels, height, width
    if family.encode is None and resolution != height * scale:
        raise UserError(f"data.resolution={resolution}: this pipeline makes {height * scale} only; remove it")
    patch = family.patch or config.get("patch_size") or 1
    if resolution % (scale * patch):
        raise UserError(f"data.resolution={resolution} must be a multiple of {scale * patch} for this teacher")
    return channels, resolution // scale, resolution // scale
