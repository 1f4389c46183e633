"""What a run would train, need and cost, found out on the meta device: no weights, no data, no GPU.

The training step itself runs, on tensors that have a shape and no numbers, so that what is reported is what the
code does and not what a formula says of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .backbones.plain import PLAIN
from .bundled import BUILTIN
from .conditions import Cond
from .config import Config, Evaluate, Stage, Training
from .counting import fused_attention, measured
from .data import DataFree, class_labels, draws, real_images, scales_drawn
from .learners import half_precision, learning, networks, tune
from .preflight import check_derivatives, check_trackers, checked
from .prompts import CACHE, read_prompts, row_bytes
from .quantization import quantized
from .teacher import Teacher, settings_of
from .trainer import Trainer

META = torch.device("meta")
_STATES = 2
"""Of Adam and its relatives: two moments of every weight that learns, of four bytes or, in 8-bit ones, of one."""


def dry_run(config: Config, *, tflops: float = 400.0, gpus: int = 1) -> str:
    """Build and check everything of ``config``, run a step without numbers, and say what a real run would take.

    Args:
        config: of the run; nothing is written.
        tflops: 10^12 operations per second that a device is taken to do: 400 is 40 % of an H100 in bfloat16.
        gpus: devices that the hours are told for, each with a batch of its own.

    Raises:
        UserError: as the run itself would, but for the weights.
    """
    check_trackers(config.training.trackers)
    config, missing = _with_prompts(config)
    teacher = _teacher(config)
    samplers, hosted = checked(config, teacher)
    if config.real_data:
        real_images(teacher, config.real_data)
    shape, process = "x".join(map(str, teacher.sample_shape)), teacher.denoiser.process
    lines = [
        f"teacher   {teacher.source}: {type(teacher.network).__name__}, {teacher.denoiser.target}, "
        f"{type(process).__name__}, samples of {shape}, pictures of {teacher.picture_size} pixels, "
        f"guidance {' to '.join(f'{scale:g}' for scale in config.data.scales or (config.data.scale,))}",
    ]
    hours = 0.0
    for number, (stage, sampler) in enumerate(zip(config.plan, samplers, strict=True), 1):
        times = ", ".join(f"{time:.4g}" for time in sampler.times)
        lines += ["", f"stage {number}: {stage.method.name}, {len(sampler.times)} call(s) at t = {times}"]
        rehearsal = rehearse(stage, config)
        lines += rehearsal.lines(stage, tflops)
        hours += rehearsal.flops * stage.steps / (tflops * 1e12) / 3600
    if teacher.family is PLAIN:
        host = f"weights for the network of {teacher.source}"
    else:
        pipeline = hosted.pipeline.__name__ if hosted.pipeline else teacher.index["_class_name"]
        host = f"{pipeline} with {hosted.scheduler_name}"
    lines += [
        "",
        f"student   {host}, {hosted.steps} network call(s)",
        f"cost      {_cost(config, hours, gpus, tflops)}",
    ]
    lines += [f"evaluate  {_judged(config.evaluate)}"] if config.evaluate else []
    if config.data.prompts:
        count = len(set(read_prompts(config.data.prompts)))
        kept = f"{count:,} distinct, {_size(count * row_bytes(teacher))} in {CACHE}, read row by row"
        lines += [f"prompts   {missing or kept}"]
    return "\n".join(lines)


def _with_prompts(config: Config) -> tuple[Config, str | None]:
    """``config`` with a prompt where its file does not exist yet, and a line that says so."""
    file = config.data.prompts
    if not isinstance(file, str) or file.startswith(BUILTIN) or Path(file).expanduser().exists():
        return config, None
    data = config.data.model_copy(update={"prompts": ("a prompt",)})
    return config.model_copy(update={"data": data}), f"{file} is not there yet; a run needs it, one prompt a line"


def _cost(config: Config, hours: float, gpus: int, tflops: float) -> str:
    """GPU hours of the training; devices have batches of their own, so that more of them need fewer steps."""
    samples = sum(
        stage.steps * told.batch_size * told.gradient_accumulation
        for stage in config.plan
        for told in [cast(Training, stage.training)]
    )
    said = f"{hours * gpus:.2g} GPU hours of training at {tflops:g} TFLOP/s (--tflops; 400 is 40 % of an H100 in bf16),"
    said += "\n          "
    if gpus == 1:
        return said + f"{samples:,} samples on one device; --gpus N says what N take"
    return said + (
        f"{hours:.2g} on each of {gpus} devices for {gpus * samples:,} samples; the {samples:,} of one device take "
        f"steps / {gpus}: {hours:.2g} GPU hours, {hours / gpus:.2g} on each"
    )


def _judged(told: Evaluate) -> str:
    said = f"{', '.join(told.protocol.values)} of {told.samples:,} images by {told.preset} against {told.reference}"
    said += f"; of {told.curve_samples:,} every {told.every_images:,} images" if told.every_images else ""
    return said + (f", the best by {told.best} kept" if told.best else "")


@dataclass(frozen=True)
class Role:
    """What one network of a run holds."""

    weights: int
    """Parameters in memory of its own; adapters share the teacher's."""
    learning: int
    """Those that learn."""
    resident: int
    """Bytes of weights, optimizer and average."""


