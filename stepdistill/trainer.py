"""The training loop: roles and their turns, optimizers, averages, what is watched; no equation."""

from __future__ import annotations

import copy
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator, cpu_offload_with_hook
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones.conditioned import Conditioned
from .config import Training
from .copies import sharing
from .denoiser import Denoiser
from .errors import Diverged
from .learners import compiled, learning, optimizer_of, tune
from .memory import keep_freed_memory
from .methods.base import Batch, Method, Nets, Snapshots
from .snapshots import Remembered

_STOP = "stop"


class Trainer:
    """Runs a method's turns: for each, one role learns and everyone else is frozen.

    Every trained role has two faces on the same storage: the *learner*, prepared by accelerate, and a frozen
    twin whose parameters never require a gradient.  A turn picks one learner and the twins of the others, so
    nothing is switched on or off between turns.  Networks stay in evaluation mode: no dropout.

    Args:
        method: the equations.
        teacher: the frozen denoiser.
        networks: one network per trained role (``student`` and ``method.roles``), taken over; the parameters that
            require a gradient learn.
        training: the ``training`` section.
        steps: length of the run, for learning-rate schedules.
        batches: draws one data-free batch of a given size.
        accelerator: devices, precision and processes.
        snapshots: keeps networks for methods that go back to them.
        watch: receives ``(step, scalars averaged over processes)`` of every finite step.
    """

    def __init__(
        self,
        method: Method,
        teacher: Denoiser,
        networks: dict[str, nn.Module],
        training: Training,
        *,
        steps: int,
        batches: Callable[[int], Batch],
        accelerator: Accelerator,
        snapshots: Snapshots | None = None,
        watch: Callable[[int, dict[str, float]], object] = lambda step, log: None,
    ) -> None:
        self.method, self.training, self.batches, self.accelerator = method, training, batches, accelerator
        self.snapshots, self.memory = snapshots or Remembered(), {}
        self.watch, self.stop_requested, self.stopping = watch, False, False
        self._pending: list[_Arriving] = []
        self.schedules: dict[str, Any] = {}
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        tune(teacher.network.requires_grad_(False).eval().to(teacher.device or accelerator.device), training)
        self.progress = Progress()
        self.learners: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        teacher = replace(teacher, at_once=training.frozen_batch_size)
        self.frozen: dict[str, Denoiser] = {"teacher": teacher}
        bare = replace(teacher, guidance=None, device=None)
        for role, network in networks.items():
            tune(network.eval().to(accelerator.device), training)
            twin = sharing(network)
            compiled(network, training, role)
            settings = training.role_optimizers.get(role, training.optimizer)
            optimizer, name = optimizer_of(settings, network), settings.lr_schedule or training.lr_schedule
            schedule = get_scheduler(
                name, optimizer, num_warmup_steps=training.lr_warmup_steps, num_training_steps=steps
            )
            # Not placed again: moved to "cpu:0", as accelerate calls the CPU of several processes, a weight is copied.
            placement: Any = [False, None]
            prepared = accelerator.prepare(network, optimizer, device_placement=placement)
            self.learners[role], self.optimizers[role] = prepared
            scaled = isinstance(network, Conditioned) and network.scale is not None
            self.frozen[role] = replace(bare, network=compiled(twin, training, role), told_scale=scaled)
            accelerator.register_for_checkpointing(schedule)
            self.schedules[role] = schedule
        for role in method.frozen_roles:
            network = compiled(copy.deepcopy(teacher.network), training, role)
            self.frozen[role] = replace(bare, network=network, device=teacher.device)
        compiled(teacher.network, training, "teacher")
        self._teacher_away: Callable[[], object] = lambda: None
        if training.offload_teacher:  # after copies were made of it
            _, hook = cpu_offload_with_hook(teacher.network, accelerator.device)
            self._teacher_away = hook.offload
        self.nets: dict[str, Nets] = {
            role: {
                **self.frozen,
                role: replace(self.frozen[role], network=learner, at_once=None),
                "still": self.frozen[role],
            }
            for role, learner in self.learners.items()
        }
        self.student = accelerator.unwrap_model(self.learners["student"])
        self.learning = learning(self.student)
        self.ema = EMAModel(self.learning, foreach=True) if training.ema_halflife_images else None
        accelerator.register_for_checkpointing(self.progress, *([self.ema] if self.ema else []))

    @property
    def images_per_step(self) -> int:
        """Samples that the student is trained on in one step, over all processes."""
        return self.training.batch_size * self.training.gradient_accumulation * self.accelerator.num_processes

    def step(self) -> dict[str, Tensor]:
        """Every turn of the method once; the logged scalars of this process, on the device."""
        logs: dict[str, list[Tensor]] = {}
        rounds = self.training.gradient_accumulation
        self.method.prepare(self.progress.step, self.frozen, self.snapshots)
        for role, loss, update in self.method.turns(self.progress.step):
            for k in range(rounds):
                with self._synchronised(role, last=update and k == rounds - 1):
                    with self.accelerator.autocast():
                        batch = replace(self.batches(self.training.batch_size), memory=self.memory)
                        value, watched = loss(self.nets[role], batch)
                    self.accelerator.backward(value / rounds)
                for key, scalar in watched.items():
                    logs.setdefault(f"{role}/{key}", []).append(scalar)
            self._teacher_away()
            if update:
                self._update(role)
        with warnings.catch_warnings():
            # A role that has not learned yet (DisBack's student while it records) follows the schedule all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in self.schedules.values():
                schedule.step()
        self.progress.step += 1
        return {name: torch.stack(scalars).mean() for name, scalars in logs.items()}

    def _synchronised(self, role: str, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes in the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.learners[role])

    def _update(self, role: str) -> None:
        """Clip, step, zero; the average of the student follows its weights."""
        optimizer = self.optimizers[role]
        if self.training.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.learners[role].parameters(), self.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if role == "student" and self.ema is not None and self.training.ema_halflife_images is not None:
            images = (self.progress.step + 1) * self.images_per_step
            halflife = min(self.training.ema_halflife_images, self.training.ema_rampup * images)
            self.ema.decay = self.ema.min_decay = 0.5 ** (self.images_per_step / halflife)
            self.ema.step(self.learning)

    def run(self, steps: int) -> Iterator[int]:
        """Train up to ``steps`` or until every process knows of a request to stop; yields each step's number.

        Numbers go to ``watch`` as they arrive: at once on a CPU, one step late on a GPU, so that the host never
        waits for the step it just queued.  ``settle`` catches up before anything is written.

        Raises:
            Diverged: on all processes, naming the term that stopped being finite.
        """
        late = 1 if self.accelerator.device.type == "cuda" else 0
        while self.progress.step < steps and not self.stopping:
            log = self.step()
            log[_STOP] = torch.full((), float(self.stop_requested), device=self.accelerator.device)
            self._pending.append(_Arriving(self.progress.step, list(log), self._averaged(log)))
            if len(self._pending) > late:
                self._arrive(self._pending.pop(0))
            yield self.progress.step
        self.settle()

    def settle(self) -> None:
        """Make sure that every step so far, and every weight, is finite.

        Raises:
            Diverged: naming what is not.
        """
        while self._pending:
            self._arrive(self._pending.pop(0))
        for role, learner in self.learners.items():
            norm = torch.nn.utils.get_total_norm(list(learner.parameters()))
            if not bool(norm.isfinite()):
                raise Diverged(f"step {self.progress.step}: the weights of {role} are no longer finite")

    def _arrive(self, arriving: _Arriving) -> None:
        log = arriving.log()
        self.stopping |= log.pop(_STOP) > 0
        bad = [f"{name} is {value}" for name, value in log.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"step {arriving.step}: {', '.join(bad)}")
        self.watch(arriving.step, log)

    def _averaged(self, log: dict[str, Tensor]) -> Tensor:
        values = torch.stack([value.float() for value in log.values()])
        if self.accelerator.num_processes > 1:
            values = cast(Tensor, self.accelerator.reduce(values, reduction="mean"))
        return values

    @contextmanager
    def averaged_weights(self) -> Iterator[Denoiser]:
        """The student as a frozen denoiser with its averaged weights; the trained ones return afterwards, exactly."""
        if self.ema is None:
            yield self.frozen["student"]
            return
        self.ema.store(self.learning)
        self.ema.copy_to(self.learning)
        try:
            yield self.frozen["student"]
        finally:
            self.ema.restore(self.learning)

    def save(self, folder: Path) -> None:
        """Write weights, optimizers, averages, schedules, step and every process's random state."""
        self.accelerator.save_state(str(folder))
        if self.memory:
            # The file format takes neither views of one storage nor other strides.
            kept = {key: value.clone(memory_format=torch.contiguous_format) for key, value in self.memory.items()}
            save_file(kept, folder / self._memory_file)

    def load(self, folder: Path) -> None:
        """Continue exactly where ``save`` was called."""
        self.accelerator.load_state(str(folder))
        if (folder / self._memory_file).is_file():
            read = load_file(folder / self._memory_file, device=str(self.accelerator.device))
            self.memory.update({key: value.clone() for key, value in read.items()})  # aligned, as it was
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    @property
    def _memory_file(self) -> str:
        """Every process remembers its own."""
        return f"memory_{self.accelerator.process_index}.safetensors"


class Progress:
    """Where a run stands; part of a checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint holds."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.step = state["step"]


@contextmanager
def stop_signals(trainer: Trainer) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks the trainer to stop after the step; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        trainer.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Arriving:
    """Numbers of one step on their way to the host."""

    def __init__(self, step: int, names: list[str], values: Tensor) -> None:
        self.step, self.names, self.ready = step, names, None
        if values.is_cuda:
            self.host = torch.empty(len(values), pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()
        else:
            self.host = values

    def log(self) -> dict[str, float]:
        """The numbers, once this step is done; later steps may still be running."""
        if self.ready is not None:
            self.ready.synchronize()
        return dict(zip(self.names, self.host.tolist(), strict=True))
