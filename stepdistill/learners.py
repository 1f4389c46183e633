"""The networks of a run as it trains them: frozen twins, what learns and by which optimizer, memory and speed."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from .backbones.conditioned import Conditioned, time_embeddings
from .config import Data, Optimizer, Stage, Training
from .errors import UserError, first_line
from .lora import add_lora
from .quantization import check_quantized
from .teacher import Teacher

_OWN = {"adam": "torch.optim.Adam", "adamw": "torch.optim.AdamW"}


def networks(stage: Stage, teacher: Teacher, data: Data, student: nn.Module | None = None) -> dict[str, nn.Module]:
    """What learns in ``stage``, by role; the student starts as ``student``, or as the teacher as the others do.

    The student is also told the target time, where the method has one; every whole network that learns is told the
    guidance scale, where ``data`` has a range that the network is not told already.
    """
    made: dict[str, nn.Module] = {}
    lora = cast(Training, stage.training).lora
    scale = data.scale if data.scales and not teacher.embeds_guidance else None
    for role in ("student", *stage.method.roles):
        base = student if role == "student" and student is not None else teacher.network
        if role in lora:
            made[role] = add_lora(base, lora[role], role)
            continue
        network = copy.deepcopy(base).float()
        target = role == "student" and stage.method.two_times
        if target or scale is not None:
            network = Conditioned(network, target=target, scale=scale)
        made[role] = network.requires_grad_(True)
    return made


def learning(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def tune(network: nn.Module, training: Training) -> None:
    """Memory layout, attention and gradient checkpointing, which change no value; before ``network`` has a twin."""
    if training.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stock: Any = network.network if isinstance(network, Conditioned) else network
    if training.attention:
        stock.set_attention_backend(training.attention)
    if training.gradient_checkpointing:
        # Nothing here is random, so there is no state of generators to keep, which would make a GPU wait.
        plain = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        stock.enable_gradient_checkpointing(network.checkpointed if isinstance(network, Conditioned) else plain)
    elif isinstance(stock, ModelMixin) and stock.is_gradient_checkpointing:  # of the stage before
        stock.disable_gradient_checkpointing()


def compiled(network: nn.Module, training: Training, role: str) -> nn.Module:
    """The ``network`` of ``role``, in place, as ``torch.compile`` runs it where asked; copies of it are not."""
    backend = training.compile.get(role) if isinstance(training.compile, dict) else training.compile
    if backend:
        network.compile(backend=backend)
    return network


def optimizer_kind(config: Optimizer) -> type[torch.optim.Optimizer]:
    """The class that ``config.name`` names.

    Raises:
        UserError: there is none, or it is no optimizer.
    """
    try:
        kind = pkgutil.resolve_name(_OWN.get(config.name, config.name))
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"training.optimizer.name: cannot import {config.name!r} ({error}); give {', '.join(_OWN)} or the dotted "
            "name of a class, such as bitsandbytes.optim.AdamW8bit, whose package is installed"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"training.optimizer.name: {config.name} is no subclass of torch.optim.Optimizer")
    return kind


def optimizer_of(config: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of what learns in ``network``.

    Raises:
        UserError: the optimizer does not take ``config.options``.
    """
    kind: Any = optimizer_kind(config)
    told = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    options = {key: value for key, value in told.items() if key in signature(kind).parameters}
    if config.name in _OWN:
        options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in learning(network))
    try:
        return kind(learning(network), **options, **config.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"training.optimizer: {config.name} does not take {config.options}: {error}") from None


def check_learners(network: nn.Module, training: Training, *, conditioned: bool) -> None:
    """Refuse what cannot be done with ``network``, the teacher's, whose student may be ``Conditioned``.

    Raises:
        UserError: as said.
    """
    for config in (training.optimizer, *training.role_optimizers.values()):
        optimizer_kind(config)
    _check_backends(training)
    if conditioned and not time_embeddings(network):
        raise UserError(
            f"{type(network).__name__} has no place where a student can be told a second time, or a scale drawn from a "
            "range: a diffusers TimestepEmbedding named time_embedding; take another method, or one guidance scale"
        )
    if training.gradient_checkpointing and not isinstance(network, ModelMixin):
        raise UserError(
            "training.gradient_checkpointing is of diffusers' networks; remove it, and checkpoint in your own forward"
        )
    if training.attention:
        _check_attention(network, training.attention)
    if training.teacher_device and training.offload_teacher:
        raise UserError("training.teacher_device is where the teacher stays; remove it, or training.offload_teacher")
    if training.lora and (training.quantize_teacher or training.offload_teacher or training.teacher_device):
        raise UserError(
            "training.quantize_teacher, offload_teacher and teacher_device need a teacher whose memory nobody shares; "
            f"adapters rest on it: remove training.lora of {', '.join(training.lora)}, or set teacher_dtype=bfloat16"
        )
    if training.quantize_teacher:
        check_quantized(network, training.quantize_teacher)


def half_precision(training: Training) -> torch.dtype | None:
    """What autocast computes in, where it is asked for."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision)


def check_machine(stages: Sequence[Stage], device: torch.device) -> None:
    """Refuse attention and compilers that this machine cannot train with, each tried on a few numbers.

    Raises:
        UserError: naming the setting.
    """
    for training in (cast(Training, stage.training) for stage in stages):
        if training.attention:
            dtype = half_precision(training) or getattr(torch, training.teacher_dtype)
            _try("attention", training.attention, partial(_attend, training.attention, device, dtype))
        for compiler in _compilers(training):
            _try("compile", compiler, partial(_compile, compiler, device))


def _try(key: str, value: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        cause = vars(error).get("inner_exception", error)  # torch.compile wraps it
        raise UserError(f"training.{key}={value} does not work on this machine: {first_line(cause)}") from None


def _attend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.ones(1, 8, 1, 64, device=device, dtype=dtype, requires_grad=True)
    dispatch_attention_fn(rows, rows, rows, backend=AttentionBackendName(backend)).sum().backward()


def _compile(backend: str, device: torch.device) -> None:
    numbers = torch.ones(2, device=device, requires_grad=True)
    torch.compile(torch.square, backend=backend)(numbers).sum().backward()


def _compilers(training: Training) -> set[str]:
    asked = training.compile or {}
    return set(asked.values()) if isinstance(asked, dict) else {asked}


def _check_backends(training: Training) -> None:
    known = torch._dynamo.list_backends(())
    for backend in _compilers(training):
        if backend not in known:
            raise UserError(f"training.compile: no backend {backend!r}; there are {', '.join(known)}")


def _check_attention(network: nn.Module, backend: str) -> None:
    names = sorted(name.value for name in AttentionBackendName)
    if backend not in names:
        raise UserError(f"training.attention: no backend {backend!r}; there are {', '.join(names)}")
    chooses = any(isinstance(module, AttentionModuleMixin) for module in network.modules())
    if not (chooses and isinstance(network, ModelMixin)):
        raise UserError(f"training.attention: {type(network).__name__} leaves no choice of attention; remove it")
    try:
        cast(Any, network).set_attention_backend(backend)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"training.attention: {first_line(error)}") from None