@dataclass(frozen=True)
class Rehearsal:
    """A stage as it ran without numbers."""

    roles: dict[str, Role]
    peak: int
    """Bytes that a step needs on top: activations and the gradients of a turn; half-precision copies of what learns."""
    flops: int
    """Operations of a step on one device; of a student of several calls, in the mean."""

    @property
    def memory(self) -> int:
        """Bytes on each device, or on all that one process has."""
        return sum(role.resident for role in self.roles.values()) + self.peak

    def lines(self, stage: Stage, tflops: float) -> list[str]:
        """A table for people."""
        training = cast(Training, stage.training)
        rows = [
            f"  {name:<12}{role.weights / 1e6:>10.1f} M {role.learning / 1e6:>10.1f} M {_size(role.resident):>12}"
            for name, role in self.roles.items()
        ]
        seconds = self.flops / (tflops * 1e12)
        batch = f"{training.batch_size} x {training.gradient_accumulation}"
        apart, kept = training.teacher_device, _size(self.roles["teacher"].resident)
        where = f"two devices, the teacher's {kept} on {apart}" if apart else "each device"
        return [
            f"  {'network':<12}{'weights':>12}{'learning':>13}{'memory':>13}",
            *rows,
            f"  a step: batch {batch} on each device, {_size(self.peak)} of activations and gradients, "
            f"{self.flops / 1e12:.3g} TFLOP",
            f"  together {_size(self.memory)} on {where}; {stage.steps} steps, at {tflops:g} TFLOP/s about "
            f"{seconds:.2g} s each, {seconds * stage.steps / 3600:.2g} hours",
        ]


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rehearse(stage: Stage, config: Config) -> Rehearsal:
    """Run the end of ``stage`` on the meta device, in the precision of its training."""
    training = cast(Training, stage.training)
    teacher = quantized(_teacher(config), training)
    data = _data(config, teacher)
    tune(teacher.denoiser.network, training)
    settings = training.model_copy(update={"compile": None, "mixed_precision": "no", "offload_teacher": False})
    made = networks(stage.model_copy(update={"training": settings}), teacher, config.data)
    taught = teacher.guided(config.data, data.null, two_passes=training.guidance_in_two_passes)
    trainer = Trainer(
        stage.method, taught, made, settings, steps=stage.steps, batches=data.batch, accelerator=_OnMeta()
    )
    sampler = stage.method.sampler(taught.process)
    check_derivatives([stage], trainer.frozen["student"], sampler, data)
    frozen = {role: trainer.frozen[role].network for role in ("teacher", *stage.method.frozen_roles)}
    roles = {role: role_of(network, role, training) for role, network in {**frozen, **made}.items()}
    roles["teacher"] = replace(roles["teacher"], weights=sum(p.numel() for p in teacher.network.parameters()))
    if half := half_precision(training):
        for network in (*made.values(), *(net.network for net in trainer.frozen.values())):
            nn.Module.to(network, half)
            for layer in network.modules():
                if "compute_dtype" in vars(layer):  # of a GGUF file, which autocast sees to in a run
                    vars(layer)["compute_dtype"] = half
    steps = [Step(stage, trainer, at) for at in stage.method.typical(stage.steps - 1)]
    with patch.object(functional, "scaled_dot_product_attention", fused_attention):
        found = [measured(step, step.everything(), META) for step in steps]
        if trainer.memory:  # made once, by the first step
            found = [measured(step, step.everything(), META) for step in steps]
    peak, flops = max(peak for peak, _ in found), sum(flops for _, flops in found) / len(found)
    if half:  # weights in half precision, and gradients that are not
        peak += 4 * max(role.learning for role in roles.values())
    return Rehearsal(roles, peak, round(flops * training.gradient_accumulation / steps[0].rounds))


