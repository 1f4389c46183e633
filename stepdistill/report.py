"""What a finished run shows a person: the picture, the table, the lines that use the student, the model card."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import yaml
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from yaml import YAMLError

from . import __version__
from .bundled import BUILTIN
from .config import Config
from .errors import UserError
from .evaluation import Measurement
from .images import to_picture, to_uint8
from .metrics.protocols import Protocol
from .plain import PYTHON
from .results import shown
from .sources import is_local

mpl.use("Agg")
import matplotlib.pyplot as plt

CARD = "README.md"
PLACE = "PATH_OR_REPO"
"""Where the lines of a card name the folder or repository that it lies in."""


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """``(N, C, H, W)`` in [-1, 1] as one picture with a one-pixel frame."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tiles = images.new_ones(rows * columns, channels, height + 1, width + 1)
    tiles[:count, :, :height, :width] = images
    tiles = tiles.reshape(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    return to_picture(to_uint8(tiles.reshape(channels, rows * (height + 1), columns * (width + 1))))


def picture(
    path: Path,
    teacher: Tensor,
    student: Tensor,
    history: list[dict[str, float]],
    protocol: Protocol | None,
    *,
    title: str,
    steps: int,
) -> None:
    """Teacher and student from the same noise, side by side, above the curve of what ``protocol`` measures first."""
    figure, axes = plt.subplot_mosaic(
        [["teacher", "student"], ["curve", "curve"]], figsize=(8, 7), height_ratios=[5, 3]
    )
    for name, images in (("teacher", teacher), ("student", student)):
        axes[name].imshow(grid(images), cmap="gray", vmin=0, vmax=255)
        axes[name].set_axis_off()
    axes["teacher"].set_title("teacher")
    axes["student"].set_title(f"student, {steps} step{'s'[: steps - 1]}, same noise")
    _curve(axes["curve"], history, protocol)
    figure.suptitle(title)
    write_figure(path, figure)


def write_figure(path: Path, figure: Figure) -> None:
    """Write ``figure`` as a PNG, whole or not at all, and close it.

    Raises:
        UserError: it cannot be written.
    """
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=110, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


def _curve(axis: plt.Axes, history: list[dict[str, float]], protocol: Protocol | None) -> None:
    """What was measured of the student where it was; every logged loss otherwise."""
    name = protocol.values[0] if protocol else ""
    measured = [(row["images"], row[name]) for row in history if name in row]
    if protocol and measured:
        axis.plot(*zip(*measured, strict=True), marker="o", label=f"{protocol.title(name)} of the student")
    else:
        for name in sorted({key for row in history for key in row if key.endswith("/loss")}):
            points = [(row["images"], row[name]) for row in history if name in row]
            axis.plot(*zip(*points, strict=True), label=name)
    if measured and min(value for _, value in measured) > 0:
        axis.set_yscale("log")
    axis.set_xlabel("generated images seen in training")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def table(rows: Sequence[Measurement], protocol: Protocol) -> str:
    """Measured values, network calls and speed as aligned text; the last row is the student."""
    slowest = rows[0].images_per_second
    asked = any(row.prompt_accuracy is not None for row in rows)
    told = "".join(f"{protocol.title(name) + ' (+- se)':>22}" for name in protocol.values)
    told += f"{'prompt accuracy':>17}" if asked else ""
    lines = [f"{'':<18}{told}{'network calls':>15}{'images/s':>11}{'speed-up':>10}"]
    for row in rows:
        told = "".join(f"{shown(row.metrics[name].value, row.metrics[name].se):>22}" for name in protocol.values)
        told += f"{row.prompt_accuracy:>17.3f}" if asked else ""
        ratio = f"{row.images_per_second / slowest:.1f}x"
        lines.append(f"{row.label:<18}{told}{row.network_calls:>15}{row.images_per_second:>11.0f}{ratio:>10}")
    return "\n".join(lines)


def usage(
    folder: Path,
    steps: int,
    call: dict[str, Any],
    without: Iterable[str] = (),
    *,
    code: str | None = None,
    sole: bool = False,
) -> str:
    """The lines of Python that use an exported student.

    Args:
        folder: path or hub id of the student.
        steps: its network calls.
        call: what a call says beside them; of lists, one entry.
        without: components that loading must be told to do without.
        code: name of the pipeline file that the folder has, which knows what to say.
        sole: no stock pipeline runs the student.
    """
    start = "from diffusers import DiffusionPipeline"
    plain = "\n".join([start, _loading(folder, without), *_calling(steps, call)])
    if code is None:
        return plain
    consent = ([] if sole else [f'custom_pipeline="{code}"']) + ["trust_remote_code=True"]
    told = {key: value for key, value in call.items() if isinstance(value, list)}
    own = "\n".join([start, _loading(folder, without, consent), *_calling(None, told)])
    return own if sole else f"{plain}\n\n# or with its own defaults, which are code in its folder:\n{own}"


def _loading(
    folder: Path, without: Iterable[str], consent: Iterable[str] = (), pipeline: str = "DiffusionPipeline"
) -> str:
    source = ", ".join([f'"{folder.as_posix()}"', *consent, *(f"{name}=None" for name in without)])
    return f"pipe = {pipeline}.from_pretrained({source})"


def _calling(steps: int | None, call: dict[str, Any]) -> list[str]:
    said: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    said |= {key: value for key, value in call.items() if key != "prompt"}
    if isinstance(said.get("class_labels"), list):
        said["class_labels"] = said["class_labels"][:1]
    words = [repr(prompt) for prompt in call.get("prompt", [])[:1]] + [
        f"{key}={value!r}" for key, value in said.items()
    ]
    return [f"image = pipe({', '.join(words)}).images[0]", 'image.save("sample.png")']


def usage_of_adapters(
    folder: Path,
    teacher: Path,
    scheduler: str,
    steps: int,
    call: dict[str, Any],
    without: Iterable[str],
    *,
    pipeline: str,
    component: str | None,
) -> str:
    """The lines of Python that use a student's adapters in the teacher's pipeline.

    Args:
        folder: path or hub id of the adapters.
        teacher: path or hub id of the pipeline.
        scheduler: class of the student's.
        steps: network calls.
        call: what a call says beside them.
        without: components that loading must be told to do without.
        pipeline: its class.
        component: the network's place in a pipeline that has no ``load_lora_weights``.
    """
    start, place = f"from diffusers import {scheduler}, {pipeline}", folder.as_posix()
    load = [f'pipe.load_lora_weights("{place}")']
    if component is not None:
        start += "\nfrom peft import PeftModel"
        adapted = f'PeftModel.from_pretrained(pipe.{component}, "{place}")'
        load = [f"pipe.{component} = {adapted}.merge_and_unload()"]
    return "\n".join(
        [
            start,
            _loading(teacher, without, pipeline=pipeline),
            *load,
            f'pipe.scheduler = {scheduler}.from_pretrained("{place}", subfolder="scheduler")',
            *_calling(steps, call),
        ]
    )


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``; a last line that a killed run wrote half of is left out."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


_FAMILIES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "sd3",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "FluxPipeline": "flux",
    "DiTPipeline": "dit",
}
"""Tags of the teacher's pipeline."""


