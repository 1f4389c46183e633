"""From a configuration to a student on disk: the whole job, in order."""

from __future__ import annotations

import copy
import json
import signal
import statistics
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn
from tqdm.auto import tqdm

from .adapters import publish_adapters
from .best import Best
from .checkpoints import Checkpoints
from .config import Config, Training
from .data import data_free, real_images
from .decoder import Decoder
from .errors import Diverged, UserError
from .export import single_time
from .learners import check_machine, networks, tune
from .lora import merged
from .outcome import Outcome
from .preflight import check_derivatives, check_launch, check_output, check_teacher_device, check_trackers, checked
from .quantization import quantized
from .recipe import parse
from .report import read_history
from .snapshots import OnDisk
from .teacher import Teacher, settings_of, with_weights
from .trainer import Trainer, stop_signals


def distill(config: Config) -> Path:
    """Train, export and evaluate the student that ``config`` describes; returns its folder.

    Raises:
        UserError: the input cannot work; raised before anything is written.
        Diverged: the training stopped being finite; the last good checkpoint is kept.
        SystemExit: the run was interrupted; a checkpoint was written.
    """
    check_launch()
    check_output(config.output_dir, resume=config.resume)
    run = Run(config)
    check_machine(run.stages, run.accelerator.device)
    start = run.resume if config.resume else run.begin
    start()
    run.train()
    return run.finish()


