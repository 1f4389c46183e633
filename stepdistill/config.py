"""Run configurations: every section and key, checked whole before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from .methods import AnyMethod
from .metrics.presets import protocol
from .metrics.protocols import DIRECTIONS, Protocol
from .training_section import SHARED as SHARED
from .training_section import Lora as Lora
from .training_section import Optimizer as Optimizer
from .training_section import Precision as Precision
from .training_section import Section, Training

EnoughSamples = Annotated[int, Field(ge=20)]
"""The fewest samples a distance can be computed from: two per jackknife group."""


def _scale(value: Any) -> float | tuple[float, float]:  # noqa: ANN401
    match value:
        case int() | float() if value >= 0:
            return float(value)
        case (int() | float() as low, int() | float() as high) if 0 <= low < high:
            return float(low), float(high)
    raise ValueError("must be a number from 0 on, or a range [low, high] with low < high")


Scale = Annotated[float | tuple[float, float], BeforeValidator(_scale)]


class Column(Section):
    """The texts of a dataset, through ``datasets``."""

    dataset: str
    """Hub id, or a folder of JSON, CSV or Parquet files."""
    column: str = "text"
    split: str = "train"
    """As ``datasets`` reads it: ``train[:10000]`` is its first ten thousand rows."""


class Data(Section):
    """What the student is asked for; there are no images here."""

    class_labels: Literal["uniform"] | tuple[NonNegativeInt, ...] | dict[NonNegativeInt, PositiveFloat] | None = None
    """Labels of a class-conditional teacher: uniform over its classes, uniform over a list (repeats weigh), or a law
    ``{label: weight}``, to a ten-thousandth where the weights are not whole numbers of at most ten thousand in all."""
    prompts: str | tuple[str, ...] | Column | None = None
    """Text file with one prompt a line (``""`` is the empty caption), a list, or a column of a dataset; every one is
    equally likely."""
    negative_prompt: str | None = None
    """What guidance leads away from; null is what the stock pipeline takes."""
    resolution: PositiveInt | None = None
    """Height and width of the pictures in pixels; null is the teacher's own."""
    guidance_scale: Scale = 1.0
    """Classifier-free guidance of the teacher, 1 is none; for Flux the scale that the network is told.  Of a range
    every sample draws its own; a student that is not adapters is told it."""
    shown_scale: NonNegativeFloat | None = None
    """Of a range, the scale at which the student is shown, measured and exported; null is the middle.  `stepdistill
    export RUN data.shown_scale=3` exports a finished run at another."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance applies."""
    null_label: NonNegativeInt | None = None
    """The label that means "no class"; needed for guidance."""

    @property
    def scales(self) -> tuple[float, float] | None:
        """The range of guidance scales, where there is one."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else None

    @property
    def scale(self) -> float:
        """The guidance scale; the one shown of a range."""
        if not isinstance(self.guidance_scale, tuple):
            return self.guidance_scale
        return sum(self.guidance_scale) / 2 if self.shown_scale is None else self.shown_scale

    @model_validator(mode="after")
    def _within(self) -> Data:
        low, high = self.scales or (0.0, -1.0)
        if self.shown_scale is not None and not low <= self.shown_scale <= high:
            raise ValueError(
                f"shown_scale must lie in a range of guidance_scale, got {self.shown_scale:g} of {self.guidance_scale}"
            )
        return self


class RealData(Section):
    """Real images, for the adversarial term of a method; without this section a run is data-free."""

    images: str
    """Folder, ``.npz`` or ``builtin:digits``, of the teacher's size and channels; a VAE encodes them once.  They come
    without labels or prompts, so a teacher with these needs ``method.fake_guidance=0``."""


class Evaluate(Section):
    """How the student is judged: beside the teacher when the run ends, and on the way there."""

    reference: str
    """What to compare with: images or statistics, as ``stepdistill fid`` takes them."""
    preset: Annotated[str, AfterValidator(lambda name: protocol(name).name)] = "digits"
    """Protocol, of ``stepdistill fid presets``."""
    metrics: tuple[str, ...] = ("fid",)
    """In place of the protocol's."""
    samples: EnoughSamples = 5000
    """Of the student and of every row of the teacher, when the run ends."""
    batch_size: PositiveInt = 250
    """Samples at a time, on every process."""
    every_images: NonNegativeInt = 0
    """Generated images between measurements of the averaged student on the way; 0 is none."""
    curve_samples: EnoughSamples = 1000
    """Samples of those."""
    best: str | None = None
    """The measured value by which the best student of those measurements, and of one after the last step, is kept in
    ``output_dir/best``; null keeps none."""
    teacher_steps: tuple[PositiveInt, ...] = (50, 10, 1)
    """DDIM steps of the teacher's rows."""

    @model_validator(mode="after")
    def _measurable(self) -> Evaluate:
        names = self.protocol.values
        if len(set(names)) < len(names):
            raise ValueError(f"metrics names one twice: {', '.join(names)}")
        ranked = [name for name in names if name in DIRECTIONS]
        if self.best is not None and self.best not in ranked:
            raise ValueError(f"best is a measured value that has a better: {', '.join(ranked) or 'none here'}")
        if self.best is not None and not self.every_images:
            raise ValueError("best is chosen on the way; set every_images")
        return self

    @property
    def protocol(self) -> Protocol:
        """The preset with these metrics."""
        return protocol(self.preset).changed({"metrics": self.metrics})


