"""Where the files of a pipeline are, in a folder, in this package or on the hub, and what its index says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import GatedRepoError

from .backbones import FAMILIES, Family
from .backbones.sana import SPRINT
from .bundled import BUILTIN, bundled
from .errors import UserError, first_line
from .parts import check_files, check_parts, check_whole
from .plain import PYTHON
from .schedulers import SUPPORTED

PIPELINES = (*(name for family in FAMILIES for name in family.pipelines), "LatentConsistencyModelPipeline")
"""Pipeline classes that can be distilled."""

DESCRIPTION = "stepdistill.json"
"""How a student generates, beside its pipeline."""

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "stable_diffusion_xl")
"""Where the classes of components may come from; the last two are diffusers' names for a safety checker."""

_OTHER_FORMATS = ["*.py", "*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.non_ema.*"]
"""Files of a hub repository that repeat the weights, and code; none of them is downloaded."""


def locate(source: str) -> Path:
    """The local folder of ``source``; of a hub repository only its settings."""
    if source.startswith(BUILTIN):
        folder = bundled("assets") / f"{source.removeprefix(BUILTIN)}_teacher"
        if not folder.is_dir():
            names = ", ".join(f"{BUILTIN}{path.name.removesuffix('_teacher')}" for path in _bundled_teachers())
            raise UserError(f"no bundled teacher {source!r}; bundled are {names}")
        return folder
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is None:
        raise UserError(f"teacher folder {source!r} does not exist")
    try:
        read_index(Path(hf_hub_download(source, "model_index.json")), source)
        return Path(snapshot_download(source, allow_patterns=["*.json"]))
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from None


def whole(source: str, folder: Path, index: dict[str, Any]) -> Path:
    """``folder`` with the weights of every component; they are downloaded where ``source`` is a hub id.

    Raises:
        UserError: weights are missing, damaged, pickles or variants; from the names of the files before any download.
    """
    there, names = _complete(source, folder, index), [name for name, kind in components(index).items() if kind]
    check_files(names, (file.relative_to(there).as_posix() for file in there.rglob("*.*")), source)
    for name in names:
        check_whole(part(there, name), source)
    return there


def _complete(source: str, folder: Path, index: dict[str, Any]) -> Path:
    names = [name for name, kind in components(index).items() if kind]
    if is_local(source):
        absent = [name for name in names if not part(folder, name).is_dir()]
        if absent:
            raise UserError(
                f"{source}: model_index.json names {', '.join(absent)}, which the folder lacks; complete it, or "
                "write [null, null] there for a part that the pipeline can do without"
            )
        return folder
    patterns = ["model_index.json", "README.md"]  # the card names the licence
    for name in names:
        patterns += [f"{name}/*"] if (folder / name).is_dir() else ["*config.json", "diffusion_pytorch_model*"]
    try:
        files = list_repo_files(source)
    except Exception:  # no network, no right: there may still be a copy, and what gives none says why
        files = None
    if files is not None:
        check_files(names, files, source)
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from None


def part(folder: Path, name: str) -> Path:
    """Where the files of a component are: the first pipelines on the hub keep them beside ``model_index.json``."""
    settings = "scheduler_config.json" if name == "scheduler" else "config.json"
    beside = not (folder / name).is_dir() and (folder / settings).is_file()
    return folder if beside else folder / name


def is_local(source: str) -> bool:
    """Whether ``source`` is bundled, a function or a folder here, and no hub id."""
    return source.startswith((BUILTIN, PYTHON)) or Path(source).expanduser().is_dir()


def components(index: dict[str, Any]) -> dict[str, str | None]:
    """The parts of a pipeline and their classes; ``None`` for one that it was saved without."""
    return {name: value[1] for name, value in index.items() if isinstance(value, list)}


def pipeline_class(index: dict[str, Any]) -> type[DiffusionPipeline]:
    """The stock class of a supported pipeline."""
    return getattr(diffusers, index["_class_name"])


def read_index(path: Path, source: str, *, student: bool = False) -> tuple[dict[str, Any], Family]:
    """``model_index.json`` and its family, refused unless pipeline, network and scheduler are supported.

    Args:
        path: of the file.
        source: the pipeline's name in errors.
        student: what an export wrote, under any scheduler; one with a pipeline file of its own is the stock pipeline
            behind that.
    """
    if not path.is_file():
        raise UserError(f"{source} is not a diffusers pipeline: it has no model_index.json")
    index = read_json(path, source)
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = _behind(path.with_name(DESCRIPTION), source, student=student)
        index.pop("target_embedding", None)  # of a flow map, by the same file
    foreign = [value[0] for value in index.values() if isinstance(value, list) and value[0] not in (None, *_LIBRARIES)]
    if foreign:
        raise UserError(f"{source} has parts by code of its own ({', '.join(map(str, foreign))}), which is not run")
    if index.get("_class_name") == "LatentConsistencyModelPipeline":
        index["_class_name"] = "StableDiffusionPipeline"  # the same parts, under any scheduler
    name = index.get("_class_name")
    families = (*FAMILIES, SPRINT) if student else FAMILIES
    family = next((family for family in families if name in family.pipelines), None)
    if family is None:
        raise UserError(f"pipeline {name} of {source} is not supported yet; supported are {', '.join(PIPELINES)}")
    network, scheduler = (index.get(part, [None, None])[1] for part in (family.component, "scheduler"))
    if network != family.network.__name__:
        raise UserError(
            f"network {network} of {source} is not supported yet; supported is {family.network.__name__} in {name}"
        )
    check_parts(pipeline_class(index), components(index), source)
    known = sorted(kind.__name__ for kind in SUPPORTED)
    if scheduler not in known and not student:
        raise UserError(f"scheduler {scheduler} of {source} is not supported; supported are {', '.join(known)}")
    return index, family


def _behind(description: Path, source: str, *, student: bool) -> str:
    """The stock pipeline behind a student's own pipeline file; no code from elsewhere is ever run."""
    stock = read_json(description, source).get("stock") if student and description.is_file() else None
    if not isinstance(stock, str):
        raise UserError(f"{source} comes with pipeline code of its own, which is not run; give a stock pipeline")
    return stock


def read_json(path: Path, source: str) -> dict[str, Any]:
    """The settings in ``path`` of the pipeline ``source``."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot read {path.parent.name}/{path.name}: {error}") from None


def _unreachable(source: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = first_line(error)
    if isinstance(error, GatedRepoError):
        reason = f"it is gated; accept its terms at https://huggingface.co/{source}, then `hf auth login`"
    return UserError(f"teacher {source!r} is no folder here, and the hub did not give it: {reason}")


def _bundled_teachers() -> list[Path]:
    return sorted(bundled("assets").glob("*_teacher"))