class Step:
    """The turns of step ``at``, without optimizers."""

    def __init__(self, stage: Stage, trainer: Trainer, at: int) -> None:
        self.stage, self.trainer, self.at = stage, trainer, at
        self.rounds = min(2, trainer.training.gradient_accumulation)  # further ones need what the second does

    def __call__(self) -> None:
        trainer = self.trainer
        for role, loss, update in self.stage.method.turns(self.at):
            for _ in range(self.rounds):
                batch = replace(trainer.batches(trainer.training.batch_size), memory=trainer.memory)
                loss(trainer.nets[role], batch).value.backward()
            if update:
                trainer.learners[role].zero_grad()

    def everything(self) -> list[Tensor]:
        """What is in memory before the step."""
        nets = [*self.trainer.learners.values(), *(net.network for net in self.trainer.frozen.values())]
        return [each for net in nets for each in (*net.parameters(), *net.buffers())] + [*self.trainer.memory.values()]


class _OnMeta(Accelerator):
    device = META  # type: ignore[assignment]


def role_of(network: nn.Module, role: str, training: Training) -> Role:
    """What ``network`` holds in the place ``role``."""
    own = learning(network) if role in training.lora else list(network.parameters())
    moved = sum(p.numel() for p in own if p.requires_grad)
    kind = training.role_optimizers.get(role, training.optimizer).name
    states = _STATES * (1 if "8bit" in kind.lower() else 4)
    average = 4 if role == "student" and training.ema_halflife_images else 0
    held = sum(_bytes(p) for p in own)
    return Role(sum(p.numel() for p in own), moved, held + moved * (states + average))


def _bytes(tensor: Any) -> int:  # noqa: ANN401
    """Of a quantised one, those of the tensors inside."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    inside = vars(tensor)
    return sum(_bytes(inside[name]) for name in tensor.__tensor_flatten__()[0])


def _teacher(config: Config) -> Teacher:
    teacher = settings_of(config)
    teacher.network.to(META)  # of a function's network, whose weights are of no use here
    return teacher


def _data(config: Config, teacher: Teacher) -> DataFree:
    """One row of zeros in place of what prompts would say."""
    images = torch.empty(1, *teacher.sample_shape, device=META) if config.real_data else None
    if teacher.family.encode is None:
        labels = class_labels(teacher.source, teacher.classes, config.data, teacher.null_label)
        drawn = draws(teacher.sample_shape, labels, META)
        return replace(drawn, images=images, scales=scales_drawn(teacher, config.data))
    table: Cond = {key: torch.zeros(1, *shape) for key, shape in teacher.family.told(teacher.network.config).items()}
    null = None if teacher.embeds_guidance else {key: value.to(META) for key, value in table.items()}
    if teacher.embeds_guidance:
        table = {**table, "guidance": torch.full((1,), config.data.scale)}
    return DataFree(teacher.sample_shape, META, table, null=null, scales=scales_drawn(teacher, config.data))