def export_run(folder: Path, overrides: list[str]) -> Path:
    """Export and evaluate again the student of the newest checkpoint of the run in ``folder``; returns its folder.

    Raises:
        UserError: no run there, or one that has not come to its last stage.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; give the output_dir of `stepdistill distill`")
    run = Run(parse(Config, str(file), [*overrides, "resume=true", f"output_dir={folder}"]))
    run.resume(processes=False)
    if run.index + 1 < len(run.stages):
        raise UserError(f"{folder} has come to stage {run.index + 1} of {len(run.stages)}; train on with resume=true")
    return run.finish()


class Run:
    """One run: its folder, its parts, and what happens at which step."""

    def __init__(self, config: Config) -> None:
        """Build every part; nothing is written yet."""
        self.config, self.stages, self.folder = config, config.plan, config.output_dir
        check_trackers(config.training.trackers)
        teacher = settings_of(config)
        self.samplers, self.hosted = checked(config, teacher)
        images = real_images(teacher, config.real_data) if config.real_data else None
        self.teacher: Teacher = quantized(with_weights(teacher), config.training)
        self.accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision,
            log_with=list(config.training.trackers) or None,
            project_dir=str(self.folder),
            # The other processes wait while the main one exports.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
        check_teacher_device(config.training.teacher_device, self.accelerator.num_processes)
        set_seed(config.seed, device_specific=True)
        with self.accelerator.main_process_first():  # the others read the prompts that it has encoded
            self.data = data_free(self.teacher, config.data, self.accelerator.device)
        if images is not None:
            images = Decoder(self.teacher).encode(images, self.accelerator.device)
            self.data = replace(self.data, images=images)
        self.teacher.denoiser.network.to(self.accelerator.device)
        two_passes = config.training.guidance_in_two_passes
        taught = self.teacher.guided(config.data, self.data.null, two_passes=two_passes)
        self.taught = replace(taught, device=config.training.teacher_device)
        self.outcome, told = Outcome(config, self.teacher, self.taught, self.data), config.evaluate
        self.best = Best(self.folder / "best", told) if told and told.best else None
        self._since: dict[str, list[float]] = {}
        self._seconds, self._resumed = 0.0, time.monotonic()
        self._enter(0, None)
        check_derivatives(self.stages, self.trainer.frozen["student"], self.sampler, self.data)

    def _enter(self, index: int, student: nn.Module | None) -> None:
        """Build the trainer of stage ``index``, whose student starts as ``student`` or as the teacher."""
        self.index, stage = index, self.stages[index]
        self.stage, self.training, self.sampler = stage, cast(Training, stage.training), self.samplers[index]
        before = self.stages[:index]
        self.start = sum(earlier.steps for earlier in before)
        self.images = self.accelerator.num_processes * sum(
            earlier.steps * told.batch_size * told.gradient_accumulation
            for earlier in before
            for told in [cast(Training, earlier.training)]
        )
        place = f"stage_{index + 1}" if len(self.stages) > 1 else ""
        tune(self.taught.network, self.training)  # before adapters share its memory
        self.trainer = Trainer(
            stage.method,
            self.taught,
            networks(stage, self.teacher, self.config.data, student),
            self.training,
            steps=stage.steps,
            batches=self.data.batch,
            accelerator=Accelerator(),  # of the same state, without the networks of the stage before
            snapshots=OnDisk(
                self.folder / "snapshots" / place,
                self.accelerator,
                partial(publish_adapters, teacher=self.teacher) if index == 0 else None,  # later ones rest on a student
            ),
            watch=self._watch,
        )
        folder = self.folder / "checkpoints" / place
        self.checkpoints = Checkpoints(folder, self._identity(), kept=self.training.checkpoints_kept)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues."""
        values = self.config.dump()
        free = {"checkpoint_every", "checkpoints_kept", "log_every", "preview_every", "preview_samples", "trackers"}
        training = {key: value for key, value in values["training"].items() if key not in free}
        kept = {key: values[key] for key in ("teacher", "seed", "method", "stages", "data", "real_data")}
        del kept["data"]["shown_scale"]
        kept |= {"training": training, "processes": self.accelerator.num_processes}
        return json.loads(json.dumps({**kept, "network": self.teacher.network_size, "prompts": self.data.digest}))

    def begin(self) -> None:
        """Create the run's folder."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config.dump(), sort_keys=False))
        self.accelerator.wait_for_everyone()
        self._trackers()

    def resume(self, *, processes: bool = True) -> None:
        """Continue exactly from the newest checkpoint of the last stage that has one.

        Args:
            processes: as many as wrote it, and its prompts, which training needs and exporting does not.
        """
        for index in range(len(self.stages) - 1, 0, -1):
            if any((self.folder / "checkpoints" / f"stage_{index + 1}").glob("step_*")):
                self._enter(index, copy.deepcopy(self.teacher.network))  # the checkpoint has its weights
                break
        path, step = self.checkpoints.newest(free=() if processes else ("processes", "prompts"))
        self.trainer.load(path)
        step += self.start
        if self.accelerator.is_main_process:
            rows = [row for row in read_history(self._metrics) if row["step"] <= step]
            temporary = self._metrics.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.replace(self._metrics)
            self._seconds = rows[-1]["seconds"] if rows else 0.0
        self.accelerator.print(f"continuing {self.folder} from step {step}")
        self._trackers()

    def _trackers(self) -> None:
        if self.config.training.trackers:
            self.accelerator.init_trackers("stepdistill")

    def train(self) -> None:
        """Every stage to its last step; each starts from the averaged student of the one before."""
        self._train()
        while self.index + 1 < len(self.stages):
            with self.trainer.averaged_weights() as student:
                network = single_time(merged(student.network), self.taught.process, self.sampler)
            self._enter(self.index + 1, network)
            self._train()

    def _train(self) -> None:
        """Train this stage to its last step, with previews and checkpoints on the way."""
        training, trainer, last = self.training, self.trainer, self.stage.steps
        name = f"{self.stage.method.name}{f' {self.index + 1}/{len(self.stages)}' if len(self.stages) > 1 else ''}"
        shown = self.accelerator.is_main_process
        bar = tqdm(total=last, initial=trainer.progress.step, desc=name, mininterval=1, disable=not shown)
        try:
            with stop_signals(trainer) as received, bar as self.bar:
                for step in trainer.run(last):
                    bar.update()
                    if _every(step, training.preview_every):
                        self._preview(self.start + step)
                    if self._to_evaluate(self.start + step):
                        self._evaluate(self.start + step)
                    if _every(step, training.checkpoint_every) and step < last:
                        self._checkpoint()
                self._checkpoint()
        except Diverged as error:
            kept = self.checkpoints.all()
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise Diverged(f"{error}; {where}. Lower training.optimizer.lr or use mixed_precision=no") from None
        if trainer.stopping:
            total = sum(stage.steps for stage in self.stages)
            self.accelerator.print(
                f"stopped at step {self.start + trainer.progress.step} of {total}; continue with the same command and "
                "resume=true"
            )
            raise SystemExit(128 + (received or [signal.SIGTERM])[0])  # another process may have got the signal

    def finish(self) -> Path:
        """Export, judge and show the averaged student."""
        main, folder = self.accelerator.is_main_process, self.outcome.student_folder
        with torch.no_grad(), self.trainer.averaged_weights() as student:
            adapted = "student" in self.training.lora and self.index == 0  # later ones start from a student
            if main:
                self.outcome.write(student, self.sampler, self.hosted, folder)
            rows = self.outcome.evaluate(student, self.sampler)
            if main:
                self.outcome.finish(student, self.sampler, self.hosted, rows, self._metrics, adapted=adapted)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.outcome.student_folder

    def _watch(self, step: int, log: dict[str, float]) -> None:
        """Average the scalars between two log lines and write them."""
        for name, value in log.items():
            self._since.setdefault(name, []).append(value)
        if not _every(step, self.training.log_every):
            return
        means = {name: statistics.mean(values) for name, values in self._since.items()}
        self._since = {}
        self._log(self.start + step, means)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items() if name.endswith("/loss")})

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        seconds = self._seconds + time.monotonic() - self._resumed
        row = {"step": step, "images": self._images(step), "seconds": round(seconds, 2), **values}
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log(values, step=step)

    def _images(self, step: int) -> int:
        """Generated up to ``step`` of the run, which lies in this stage."""
        return self.images + (step - self.start) * self.trainer.images_per_step

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _checkpoint(self) -> None:
        self.trainer.settle()
        self.checkpoints.save(self.trainer.progress.step, self.accelerator, self.trainer.save)

    def _preview(self, step: int) -> None:
        if self.accelerator.is_main_process:
            with torch.no_grad(), self.trainer.averaged_weights() as student:
                self.outcome.preview(step, student, self.sampler)

    def _to_evaluate(self, step: int) -> bool:
        """Whether ``evaluate.every_images`` more have been generated; the last students may be the best."""
        told = self.config.evaluate
        if told is None or not told.every_images:
            return False
        last = told.best is not None and step == sum(stage.steps for stage in self.stages)
        return last or self._images(step) // told.every_images > self._images(step - 1) // told.every_images

    def _evaluate(self, step: int) -> None:
        """Measure the averaged student, every process its share of the samples; keep the best of the last stage's."""
        self.trainer.settle()
        with torch.no_grad(), self.trainer.averaged_weights() as student:
            measured = self.outcome.measured(student, self.sampler)
            self._log(step, {name: found.value for name, found in measured.metrics.items()})
            final = self.accelerator.is_main_process and self.index + 1 == len(self.stages)
            if final and self.best and self.best.beaten_by(measured.metrics):
                when = {"step": step, "images": self._images(step)}
                write = partial(self.outcome.write, student, self.sampler, self.hosted, rows=[measured])
                self.best.keep(measured.metrics, when, write)


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
