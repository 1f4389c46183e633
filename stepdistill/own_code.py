"""The pipeline file that a student travels with where asked to: its own defaults, any grid of levels, a flow map."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .bundled import bundled

_TEMPLATE, _MAP = "student_v1", "flow_map_v1"
_BLANK = "STUDENT: dict[str, Any] = {}\n"
_CLASSES = {_TEMPLATE: "StudentPipeline", _MAP: "FlowMapPipeline"}


def write_code(
    folder: Path, *, stock: str, call: dict[str, Any], grid: dict[str, Any] | None, target: nn.Module | None = None
) -> Path:
    """Write the student's pipeline file into its ``folder``; returns it.

    Args:
        folder: an exported pipeline.
        stock: class of the stock pipeline that the student is called through.
        call: what a plain call says.
        grid: from ``grid`` where no stock scheduler runs the student: then the folder names the file's class.
        target: of a flow map, the embedding of the label of the level to go to, which is written too.
    """
    template = _TEMPLATE if target is None else _MAP
    student = {"stock": stock, "call": call, "grid": grid, "sole": grid is not None}
    text = (bundled("pipelines") / f"{template}.py").read_text()
    assert text.count(_BLANK) == 1
    text = text.replace(_BLANK, f"STUDENT: dict[str, Any] = {student!r}\n")
    # Two students in one process must not share a module.
    path = folder / f"{template}_{hashlib.sha256(text.encode()).hexdigest()[:10]}.py"
    path.write_text(text)
    if grid is not None:
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [path.stem, _CLASSES[template]]
        if target is not None:
            index["target_embedding"] = [path.stem, "TargetEmbedding"]
            _write_target(target, path, folder / "target_embedding")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path


def _write_target(target: Any, code: Path, folder: Path) -> None:  # noqa: ANN401
    """The embedding as ``TargetEmbedding`` of ``code``, which a folder of its class must hold too."""
    folder.mkdir()
    size = {"in_channels": target.linear_1.in_features, "time_embed_dim": target.linear_2.out_features}
    (folder / "config.json").write_text(json.dumps({"_class_name": "TargetEmbedding", **size}, indent=2) + "\n")
    weights = {f"embedding.{name}": value.detach().cpu().contiguous() for name, value in target.state_dict().items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copyfile(code, folder / code.name)


def code_of(folder: Path) -> Path | None:
    """The student's pipeline file in ``folder``, where it has one."""
    return next((path for name in _CLASSES for path in sorted(folder.glob(f"{name}_*.py"))), None)


def runs_own_code(pipeline: Any) -> bool:  # noqa: ANN401
    """Whether a loaded pipeline is of a class that came with its folder."""
    return type(pipeline).__module__.startswith("diffusers_modules")
