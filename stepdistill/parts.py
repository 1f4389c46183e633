"""What a pipeline must bring to be distilled, and the files that its weights must be in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from .errors import UserError, first_line

_WEIGHED = ("unet", "transformer", "vae", "text_encoder", "safety_checker", "image_encoder")
_TOLD = ("vae", "text_encoder", "tokenizer", "scheduler")
_SPARED = ("text_encoder_3", "tokenizer_3")
"""Stable Diffusion 3 goes without its T5."""


def check_parts(kind: type[DiffusionPipeline], parts: dict[str, str | None], source: str) -> None:
    """Refuse a pipeline of class ``kind`` without a part that training, pictures or the student need.

    Raises:
        UserError: naming what is missing.
    """
    wanted = [name for name in signature(kind.__init__).parameters if name.startswith(_TOLD) and name not in _SPARED]
    if absent := [name for name in wanted if parts.get(name) is None]:
        raise UserError(
            f"{source} has no {', '.join(absent)} in its model_index.json, which {kind.__name__} needs; save the whole "
            "pipeline"
        )


def check_files(parts: Iterable[str], files: Iterable[str], source: str) -> None:
    """Refuse weights that are pickles alone, or variants alone, or not there, and tokenizers without files.

    Args:
        parts: names of the components.
        files: of the pipeline, relative to it.
        source: its name in errors.

    Raises:
        UserError: saying how to write what is read.
    """
    names = set(files)
    for part in (part for part in parts if part.startswith("tokenizer")):
        if not any(name.startswith(f"{part}/") for name in names):
            raise UserError(f"{source} has no files in {part}/; complete it")
    for part in (part for part in parts if part.startswith(_WEIGHED)):
        own = {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")} or names
        whole = {name for name in own if name.endswith(".safetensors") and "/" not in name}
        # diffusion_pytorch_model.fp16.safetensors, and not model-00001-of-00002.safetensors
        variants = {name.split(".")[1].split("-")[0] for name in whole if name.count(".") > 1}
        if any(name.count(".") == 1 for name in whole):
            continue
        if variants:
            variant, reason = sorted(variants)[0], f"as the variant {', '.join(sorted(variants))} alone"
            load = f'"{source}", variant="{variant}"'
        elif any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in own):
            reason, load = "as pickles alone, which can run code when they are read", f'"{source}"'
        else:
            raise UserError(f"{source} has no weights in {part}/; complete it")
        raise UserError(
            f"{source} has its {part} {reason}; write what is read here by DiffusionPipeline.from_pretrained({load})"
            ".save_pretrained(FOLDER), and give that folder"
        )


def check_whole(folder: Path, source: str) -> None:
    """Refuse weights of a component that are cut short, pointers to others, or shards that are not all there.

    Raises:
        UserError: naming the file.
    """
    for index in folder.glob("*.safetensors.index.json"):
        shards: dict[str, Any] = json.loads(index.read_text())["weight_map"]
        if absent := sorted({name for name in shards.values() if not (folder / name).is_file()}):
            raise UserError(f"{source}: {folder.name}/{absent[0]} is missing, of {len(set(shards.values()))} shards")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{source}: {folder.name}/{file.name} is damaged ({first_line(error)}); copy or download it again"
            ) from None
