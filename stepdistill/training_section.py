"""The ``training`` section of a run configuration: networks, optimizers, memory and speed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


def _no(value: Any) -> Any:  # noqa: ANN401
    """YAML 1.1 reads an unquoted ``no`` as false."""
    return "no" if value is False else value


def _bits(value: str) -> str:
    if value in ("int8", "nf4") or value.endswith(".gguf"):
        return value
    raise ValueError("must be int8, nf4 or the path of a .gguf file")


class Section(BaseModel):
    """Base of every part of a configuration: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class Optimizer(Section):
    """One optimizer per trained role."""

    name: str = "adam"
    """``adam``, ``adamw`` (torch's, fused), or the dotted name of an installed class: bitsandbytes.optim.AdamW8bit."""
    lr: PositiveFloat = 1e-5
    betas: tuple[Beta, Beta] = (0.0, 0.999)
    """Adam's; SiD uses beta1 = 0, DMD and BOOT 0.9."""
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    options: dict[str, Any] = {}
    """Further arguments of that class; of the ones above it is given those that it knows."""
    lr_schedule: Schedule | None = None
    """In place of ``training.lr_schedule``: a fake network at full rate keeps up with a student that comes to rest."""


class Lora(Section):
    """A role that learns low-rank adapters on the teacher's own weights instead of a full copy (Hu et al. 2022)."""

    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None
    """The adapters count ``alpha / rank`` (SwiftBrush: 108 / 64); null is the rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names, or their ends, of the linear and convolution layers with adapters; null is the attentions' projections."""


class Training(Section):
    """How the networks are trained; nothing here changes the loss."""

    batch_size: PositiveInt = 64
    """Samples per process and micro-batch."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per turn; each turn is repeated, with fresh noise, before its optimizer steps."""
    optimizer: Optimizer = Optimizer()
    role_optimizers: dict[str, Optimizer] = {}
    """Optimizer of single roles (``fake``, ...) where it differs."""
    lora: dict[str, Lora] = {}
    """Roles (``student``, ``fake``) that are low-rank adapters."""
    lr_schedule: Schedule = "constant_with_warmup"
    """Of every role whose optimizer names none."""
    lr_warmup_steps: NonNegativeInt = 0
    max_grad_norm: PositiveFloat | None = None
    """Global norm that the gradient of a role is clipped to."""
    ema_halflife_images: PositiveFloat | None = 50_000
    """Half-life of the student's average in generated images; null is none."""
    ema_rampup: PositiveFloat = 0.05
    """It is at most this share of the images so far: SiD's, for long runs; short ones gain from more."""
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_no)] = "no"
    guidance_in_two_passes: bool = False
    """Call a guided teacher twice, in place of once with a doubled batch: less memory, more time."""
    frozen_batch_size: PositiveInt | None = None
    """Rows that a frozen network is called with at a time; null is all.  Less memory where no gradient goes through."""
    teacher_dtype: Precision = "float32"
    """Weights of the teacher, and of adapters' frozen base; what learns in full is float32."""
    parts_dtype: Precision = "float32"
    """Weights of its text encoders and VAE, and prompts as they are kept."""
    quantize_teacher: Annotated[str, AfterValidator(_bits)] | None = None
    """Linear layers of the frozen teacher in eight bits (``int8``, torchao) or four (``nf4``, bitsandbytes), or the
    path of a ``.gguf`` file with its weights; what learns starts from the pipeline's whole weights."""
    teacher_device: str | None = None
    """Another device for the teacher (``cuda:1``), of a run of one process; null is the run's own."""
    offload_teacher: bool = False
    """Keep the teacher in the memory of the CPU but for the turns that ask it."""
    attention: str | None = None
    """diffusers' attention backend (``flash``, ``sage``, ``_native_math``, ...) of every network."""
    gradient_checkpointing: bool = False
    """Keep the input of every block alone and compute the rest again on the way back: less memory, more time."""
    channels_last: bool = False
    """Memory order that convolutions of many devices prefer."""
    compile: str | dict[str, str] | None = None
    """``torch.compile`` backend (``inductor``) of every network, or by role: ``{teacher: inductor}``."""
    log_every: PositiveInt = 10
    preview_every: NonNegativeInt = 0
    """Steps between preview grids; 0 is none."""
    preview_samples: PositiveInt = 32
    checkpoint_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0 writes one only when the run ends or is interrupted."""
    checkpoints_kept: PositiveInt = 2
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of accelerate trackers; ``metrics.jsonl`` is always written."""

    def sharing(self, run: Training) -> Training:
        """This section of a stage, with what it does not say of ``SHARED`` as in that of the ``run``."""
        said = {key: value for key, value in run if key in SHARED and key not in self.model_fields_set}
        return self.model_copy(update=said)


SHARED = (
    *("mixed_precision", "guidance_in_two_passes", "teacher_dtype", "parts_dtype", "quantize_teacher"),
    *("teacher_device", "offload_teacher", "attention", "preview_samples", "trackers"),
)
"""What all stages of a run have in common: a teacher, an accelerator and what is shown."""
