"""Students that are adapters travel as adapters too, for the teacher's own pipeline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .backbones.plain import PLAIN
from .conditions import Cond
from .copies import sharing
from .denoiser import Denoiser
from .errors import UserError
from .export import Host, accept, description_of, empty_parts, error_in_place, for_cpu
from .hosting import Plan, plan
from .samplers import StudentSampler
from .sources import DESCRIPTION, pipeline_class
from .teacher import Teacher


@torch.no_grad()
def export_lora(
    denoiser: Denoiser,
    sampler: StudentSampler,
    hosted: Plan,
    folder: Path,
    *,
    shape: tuple[int, ...],
    cond: Cond,
    host: Host,
    check: bool = True,
) -> None:
    """Write the adapters of a student that is made of them, and its scheduler, for the teacher's own pipeline.

    Raises:
        NotExported: see ``accept``; compared is the teacher's pipeline with the adapters.
    """
    assert hosted.scheduler is not None
    assert kept_back(host.teacher, hosted) is None
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_adapters(denoiser.network, temporary, host.teacher)
    hosted.scheduler.save_pretrained(temporary / "scheduler")
    (temporary / DESCRIPTION).write_text(json.dumps(description_of(sampler, hosted, host), indent=1) + "\n")

    def compare() -> float:
        pipeline = _adapted(host.teacher, temporary)
        pipeline.scheduler = hosted.scheduler
        return error_in_place(pipeline, *for_cpu(denoiser, cond), sampler, host, shape)

    accept(temporary, folder, compare if check else None)


def _adapted(teacher: Teacher, folder: Path) -> Any:  # noqa: ANN401
    """The teacher's pipeline with the adapters in ``folder``."""
    pipeline: Any = pipeline_class(teacher.index).from_pretrained(teacher.folder, **empty_parts(teacher.index))
    component = teacher.family.component
    module = pipeline.components[component]
    nn.Module.to(module, teacher.network.dtype).float()  # the weights that the adapters were trained on
    if reads_adapters(teacher):
        pipeline.load_lora_weights(folder)
    else:
        setattr(pipeline, component, PeftModel.from_pretrained(module, str(folder)).merge_and_unload())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_adapters(teacher: Teacher, folder: Path) -> Any:  # noqa: ANN401
    """The teacher's network with the adapters in ``folder``, on its memory; the teacher itself stays without."""
    network = sharing(teacher.network).eval()
    if reads_adapters(teacher):
        told = {"weight_name": LORA_WEIGHT_NAME_SAFE, "use_safetensors": True}
        network.load_lora_adapter(str(folder), prefix=teacher.family.component, **told)
    else:
        PeftModel.from_pretrained(network, str(folder))
    return network.requires_grad_(False)


def kept_back(teacher: Teacher, hosted: Plan) -> str | None:
    """Why a student's adapters do not make the teacher's own pipeline that student; ``None`` where they do."""
    if teacher.family is PLAIN:
        return f"{teacher.source} is no pipeline that could load them"
    if hosted.pipeline is not None:
        return f"the student runs in a {hosted.pipeline.__name__} of its own"
    if hosted.scheduler is None:
        return "no stock scheduler runs the student"
    if not math.isclose(hosted.map.output, hosted.output, rel_tol=1e-6):
        return "a scale is folded into the last layer, which has none"
    return None


def reads_adapters(teacher: Teacher) -> bool:
    """Whether the teacher's pipeline has ``load_lora_weights``."""
    return teacher.family is not PLAIN and issubclass(pipeline_class(teacher.index), LoraBaseMixin)


def save_adapters(network: Any, folder: Path, teacher: Teacher) -> None:  # noqa: ANN401
    """Write the adapters of ``network`` as the teacher's pipeline loads them; as peft does, where it loads none."""
    if not reads_adapters(teacher):
        save_peft(network, folder)
        return
    layers = {key: value.contiguous() for key, value in get_peft_model_state_dict(network).items()}
    component, settings = teacher.family.component, next(iter(network.peft_config.values()))
    told = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": settings.to_dict()}
    cast(Any, pipeline_class(teacher.index)).save_lora_weights(folder, **told)


def publish_adapters(denoiser: Denoiser, sampler: StudentSampler, folder: Path, *, teacher: Teacher) -> None:
    """Write the adapters of a student on the way and, where the teacher's pipeline runs it, the scheduler for that."""
    save_adapters(denoiser.network, folder, teacher)
    try:
        hosted = plan(denoiser, sampler, classes=teacher.classes, family=teacher.family)
    except UserError:  # no stock scheduler takes its steps
        return
    if hosted.scheduler is not None and kept_back(teacher, hosted) is None:
        hosted.scheduler.save_pretrained(folder / "scheduler")
        (folder / DESCRIPTION).write_text(json.dumps(description_of(sampler, hosted, None), indent=1) + "\n")


def save_peft(network: Any, folder: Path) -> None:  # noqa: ANN401
    """Write the adapters of ``network`` for ``PeftModel.from_pretrained`` on the network that they rest on."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    next(iter(network.peft_config.values())).save_pretrained(str(temporary))
    layers = get_peft_model_state_dict(network).items()
    whole = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in layers}
    save_file(whole, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
