"""What a run shows: previews and numbers on the way; at the end the student's folder, a picture, a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from tqdm.auto import tqdm

from .adapters import export_lora, kept_back, reads_adapters, save_peft
from .backbones.plain import PLAIN
from .backbones.unet2d import UNET2D
from .conditions import Cond
from .config import Config, Evaluate
from .data import DataFree
from .decoder import Decoder
from .denoiser import Denoiser
from .evaluation import Evaluator, Measurement
from .export import Host, empty_parts, export
from .hosting import Plan
from .labels import inputs
from .metrics.ranks import rank_and_world
from .own_code import code_of
from .plain_student import plain_usage
from .prompts import encode
from .report import (
    CARD,
    PLACE,
    card,
    grid,
    licence,
    picture,
    read_history,
    shown_name,
    table,
    usage,
    usage_of_adapters,
)
from .samplers import SampleNoise, StudentSampler, sample_ode
from .sources import is_local
from .styles import digits_of
from .teacher import Teacher

EVALUATION = "evaluation.json"
"""What was measured in the end, and by what."""
_PICTURE = "student.png"
_PEFT = "peft"
"""Where adapters are, in a student's folder, that the teacher's pipeline cannot run as they are."""
_SHOWN = 64


class Outcome:
    """Everything of a run that a person looks at; all processes measure, only the main one shows.

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
        self.evaluator = self._evaluator(config.evaluate) if config.evaluate else None

    def _evaluator(self, evaluate: Evaluate) -> Evaluator:
        return Evaluator(
            evaluate.reference,
            preset=evaluate.preset,
            metrics=evaluate.metrics,
            samples=evaluate.samples,
            batch_size=evaluate.batch_size,
            prompts=self._asked(max(evaluate.samples, evaluate.curve_samples)),
            inputs=inputs(self.data.told, self.data.conditions, evaluate.samples),
            device=self.data.device,
        )

    def preview(self, step: int, student: Denoiser, sampler: StudentSampler) -> None:
        """The student at fixed noise, the teacher beside."""
        ids = range(self.config.training.preview_samples)
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        if not (folder / "teacher.png").is_file():
            grid(self._generate(self.taught, ids, self.teacher.picture_steps)).save(folder / "teacher.png")
        grid(self._generate(student, ids, sampler)).save(folder / f"step_{step:08d}.png")

    def measured(self, student: Denoiser, sampler: StudentSampler) -> Measurement:
        """The student on the way."""
        assert self.config.evaluate is not None
        found = self._measure("student", student, sampler, self.config.evaluate.curve_samples)
        if not (self.folder / EVALUATION).is_file():
            self._note([])  # What the values are measured by is known before the run ends.
        return found

    def _note(self, rows: Sequence[Measurement]) -> None:
        if self.evaluator is not None and rank_and_world()[0] == 0:
            told = {"rows": [asdict(row) for row in rows], **self.evaluator.run.setting()}
            (self.folder / EVALUATION).write_text(json.dumps(told, indent=1) + "\n")

    def write(
        self, student: Denoiser, sampler: StudentSampler, hosted: Plan, folder: Path, rows: Sequence[Measurement] = ()
    ) -> None:
        """Export the student to ``folder``, with what was measured of it."""
        host = Host(self.teacher, self._call(hosted)) if hosted.family is not UNET2D else None
        told = {"shape": self.teacher.sample_shape, "cond": self._compared(2 if host else 4), "host": host}
        # The check of an export seeds the generators that the training draws from.
        with torch.random.fork_rng([self.data.device] if self.data.device.type == "cuda" else []):
            how = self.config.export
            export(student, sampler, hosted, folder, **told, own_code=how.own_code, check=how.check)
        self._card(rows, self._usage(Path(PLACE), hosted, folder), hosted.steps, None).save(folder / CARD)

    def finish(
        self,
        student: Denoiser,
        sampler: StudentSampler,
        hosted: Plan,
        rows: Sequence[Measurement],
        metrics: Path,
        *,
        adapted: bool = False,
    ) -> None:
        """Draw the exported student and write its card, of ``adapted`` ones adapters too; say where everything is."""
        use = self._usage(Path(PLACE), hosted, self.student_folder)
        self._picture(student, sampler, metrics)
        shutil.copyfile(self.folder / _PICTURE, self.student_folder / _PICTURE)
        self._card(rows, use, hosted.steps, _PICTURE).save(self.student_folder / CARD)
        if rows and self.evaluator:
            print(f"\n{table(rows, self.evaluator.protocol)}")
        lines = self._usage(self.student_folder, hosted, self.student_folder)
        unsure = "" if self.config.export.check else ", not compared with its sampler"
        print(f"\nstudent  {self.student_folder}{unsure}\npicture  {self.folder / _PICTURE}\n\n{lines}")
        if adapted and (reason := kept_back(self.teacher, hosted)):
            kept = self.student_folder / _PEFT
            save_peft(student.network, kept)
            print(f"\nadapters merged into the student: {reason}; by themselves, for the teacher's network, in {kept}")
        elif adapted:
            self._adapters(student, sampler, hosted, rows)

    def _adapters(self, student: Denoiser, sampler: StudentSampler, hosted: Plan, rows: Sequence[Measurement]) -> None:
        scale = self.config.data.scale if self.teacher.embeds_guidance else 1.0
        host = Host(self.teacher, {**self._call(hosted), "guidance_scale": scale})
        folder, check = self.folder / "student_lora", self.config.export.check
        told = {"shape": self.teacher.sample_shape, "cond": self._compared(2), "host": host}
        export_lora(student, sampler, hosted, folder, **told, check=check)
        source = self.teacher.folder if is_local(self.config.teacher) else Path(self.config.teacher)
        kind, without = type(hosted.scheduler).__name__, empty_parts(self.teacher.index)
        loaded = {
            "pipeline": self.teacher.index["_class_name"],
            "component": None if reads_adapters(self.teacher) else self.teacher.family.component,
        }
        lines, use = (
            usage_of_adapters(place, source, kind, hosted.steps, host.call, without, **loaded)
            for place in (folder, Path(PLACE))
        )
        shutil.copyfile(self.folder / _PICTURE, folder / _PICTURE)
        self._card(rows, use, hosted.steps, _PICTURE, adapters=True).save(folder / CARD)
        print(f"\nadapters {folder}, for the teacher's own pipeline:\n\n{lines}")

    def _compared(self, count: int) -> Cond:
        """What the first samples are told when an export is checked, whose text encoders are float32."""
        cond = self.data.cond(range(count))
        if not (self.data.prompts and self.config.export.check) or self.teacher.parts_dtype == "float32":
            return cond
        exact, _ = encode(replace(self.teacher, parts_dtype="float32"), self._asked(count) or (), None)
        return {**cond, **exact}

    def _usage(self, place: Path, hosted: Plan, folder: Path) -> str:
        """The lines that use the student in ``folder``, once it is at ``place``."""
        if self.teacher.family is PLAIN:
            return plain_usage(place, self.teacher)
        code = code_of(folder)
        lines = usage(
            place,
            hosted.steps,
            self._call(hosted),
            empty_parts(self.teacher.index),
            code=code and code.stem,
            sole=hosted.grid is not None,
        )
        return lines + ("\n# or in more jumps of its flow map: num_inference_steps=4" if hosted.is_map else "")

    def _call(self, hosted: Plan) -> dict[str, Any]:
        """What a stock call says beside its number of steps, for the samples 0 and 1."""
        teacher, rows = self.teacher, self.data.rows(range(2)).tolist() if self.data.table else []
        call: dict[str, Any] = dict(hosted.family.arguments)
        if self.data.prompts:
            call = {"prompt": [self.data.prompts[row] for row in rows], **call}
        elif rows:
            call = {"class_labels": self.data.table["class_labels"][rows].tolist(), **call}
        if teacher.embeds_guidance and hosted.guidance is None:
            call["guidance_scale"] = self.config.data.scale
        usual = teacher.family.usual_size
        if self.config.data.resolution or usual not in (None, teacher.picture_size):
            call |= {"height": teacher.picture_size, "width": teacher.picture_size}
        return call

    @torch.no_grad()
    def _generate(self, denoiser: Denoiser, ids: Sequence[int], how: StudentSampler | int) -> Tensor:
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

    def _measure(
        self, label: str, denoiser: Denoiser, how: StudentSampler | int, samples: int, *, alone: bool = False
    ) -> Measurement:
        assert self.evaluator is not None
        asked = self._asked(samples)
        return self.evaluator.measure(
            label,
            how if isinstance(how, int) else len(how.times),
            lambda ids: self._generate(denoiser, ids, how),
            samples=samples,
            digits=digits_of(asked) if asked else None,
            alone=alone,
        )

    def _asked(self, count: int) -> tuple[str, ...] | None:
        """The prompts of the first samples, of a teacher that reads some."""
        rows = self.data.rows(range(count)) if self.data.prompts else []
        return tuple(self.data.prompts[row] for row in rows) or None

    def evaluate(self, student: Denoiser, sampler: StudentSampler) -> list[Measurement]:
        """Teacher and student, as many samples as the recipe asks for; nothing where it has no such section."""
        evaluate = self.config.evaluate
        if evaluate is None or self.evaluator is None:
            return []
        rows, main = [], rank_and_world()[0] == 0
        total = sum(evaluate.teacher_steps) + len(sampler.times)
        with tqdm(total=total, desc="evaluate", mininterval=1, disable=not main) as bar:
            for steps in evaluate.teacher_steps:
                rows.append(self._measure(f"teacher, {steps} steps", self.taught, steps, evaluate.samples, alone=True))
                bar.update(steps)
            rows.append(self._measure("student", student, sampler, evaluate.samples, alone=True))
            bar.update(len(sampler.times))
        self._note(rows)
        return rows

    def _picture(self, student: Denoiser, sampler: StudentSampler, metrics: Path) -> None:
        ids, steps = range(self.shown), self.teacher.picture_steps
        taught, learned = self._generate(self.taught, ids, steps), self._generate(student, ids, sampler)
        title = f"{self.config.methods_used}: {shown_name(self.config.teacher)}, teacher in {steps} steps"
        history, told = read_history(metrics), self.evaluator.protocol if self.evaluator else None
        picture(self.folder / _PICTURE, taught, learned, history, told, title=title, steps=len(sampler.times))

    def _card(
        self, rows: Sequence[Measurement], use: str, steps: int, picture_name: str | None, *, adapters: bool = False
    ) -> ModelCard:
        told = table(rows, self.evaluator.protocol) if rows and self.evaluator else None
        index, folder = self.teacher.index, self.teacher.folder
        return card(
            self.config,
            told,
            use=use,
            steps=steps,
            picture_name=picture_name,
            adapters=adapters,
            pipeline=index.get("_class_name", ""),
            terms=licence(folder) if index else {},
        )
