"""What a run shows: previews on the way; at the end the student's folder, its distances, a picture, a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from tqdm.auto import tqdm

from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .config import Config
from .data import DataFree
from .decoder import Decoder
from .denoiser import Denoiser
from .evaluation import Evaluator, Measurement
from .export import Host, empty_parts, export, export_lora, reads_adapters
from .hosting import Plan
from .own_code import code_of
from .plain_student import plain_usage
from .report import CARD, PLACE, card, grid, picture, read_history, table, usage, usage_of_adapters
from .samplers import SampleNoise, StudentSampler, sample_ode
from .sources import is_local
from .styles import digits_of
from .teacher import Teacher

_PICTURE = "student.png"
_SHOWN = 64


class Outcome:
    """Everything of a run that a person looks at; only the main process has one to show.

    Args:
        config: of the run.
        teacher: where the student comes from.
        taught: the teacher as the student sees it, with its guidance, on the run's device.
        data: conditions of sample ids.
    """

    def __init__(self, config: Config, teacher: Teacher, taught: Denoiser, data: DataFree) -> None:
        self.config, self.teacher, self.taught, self.data = config, teacher, taught, data
        self.folder, self.student_folder = config.output_dir, config.output_dir / "student"
        self.decode = Decoder(teacher)
        # A picture of a thousand pixels a side takes gigabytes to make: few are shown, and made, at a time.
        self.shown, self.at_once = (_SHOWN, 10_000) if teacher.picture_size <= 64 else (8, 4)
        self.evaluator = Evaluator(config.evaluate.reference) if config.evaluate else None

    def preview(self, step: int, student: Denoiser, sampler: StudentSampler) -> dict[str, float]:
        """The student at fixed noise, the teacher beside; the distance, where one is asked for."""
        ids = range(self.config.training.preview_samples)
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        if not (folder / "teacher.png").is_file():
            grid(self._generate(self.taught, ids, self.teacher.picture_steps)).save(folder / "teacher.png")
        grid(self._generate(student, ids, sampler)).save(folder / f"step_{step:08d}.png")
        if not (self.config.evaluate and self.config.evaluate.curve_samples):
            return {}
        measured = self._measure("student", student, sampler, self.config.evaluate.curve_samples)
        return {"fd": measured.distance.value}

    def finish(
        self, student: Denoiser, sampler: StudentSampler, hosted: Plan, metrics: Path, *, adapted: bool = False
    ) -> None:
        """Export the student, ``adapted`` ones as adapters too, evaluate it, and say where everything is."""
        host = Host(self.teacher, self._call()) if hosted.pipeline is None else None
        ids, shape = range(2 if host else 4), self.teacher.sample_shape
        cond = self.data.cond(ids)
        own_code = self.config.export.own_code
        export(student, sampler, hosted, self.student_folder, shape=shape, cond=cond, host=host, own_code=own_code)
        use = self._usage(Path(PLACE), hosted)
        self._card([], use, hosted.steps, None).save(self.student_folder / CARD)
        rows = self._evaluate(student, sampler)
        self._picture(student, sampler, metrics)
        shutil.copyfile(self.folder / _PICTURE, self.student_folder / _PICTURE)
        self._card(rows, use, hosted.steps, _PICTURE).save(self.student_folder / CARD)
        if rows and self.evaluator:
            print(f"\n{table(rows, self.evaluator.extractor.name)}")
        lines = self._usage(self.student_folder, hosted)
        print(f"\nstudent  {self.student_folder}\npicture  {self.folder / _PICTURE}\n\n{lines}")
        if adapted and host:
            host = Host(self.teacher, {"guidance_scale": 1.0, **self._call()})
            folder = self.folder / "student_lora"
            if export_lora(student, sampler, hosted, folder, shape=shape, cond=cond, host=host):
                source = self.teacher.folder if is_local(self.config.teacher) else Path(self.config.teacher)
                kind, without = type(hosted.scheduler).__name__, empty_parts(self.teacher.index)
                told = {
                    "pipeline": self.teacher.index["_class_name"],
                    "component": None if reads_adapters(self.teacher) else self.teacher.family.component,
                }
                lines, use = (
                    usage_of_adapters(place, source, kind, hosted.steps, host.call, without, **told)
                    for place in (folder, Path(PLACE))
                )
                shutil.copyfile(self.folder / _PICTURE, folder / _PICTURE)
                self._card(rows, use, hosted.steps, _PICTURE, adapters=True).save(folder / CARD)
                print(f"\nadapters {folder}, for the teacher's own pipeline:\n\n{lines}")

    def _usage(self, folder: Path, hosted: Plan) -> str:
        if self.teacher.family is PLAIN:
            return plain_usage(folder, self.teacher)
        code = code_of(self.student_folder)
        return usage(
            folder,
            hosted.steps,
            self._call(),
            empty_parts(self.teacher.index),
            code=code and code.stem,
            sole=hosted.grid is not None,
        )

    def _call(self) -> dict[str, Any]:
        """What a stock call says beside its number of steps, for the samples 0 and 1."""
        teacher, rows = self.teacher, self.data.rows(range(2)).tolist() if self.data.table else []
        call: dict[str, Any] = dict(teacher.family.arguments)
        if self.data.prompts:
            call = {"prompt": [self.data.prompts[row] for row in rows], **call}
        elif rows and teacher.family is not UNET2D:
            call = {"class_labels": self.data.table["class_labels"][rows].tolist(), **call}
        if teacher.embeds_guidance:
            call["guidance_scale"] = self.config.data.scale
        usual = teacher.family.usual_size
        if self.config.data.resolution or usual not in (None, teacher.picture_size):
            call |= {"height": teacher.picture_size, "width": teacher.picture_size}
        return call

    @torch.no_grad()
    def _generate(self, denoiser: Denoiser, ids: range, how: StudentSampler | int) -> Tensor:
        """The pictures of the samples ``ids``, as a student makes them or in that many DDIM steps."""
        made = []
        for start in range(0, len(ids), self.at_once):
            part = ids[start : start + self.at_once]
            noise, cond = SampleNoise(part, self.teacher.sample_shape, device=self.data.device), self.data.cond(part)
            if isinstance(how, int):
                made.append(sample_ode(denoiser, noise(), how, cond))
            else:
                made.append(how(denoiser, noise(), cond, renoise=noise))
        return self.decode(torch.cat(made))

    def _measure(self, label: str, denoiser: Denoiser, how: StudentSampler | int, samples: int) -> Measurement:
        assert self.evaluator is not None
        assert self.config.evaluate is not None
        asked = [self.data.prompts[row] for row in self.data.rows(range(samples))] if self.data.prompts else None
        return self.evaluator.measure(
            label,
            how if isinstance(how, int) else len(how.times),
            lambda ids: self._generate(denoiser, ids, how),
            samples=samples,
            batch_size=self.config.evaluate.batch_size,
            digits=digits_of(asked) if asked else None,
        )

    def _evaluate(self, student: Denoiser, sampler: StudentSampler) -> list[Measurement]:
        evaluate = self.config.evaluate
        if evaluate is None:
            return []
        rows = []
        with tqdm(total=sum(evaluate.teacher_steps) + len(sampler.times), desc="evaluate", mininterval=1) as bar:
            for steps in evaluate.teacher_steps:
                rows.append(self._measure(f"teacher, {steps} steps", self.taught, steps, evaluate.samples))
                bar.update(steps)
            rows.append(self._measure("student", student, sampler, evaluate.samples))
            bar.update(len(sampler.times))
        (self.folder / "evaluation.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return rows

    def _picture(self, student: Denoiser, sampler: StudentSampler, metrics: Path) -> None:
        ids, steps = range(self.shown), self.teacher.picture_steps
        taught, learned = self._generate(self.taught, ids, steps), self._generate(student, ids, sampler)
        title = f"{self.config.methods_used}: {self.config.teacher}, teacher in {steps} steps"
        history = read_history(metrics)
        picture(self.folder / _PICTURE, taught, learned, history, title=title, steps=len(sampler.times))

    def _card(
        self, rows: list[Measurement], use: str, steps: int, picture_name: str | None, *, adapters: bool = False
    ) -> ModelCard:
        metric = self.evaluator.extractor.name if self.evaluator else ""
        return card(self.config, rows, metric, use=use, steps=steps, picture_name=picture_name, adapters=adapters)
