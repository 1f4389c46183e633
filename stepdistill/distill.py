"""From a configuration to a student on disk: the whole job, in order."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from .backbones.unet2d import TargetTimeUNet
from .checkpoints import Checkpoints
from .config import Config
from .data import data_free
from .denoiser import Denoiser
from .errors import Diverged, UserError
from .evaluation import Evaluator, Measurement
from .export import export, plan
from .preflight import check_evaluation, check_launch, check_output, check_trackers
from .report import card, grid, picture, read_history, table, usage
from .samplers import SampleNoise, sample_ode
from .teacher import Teacher, load_teacher
from .trainer import Trainer, stop_signals

_PICTURE = "student.png"
_SHOWN = 64


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
    if config.resume:
        run.resume()
    else:
        run.begin()
    run.train()
    return run.finish()


class Run:
    """One run: its folder, its parts, and what happens at which step."""

    def __init__(self, config: Config) -> None:
        """Build every part; nothing is written yet."""
        self.config, training = config, config.training
        self.folder, self.student_folder = config.output_dir, config.output_dir / "student"
        check_trackers(training.trackers)
        self.teacher: Teacher = load_teacher(config.teacher)
        try:
            config.method.check(self.teacher.denoiser)
        except ValueError as error:
            raise UserError(str(error)) from None
        roles = {"student", *config.method.roles}
        if unknown := set(training.role_optimizers) - roles:
            raise UserError(f"training.role_optimizers names {sorted(unknown)}; the roles are {sorted(roles)}")
        self.sampler = config.method.sampler(self.teacher.denoiser.process)
        self.hosted = plan(self.teacher.denoiser, self.sampler, classes=self.teacher.classes)
        check_evaluation(config.evaluate, self.teacher)
        self.evaluator = Evaluator(config.evaluate.reference) if config.evaluate else None
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=list(training.trackers) or None,
            project_dir=str(self.folder),
            # The other processes wait while the main one evaluates.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
        set_seed(config.seed, device_specific=True)
        self.data = data_free(self.teacher, config.data, self.accelerator.device)
        self.teacher.network.to(self.accelerator.device)  # type: ignore[arg-type]
        self.trainer = Trainer(
            config.method,
            self.teacher.guided(config.data),
            self._networks(),
            training,
            steps=config.steps,
            batches=self.data.batch,
            accelerator=self.accelerator,
            watch=self._watch,
        )
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self._identity(), kept=training.checkpoints_kept)
        self.bar = tqdm(
            total=config.steps, desc=config.method.name, mininterval=1, disable=not self.accelerator.is_main_process
        )
        self._sums: dict[str, float] = {}
        self._count, self._seconds, self._resumed = 0, 0.0, time.monotonic()

    def _networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {}
        for role in ("student", *self.config.method.roles):
            network = copy.deepcopy(self.teacher.network)
            two_times = role == "student" and self.config.method.two_times
            networks[role] = TargetTimeUNet(network) if two_times else network
        return networks

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues."""
        values = self.config.dump()
        free = {"checkpoint_every", "checkpoints_kept", "log_every", "preview_every", "preview_samples", "trackers"}
        training = {key: value for key, value in values["training"].items() if key not in free}
        processes = self.accelerator.num_processes
        kept = {key: values[key] for key in ("teacher", "seed", "method", "data")}
        return json.loads(json.dumps({**kept, "training": training, "processes": processes}))

    def begin(self) -> None:
        """Create the run's folder."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config.dump(), sort_keys=False))
        self.accelerator.wait_for_everyone()
        self._trackers()

    def resume(self) -> None:
        """Continue exactly from the newest checkpoint."""
        path, step = self.checkpoints.newest()
        self.trainer.load(path)
        if self.accelerator.is_main_process:
            rows = [row for row in read_history(self._metrics) if row["step"] <= step]
            temporary = self._metrics.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.replace(self._metrics)
            self._seconds = rows[-1]["seconds"] if rows else 0.0
        self.bar.update(step)
        self.accelerator.print(f"continuing {self.folder} from step {step}")
        self._trackers()

    def _trackers(self) -> None:
        if self.config.training.trackers:
            self.accelerator.init_trackers("stepdistill")

    def train(self) -> None:
        """Train to the last step, with previews and checkpoints on the way."""
        training, trainer = self.config.training, self.trainer
        try:
            with stop_signals(trainer) as received:
                for step in trainer.run(self.config.steps):
                    self.bar.update()
                    if _every(step, training.preview_every):
                        self._preview(step)
                    if _every(step, training.checkpoint_every) and step < self.config.steps:
                        self._checkpoint()
                self._checkpoint()
        except Diverged as error:
            last = self.checkpoints.all()
            where = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
            raise Diverged(f"{error}; {where}. Lower training.optimizer.lr or use mixed_precision=no") from None
        finally:
            self.bar.close()
        if trainer.stopping:
            self.accelerator.print(
                f"stopped at step {trainer.progress.step} of {self.config.steps}; continue with the same command and "
                "resume=true"
            )
            raise SystemExit(128 + (received or [signal.SIGTERM])[0])  # another process may have got the signal

    def finish(self) -> Path:
        """Export the averaged student, evaluate it against the teacher, and say where everything is."""
        if self.accelerator.is_main_process:
            with torch.no_grad(), self.trainer.averaged_weights() as student:
                shape = self.teacher.sample_shape
                cond = self.data.cond(range(4))
                export(student, self.sampler, self.hosted, self.student_folder, shape=shape, cond=cond)
                self._describe([], None)
                rows = self._evaluate(student)
                self._picture(student)
            self._describe(rows, _PICTURE)
            self._conclude(rows)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.student_folder

    def _watch(self, step: int, log: dict[str, float]) -> None:
        """Average the scalars between two log lines and write them."""
        for name, value in log.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if not _every(step, self.config.training.log_every):
            return
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        self._log(step, means)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items() if name.endswith("/loss")})

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        seconds = self._seconds + time.monotonic() - self._resumed
        row = {"step": step, "images": step * self.trainer.images_per_step, "seconds": round(seconds, 2), **values}
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log(values, step=step)

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _checkpoint(self) -> None:
        self.trainer.settle()
        self.checkpoints.save(self.trainer.progress.step, self.accelerator, self.trainer.save)

    def _generate(self, denoiser: Denoiser, ids: range, steps: int | None) -> Tensor:
        """The samples ``ids`` of the student (``steps`` None) or of the teacher in DDIM steps."""
        noise = SampleNoise(ids, self.teacher.sample_shape, device=self.data.device)()
        cond = self.data.cond(ids)
        if steps is None:
            return self.sampler(denoiser, noise, cond)
        return sample_ode(denoiser, noise, steps, cond)

    @torch.no_grad()
    def _preview(self, step: int) -> None:
        """The averaged student at fixed noise, the teacher beside, and the distance where one is asked for."""
        if not self.accelerator.is_main_process:
            return
        ids = range(self.config.training.preview_samples)
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        if not (folder / "teacher.png").is_file():
            taught = self._generate(self.trainer.frozen["teacher"], ids, self.teacher.picture_steps)
            grid(taught).save(folder / "teacher.png")
        with self.trainer.averaged_weights() as student:
            grid(self._generate(student, ids, None)).save(folder / f"step_{step:08d}.png")
            if self.config.evaluate and self.config.evaluate.curve_samples:
                measured = self._measure("student", student, None, self.config.evaluate.curve_samples)
                self._log(step, {"fd": measured.distance.value})

    def _measure(self, label: str, denoiser: Denoiser, steps: int | None, samples: int) -> Measurement:
        assert self.evaluator is not None
        assert self.config.evaluate is not None
        return self.evaluator.measure(
            label,
            steps or 1,
            lambda ids: self._generate(denoiser, ids, steps),
            samples=samples,
            batch_size=self.config.evaluate.batch_size,
        )

    def _evaluate(self, student: Denoiser) -> list[Measurement]:
        evaluate = self.config.evaluate
        if evaluate is None:
            return []
        teacher = self.trainer.frozen["teacher"]
        generators = [(f"teacher, {n} steps", teacher, n) for n in evaluate.teacher_steps] + [
            ("student", student, None)
        ]
        calls = sum(n or 1 for _, _, n in generators)
        with tqdm(total=calls, desc="evaluate", mininterval=1) as bar:
            rows = []
            for label, denoiser, steps in generators:
                rows.append(self._measure(label, denoiser, steps, evaluate.samples))
                bar.update(steps or 1)
        (self.folder / "evaluation.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return rows

    def _picture(self, student: Denoiser) -> None:
        ids = range(_SHOWN)
        taught = self._generate(self.trainer.frozen["teacher"], ids, self.teacher.picture_steps)
        learned = self._generate(student, ids, None)
        title = (
            f"{type(self.config.method).__name__}: {self.config.teacher}, teacher in {self.teacher.picture_steps} steps"
        )
        picture(self.folder / _PICTURE, taught, learned, read_history(self._metrics), title=title)
        shutil.copyfile(self.folder / _PICTURE, self.student_folder / _PICTURE)

    def _describe(self, rows: list[Measurement], picture_name: str | None) -> None:
        metric = self.evaluator.extractor.name if self.evaluator else ""
        paper = type(self.config.method).paper
        card(self.config, rows, metric, paper=paper, picture_name=picture_name).save(self.student_folder / "README.md")

    def _conclude(self, rows: list[Measurement]) -> None:
        if rows and self.evaluator:
            print(f"\n{table(rows, self.evaluator.extractor.name)}")
        print(f"\nstudent  {self.student_folder}\npicture  {self.folder / _PICTURE}\n\n{usage(self.student_folder)}")


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