class Export(Section):
    """How the student is written."""

    own_code: bool = False
    """Also write a pipeline file into the student's folder: a plain call is right with it, and students run that no
    stock scheduler has a place for.  Whoever loads it must consent, by ``trust_remote_code=True``."""
    sana_sprint: bool = False
    """Put a student of Sana that makes one step, or two, into Sana-Sprint's pipeline, which never guides."""
    check: bool = True
    """Compare the written pipeline with the student's sampler: on the CPU in float32, for hours at 1024 pixels."""


class Stage(Section):
    """One method's part of a run that chains several; its student starts as the one before it ended."""

    method: Annotated[AnyMethod, Field(discriminator="name")]
    steps: PositiveInt
    training: Training | None = None
    """In place of the run's ``training``, but for what all stages share: precision, teacher, attention, trackers."""


class Config(Section):
    """Everything that determines a run."""

    teacher: str
    """Folder, hub id or ``builtin:digits`` of the frozen teacher pipeline, or ``python:FILE.py:FUNCTION`` (or
    ``python:PACKAGE.MODULE:FUNCTION``), which is run and returns ``stepdistill.Plain(...)``."""
    output_dir: Path
    """Folder of the run; the student goes to ``output_dir/student``."""
    seed: NonNegativeInt = 0
    steps: PositiveInt | None = None
    """Training steps; one step is every turn of the method once."""
    resume: bool = False
    """Continue the run in ``output_dir`` from its newest checkpoint."""
    method: Annotated[AnyMethod, Field(discriminator="name")] | None = None
    stages: tuple[Stage, ...] = ()
    """Methods one after the other, in place of ``method`` and ``steps``."""
    training: Training = Training()
    data: Data = Data()
    real_data: RealData | None = None
    evaluate: Evaluate | None = None
    export: Export = Export()

    @model_validator(mode="after")
    def _one_way(self) -> Config:
        if bool(self.stages) == (self.method is not None or self.steps is not None):
            raise ValueError("give either method and steps, or stages")
        if not self.stages and (self.method is None or self.steps is None):
            raise ValueError(f"{'method' if self.method is None else 'steps'} is missing")
        return self

    @property
    def plan(self) -> tuple[Stage, ...]:
        """The stages of the run, each with its ``training``; one where none are named."""
        if self.method is not None and self.steps is not None:
            return (Stage(method=self.method, steps=self.steps, training=self.training),)
        run = self.training
        return tuple(
            stage.model_copy(update={"training": stage.training.sharing(run) if stage.training else run})
            for stage in self.stages
        )

    @property
    def methods_used(self) -> str:
        """Names of the methods, in order."""
        return ", then ".join(type(stage.method).__name__ for stage in self.plan)

    def dump(self) -> dict[str, Any]:
        """The configuration as plain YAML values; loading it again gives the same run."""
        shared = tuple(whole if stage.training else stage for stage, whole in zip(self.stages, self.plan, strict=False))
        return self.model_copy(update={"stages": shared}).model_dump(mode="json", exclude={"resume"})