def shown_name(source: str) -> str:
    """A teacher's name for others: hub id, ``builtin:...``, or what a folder or file is called here."""
    return source if source.startswith(BUILTIN) or not is_local(source) else Path(source).name


def licence(folder: Path) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of the card in ``folder``, as far as there is one."""
    try:
        told = ModelCard((folder / CARD).read_text(encoding="utf-8")).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):
        return {}
    return {key: str(told[key]) for key in ("license", "license_name", "license_link") if told.get(key)}


def card(
    config: Config,
    numbers: str | None,
    *,
    use: str,
    steps: int,
    picture_name: str | None,
    adapters: bool = False,
    pipeline: str = "",
    terms: Mapping[str, str] = MappingProxyType({}),
) -> ModelCard:
    """The model card of a student or its adapters: what it is, the lines that ``use`` it, its recipe, its ``table``.

    Args:
        config: of the run.
        numbers: the table.
        use: lines of Python.
        steps: network calls.
        picture_name: a file beside the card.
        adapters: the student is adapters.
        pipeline: class of the teacher's pipeline.
        terms: its ``licence``.
    """
    hub_id = None if is_local(config.teacher) else config.teacher
    told: Any = dict(terms)
    data = ModelCardData(
        **told,
        library_name="stepdistill" if config.teacher.startswith(PYTHON) else "diffusers",
        pipeline_tag="text-to-image" if config.data.prompts else "unconditional-image-generation",
        tags=[
            *(["diffusers"] if pipeline else []),
            *([_FAMILIES[pipeline]] if pipeline in _FAMILIES else []),
            *(["lora"] if adapters else []),
            "stepdistill",
            *(f"stepdistill-{stage.method.name}" for stage in config.plan),
            "one-step" if steps == 1 else "few-step",
            "distillation",
        ],
        base_model=hub_id,
        base_model_relation=("adapter" if adapters else "finetune") if hub_id else None,  # type: ignore[arg-type]
    )
    numbers = f"```\n{numbers}\n```\n" if numbers else "Not evaluated.\n"
    shown = f"![teacher and student from the same noise]({picture_name})\n\n" if picture_name else ""
    papers = "; ".join(dict.fromkeys(stage.method.paper for stage in config.plan))
    recipe = yaml.safe_dump(config.dump(), sort_keys=False)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {steps}-step student of {shown_name(config.teacher)}\n\n"
        f"Distilled without images by [stepdistill](https://pypi.org/project/stepdistill) {__version__} with "
        f"{config.methods_used} ({papers}).\n\n"
        f"{shown}"
        f"## Use\n\n```python\n{use}\n```\n\n"
        f"## Numbers\n\n{numbers}\n"
        f"## Recipe\n\n`stepdistill distill --config recipe.yaml` with\n\n```yaml\n{recipe}```\n"
    )
