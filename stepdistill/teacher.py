"""Teachers: a diffusers pipeline folder or hub id, read as a ``Denoiser``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError

from .backbones import unet2d
from .bundled import BUILTIN, bundled
from .config import Data
from .denoiser import Denoiser, Guidance
from .errors import UserError
from .process import VP
from .schedulers import SUPPORTED, read_scheduler

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
"""Pipeline classes that can be distilled."""

_COMPONENTS = ("unet", "scheduler")


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline: where it came from, and its network read as a denoiser."""

    source: str
    """Folder or hub id as the user gave it."""
    denoiser: Denoiser
    network: UNet2DModel
    sample_shape: tuple[int, ...]
    """``(C, H, W)`` of one sample."""
    classes: int | None
    """Number of class labels; ``None`` for an unconditional network."""

    @property
    def picture_steps(self) -> int:
        """Steps for pictures of this teacher: 50, or every entry of a shorter table."""
        process = self.denoiser.process
        return min(50, len(process.alphas_cumprod)) if isinstance(process, VP) else 50

    def guided(self, data: Data) -> Denoiser:
        """The denoiser with the guidance that ``data`` asks for."""
        if data.guidance_scale == 1.0 and data.null_label is None:
            return self.denoiser
        if self.classes is None or data.null_label is None or data.null_label >= self.classes:
            raise UserError(
                f"data.guidance_scale={data.guidance_scale} needs a class-conditional teacher and data.null_label, "
                f"the label that means 'no class'; {self.source} has "
                + (f"labels 0..{self.classes - 1}, null_label={data.null_label}" if self.classes else "no classes")
            )
        uncond = {"class_labels": torch.tensor([data.null_label], device=self.network.device)}
        try:
            guidance = Guidance(data.guidance_scale, uncond, data.guidance_interval)
        except ValueError as error:
            raise UserError(f"data.guidance_interval: {error}") from None
        return replace(self.denoiser, guidance=guidance)


def load_teacher(source: str) -> Teacher:
    """Load a frozen teacher in float32 on the CPU.

    Args:
        source: a pipeline folder, a hub id, or ``builtin:digits``.

    Raises:
        UserError: nothing there, or a pipeline, network or scheduler that is not supported; raised from the
            settings files, before weights are downloaded or read.
    """
    folder = _locate(source)
    index = _index(folder / "model_index.json", source)
    unet_config = _json(folder / "unet" / "config.json", source)
    _check_unet(unet_config, source)
    _json(folder / "scheduler" / "scheduler_config.json", source)
    reading = read_scheduler(getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler"))
    try:
        network = UNet2DModel.from_pretrained(folder / "unet").eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot read the weights in unet/: {str(error).splitlines()[0]}") from None
    return Teacher(
        source=source,
        denoiser=Denoiser(network, **reading, call=unet2d.call, bottleneck=unet2d.bottleneck),
        network=network,
        sample_shape=unet2d.sample_shape(network),
        classes=network.config["num_class_embeds"],
    )


def _locate(source: str) -> Path:
    """The local folder of ``source``, its settings checked; only a supported pipeline's weights are downloaded."""
    if source.startswith(BUILTIN):
        folder = bundled("assets") / f"{source.removeprefix(BUILTIN)}_teacher"
        if not folder.is_dir():
            names = ", ".join(f"{BUILTIN}{path.name.removesuffix('_teacher')}" for path in _bundled_teachers())
            raise UserError(f"no bundled teacher {source!r}; bundled are {names}")
        return folder
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise UserError(f"teacher folder {source!r} does not exist")
    try:
        _index(Path(hf_hub_download(source, "model_index.json")), source)
        return Path(snapshot_download(source, allow_patterns=["model_index.json", *(f"{c}/*" for c in _COMPONENTS)]))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"teacher {source!r} is no folder here, and the hub did not give it: {reason}") from None


def _bundled_teachers() -> list[Path]:
    return sorted(bundled("assets").glob("*_teacher"))


def _index(path: Path, source: str) -> dict[str, list[str]]:
    """``model_index.json``, refused unless pipeline, network and scheduler are supported."""
    if not path.is_file():
        raise UserError(f"{source} is not a diffusers pipeline: it has no model_index.json")
    index = _json(path, source)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"pipeline {name} of {source} is not supported yet; supported are {', '.join(PIPELINES)}")
    network, scheduler = (index.get(component, [None, None])[1] for component in _COMPONENTS)
    if network != "UNet2DModel":
        raise UserError(f"network {network} of {source} is not supported yet; supported is UNet2DModel")
    known = sorted(kind.__name__ for kind in SUPPORTED)
    if scheduler not in known:
        raise UserError(f"scheduler {scheduler} of {source} is not supported; supported are {', '.join(known)}")
    return index


def _json(path: Path, source: str) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot read {path.parent.name}/{path.name}: {error}") from None


def _check_unet(config: dict, source: str) -> None:
    channels = config.get("in_channels"), config.get("out_channels")
    if channels[0] is None or channels[0] != channels[1]:
        raise UserError(
            f"{source}: the UNet maps {channels[0]} to {channels[1]} channels; networks that "
            "also predict a variance are not supported"
        )
    if config.get("time_embedding_type", "positional") != "positional" or config.get("class_embed_type"):
        raise UserError(f"{source}: only UNet2DModel with positional time and plain class embeddings is supported")
    if config.get("sample_size") is None:
        raise UserError(f"{source}: unet/config.json has no sample_size, so the size of a sample is unknown")
