"""Prompts: read from a file or a list, encoded once by the pipeline's own text encoders, kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import socket
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .backbones import Family
from .bundled import BUILTIN
from .conditions import Cond
from .config import Column
from .errors import UserError, first_line
from .sources import components, pipeline_class
from .streaming import write_rows
from .styles import CAPTIONS
from .teacher import Teacher

CACHE = Path(HF_HOME) / "stepdistill" / "prompts"
"""Where encoded prompts are kept, one file per text encoder and list of prompts."""

_BATCH = 16
_COUNTED = 1024
_NULL = "null."


def read_prompts(source: str | Sequence[str] | Column) -> list[str]:
    """The prompts of a text file, one a line, of a list or a dataset, or the captions of ``builtin:digits_text``.

    Blank lines and rows are skipped, with a warning that counts them; two quotation marks (``""``) are the empty
    caption.

    Raises:
        UserError: no file, not UTF-8 (naming the line), or no prompt in it.
    """
    if source == f"{BUILTIN}digits_text":
        return list(CAPTIONS)
    if isinstance(source, Column):
        name = f"column {source.column} of {source.dataset}"
        prompts = _filled(_column(source), name, "rows")
    elif not isinstance(source, str):
        prompts, name = list(source), "data.prompts"
    else:
        path, name = Path(source).expanduser(), source
        if not path.is_file():
            raise UserError(f"data.prompts: there is no file {source!r}; give a text file with one prompt a line")
        lines = path.read_bytes().split(b"\n")
        read = [_line(raw, k, source) for k, raw in enumerate(lines, 1)]
        prompts = _filled(read[: None if read[-1] else -1], source, "lines")  # nothing follows the end of the last
    if not prompts:
        raise UserError(f'{name} holds no prompt; write one a line, or "" for the empty caption')
    return prompts


def _filled(read: Sequence[str], name: str, places: str) -> list[str]:
    """Those that are not blank."""
    prompts = ["" if text == '""' else text for text in read if text]
    if blank := len(read) - len(prompts):
        warnings.warn(f'{name}: {blank} blank {places} are skipped; "" is the empty caption', stacklevel=3)
    return prompts


def blank_lines(source: str | Sequence[str] | Column) -> list[int]:
    """Numbers of the lines of a file, from 1, that ``read_prompts`` skips before the last prompt."""
    if not isinstance(source, str) or not Path(source).expanduser().is_file():
        return []
    lines = Path(source).expanduser().read_bytes().rstrip().split(b"\n")
    return [k for k, line in enumerate(lines, 1) if not line.strip()]


def _column(source: Column) -> list[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError("data.prompts names a dataset; pip install datasets") from None
    try:
        texts = datasets.load_dataset(source.dataset, split=source.split)[source.column]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data.prompts: cannot read {source.dataset}: {first_line(error)}") from None
    wrong = next((k for k, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise UserError(f"data.prompts: row {wrong} of column {source.column} of {source.dataset} is no text")
    return [text.strip() for text in texts]


def _line(raw: bytes, number: int, source: str) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: line {number} is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def encode(
    teacher: Teacher, prompts: Sequence[str], negative: str | None, *, device: torch.device | str = "cpu"
) -> tuple[Cond, Cond]:
    """The conditions of distinct ``prompts``, one row each, and of the negative one, on the CPU.

    Text encoders are loaded for this alone, in ``teacher.parts_dtype``, which the rows have too.  What they say is
    written to ``CACHE`` as it is made, and mapped into memory from there: rows that nobody asks for are not read.

    Raises:
        UserError: the text encoders cannot be read, or the kept file cannot be read or written.
    """
    path = CACHE / f"{_fingerprint(teacher, prompts, negative)}.safetensors"
    if not path.is_file():
        made, null = _encode(teacher, prompts, negative, device)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(made):
                write_rows(temporary, made, len(prompts), {_NULL + key: value for key, value in null.items()})
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write the encoded prompts to {path}: {first_line(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)
    try:
        return _split(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the encoded prompts in {path}: {error}; delete the file") from None


def row_bytes(teacher: Teacher) -> int:
    """What one encoded prompt takes on disk, about: masks count as numbers do."""
    numbers = sum(math.prod(shape) for shape in teacher.family.told(teacher.network.config).values())
    return getattr(torch, teacher.parts_dtype).itemsize * numbers


@torch.no_grad()
def _encode(
    teacher: Teacher, prompts: Sequence[str], negative: str | None, device: torch.device | str
) -> tuple[Generator[Cond, None, None], Cond]:
    """The conditions of the prompts, some rows at a time, and of the negative one."""
    family, config, size = teacher.family, teacher.network.config, teacher.picture_size
    encode = family.encode
    assert encode is not None
    pipeline = _text_part(teacher, family, device)
    _warn_of_long(pipeline, prompts)
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]

    def made() -> Generator[Cond, None, None]:
        with tqdm(batches, desc="encode prompts", mininterval=1, disable=len(batches) < 2) as bar:
            for batch in bar:
                yield encode(pipeline, batch, config, size)

    if family.null is None:
        return made(), encode(pipeline, [negative or ""], config, size)
    return made(), family.null(pipeline, negative, config, size)


def _warn_of_long(pipeline: Any, prompts: Sequence[str]) -> None:  # noqa: ANN401
    """Say which prompts a tokenizer cuts, as stock pipelines do."""
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        most, told = tokenizer.model_max_length, signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
        if told is not None and "CLIP" not in type(tokenizer).__name__:
            most = min(most, told.default)
        counts: list[int] = []
        for start in range(0, len(prompts), _COUNTED):
            some = list(prompts[start : start + _COUNTED])
            counts += map(len, tokenizer(some, truncation=False, verbose=False)["input_ids"])
        long = [k for k, count in enumerate(counts) if count > most]
        if long:
            warnings.warn(
                f"{len(long)} of {len(prompts)} prompts have more tokens than {name} reads ({most}); the rest of each "
                f"is not seen. The first: {prompts[long[0]][:60]!r}, {counts[long[0]]} tokens",
                stacklevel=3,
            )


def _text_part(teacher: Teacher, family: Family, device: torch.device | str) -> Any:  # noqa: ANN401
    """The stock pipeline with tokenizers, text encoders and a network without weights, whose settings it may read."""
    with torch.device("meta"):
        skeleton = family.network.from_config(teacher.network.config)
    left_out: dict[str, Any] = {
        name: None
        for name, kind in components(teacher.index).items()
        if name != family.component
        and (kind is None or not name.startswith(("text_encoder", "tokenizer", "scheduler")))
    }
    diffusers.utils.logging.disable_progress_bar()
    logging.disable_progress_bar()
    try:
        kind = pipeline_class(teacher.index)
        told = {**left_out, family.component: skeleton, "torch_dtype": getattr(torch, teacher.parts_dtype)}
        pipeline: Any = kind.from_pretrained(teacher.folder, **told)
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)
        return pipeline
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{teacher.source}: cannot read its tokenizer or text encoder: {reason}") from None


def _fingerprint(teacher: Teacher, prompts: Sequence[str], negative: str | None) -> str:
    """Of the text encoders' files, the pipeline's and the network's settings, the picture size and all prompts."""
    digest = hashlib.sha256()
    names = [*teacher.folder.glob("text_encoder*/*"), *teacher.folder.glob("tokenizer*/*")]
    for path in sorted(path for path in names if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.parent.name}/{path.name} {content}".encode())
    # Of settings that begin with a line, one says where the weights were read from, if they were.
    settings = {key: value for key, value in teacher.network.config.items() if not key.startswith("_")}
    told = [teacher.index, settings, teacher.picture_size, negative, list(prompts)]
    told += [] if teacher.parts_dtype == "float32" else [teacher.parts_dtype]
    digest.update(json.dumps(told, default=str).encode())
    return digest.hexdigest()[:32]


def _split(tensors: dict[str, Tensor]) -> tuple[Cond, Cond]:
    made = {key: value for key, value in tensors.items() if not key.startswith(_NULL)}
    return made, {key.removeprefix(_NULL): value for key, value in tensors.items() if key.startswith(_NULL)}
