"""A teacher makes the first calls of its distilled student (Gandikota & Bau 2025, arXiv:2503.10637).

A student settles the structure of an image in its first call, which costs variety; the teacher's first steps bring
it back.  Both are ``UNet2DModel`` networks on pixels, with or without classes.  The teacher's scheduler is a DDPM
table or a rectified flow; the student is a folder that stepdistill exported.

    from diffusers import DDPMPipeline, DiffusionPipeline
    teacher = DDPMPipeline.from_pretrained("TEACHER")
    pipe = DiffusionPipeline.from_pretrained(
        "STUDENT", custom_pipeline="hybrid_ddpm_v1.py", trust_remote_code=True,
        teacher_unet=teacher.unet, teacher_scheduler=teacher.scheduler,
        description=json.load(open("STUDENT/stepdistill.json")),
    )
    image = pipe(teacher_first=1).images[0]
    pipe.save_pretrained("HYBRID")  # DiffusionPipeline.from_pretrained("HYBRID", trust_remote_code=True)
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

Renoising = Literal["ddim", "fresh", "fixed"]
Labels = torch.Tensor | list[int] | None
Generators = torch.Generator | list[torch.Generator] | None

_MODULE = "hybrid_ddpm_v1"
_LEAST_SIGNAL = 0.05
_RENOISINGS = get_args(Renoising)
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Level(NamedTuple):
    """A noise level ``x = alpha x0 + sigma eps`` and what the teacher's network is told there."""

    alpha: float
    sigma: float
    label: float


class Process:
    """The levels of a teacher's scheduler by its own time in [0, 1], and what the network beside it predicts."""

    def __init__(self, scheduler: Any) -> None:  # noqa: ANN401
        config, table = dict(scheduler.config), scheduler.__dict__.get("alphas_cumprod")
        self.prediction: str = config.get("prediction_type", "")
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            if config["use_dynamic_shifting"] or config["invert_sigmas"]:
                raise ValueError("a flow teacher must have one constant shift and sigmas that fall")
            self.shift, self.scale, self.prediction = config["shift"], config["num_train_timesteps"], "flow"
            self.table: list[float] = []
        elif table is not None and not config.get("use_flow_sigmas"):
            self.table = table.double().tolist()
        else:
            raise ValueError(f"the teacher needs a DDPM table or FlowMatchEuler, got {type(scheduler).__name__}")
        if self.prediction not in _PREDICTIONS:
            raise ValueError(f"the teacher's prediction_type must be one of {_PREDICTIONS}, got {self.prediction!r}")

    def grid(self, steps: int) -> list[float]:
        """``steps`` decreasing times from pure noise: the trailing spacing of a table, uniform times of a flow."""
        size = len(self.table)
        if steps < 1 or (self.table and steps > size):
            raise ValueError(f"teacher_steps must lie in 1..{size or 'any'}, got {steps}")
        if self.table:
            return [(round(size - k * size / steps) - 1) / (size - 1) for k in range(steps)]
        return [1 - k / steps for k in range(steps)]

    def level(self, time: float) -> Level:
        """The level at ``time``; of a table, its nearest entry."""
        if self.table:
            index = round(time * (len(self.table) - 1))
            square = max(self.table[index], 8e-27)  # a zero-SNR table ends in pure noise
            return Level(math.sqrt(square), math.sqrt(1 - square), float(index))
        sigma = self.shift * time / (1 + (self.shift - 1) * time)
        return Level(1 - sigma, sigma, self.scale * sigma)

    def read(self, x: torch.Tensor, output: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """``(x0, eps)`` that the network's ``output`` at state ``x`` says."""
        a, s, _ = level
        match self.prediction:
            case "epsilon":
                return (x - s * output) / a, output
            case "sample":
                return output, (x - a * output) / s
            case "v_prediction":
                return a * x - s * output, s * x + a * output
        return x - s * output, x + a * output


class HybridDDPMPipeline(DiffusionPipeline):
    """The student's own stock pipeline for ``teacher_first=0``, and with the teacher in place of its first calls.

    Args:
        unet: the student's network.
        scheduler: the student's stock scheduler.
        teacher_unet: the teacher's network.
        teacher_scheduler: names the teacher's noise process.
        description: the content of the student's ``stepdistill.json``.
    """

    model_cpu_offload_seq = "teacher_unet->unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        teacher_unet: UNet2DModel,
        teacher_scheduler: SchedulerMixin,
        description: dict | None = None,
    ) -> None:
        super().__init__()
        if description is None:
            raise ValueError("give the content of the student's stepdistill.json as description")
        for key in ("in_channels", "sample_size", "num_class_embeds"):
            if unet.config[key] != teacher_unet.config[key]:
                raise ValueError(f"{key} of student and teacher differ: {unet.config[key]}, {teacher_unet.config[key]}")
        self.register_modules(
            unet=unet, scheduler=scheduler, teacher_unet=teacher_unet, teacher_scheduler=teacher_scheduler
        )
        self.register_to_config(description=description)
        self.process = Process(teacher_scheduler)
        self.times = list(description["sampler"]["times"])
        """Times of the student's calls, in the teacher's coordinate."""
        self.unit = description["sampler"]["input"] == "unit"
        wanted, label = self.process.level(self.times[0]).label, description["map"]["label"]
        if not math.isclose(wanted, label, rel_tol=1e-5, abs_tol=1e-3):
            raise ValueError(
                f"the student was made from a teacher with another noise schedule: its first call is at label {label}, "
                f"which would be {wanted} of this teacher"
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        teacher_first: int = 1,
        *,
        teacher_steps: int | None = None,
        teacher_renoising: Renoising = "ddim",
        guidance_scale: float = 1.0,
        null_label: int | None = None,
        class_labels: Labels = None,
        generator: Generators = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images.

        Args:
            batch_size: how many.
            teacher_first: calls of the student that the teacher replaces; before a student of one call, steps of the
                teacher, whose last ``x0`` is taken back to the student's own level.
            teacher_steps: steps of the teacher's whole grid, the first of which are made; as many as the student's
                calls by default.  The teacher stops at its time nearest to the student's next call and goes there.
            teacher_renoising: how the teacher's steps go on: DDIM, with new noise (as LCM), or with the first noise.
            guidance_scale: classifier-free guidance of the teacher; 1 is none.
            null_label: the label that means "no class", for guidance.
            class_labels: one per image, for networks with classes.
            generator: one, or one per image.
            output_type: ``pil``, ``np`` (``(B, H, W, C)`` in [0, 1]) or ``pt`` (``(B, C, H, W)``).
            return_dict: ``ImagePipelineOutput`` rather than a tuple.
        """
        *_, sample = self.trace_x0(
            batch_size,
            teacher_first,
            teacher_steps=teacher_steps,
            teacher_renoising=teacher_renoising,
            guidance_scale=guidance_scale,
            null_label=null_label,
            class_labels=class_labels,
            generator=generator,
        )
        images: Any = (sample / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def trace_x0(
        self,
        batch_size: int = 1,
        teacher_first: int = 1,
        *,
        teacher_steps: int | None = None,
        teacher_renoising: Renoising = "ddim",
        guidance_scale: float = 1.0,
        null_label: int | None = None,
        class_labels: Labels = None,
        generator: Generators = None,
    ) -> list[torch.Tensor]:
        """What every call predicts, in order, each ``(B, C, H, W)`` in [-1, 1]; the last is the sample."""
        if teacher_renoising not in _RENOISINGS:
            raise ValueError(f"teacher_renoising must be one of {_RENOISINGS}, got {teacher_renoising!r}")
        calls, device = len(self.times), self._execution_device
        teacher_times = self._teacher_times(teacher_first, teacher_steps)
        labels = self._labels(class_labels, batch_size)
        size = self.unet.config["sample_size"]
        shape = batch_size, self.unet.config["in_channels"], *((size, size) if isinstance(size, int) else size)

        def draw() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)

        def arrive(level: Level, rule: str) -> torch.Tensor:
            x0, eps = said[-1]
            return level.alpha * x0 + level.sigma * (eps if rule == "ddim" else noise if rule == "fixed" else draw())

        x = noise = draw()
        said: list[tuple[torch.Tensor, torch.Tensor]] = []
        for level in map(self.process.level, teacher_times):
            x = arrive(level, teacher_renoising) if said else noise
            said.append(self._teacher(x, level, labels, guidance_scale, null_label))
        if said and calls > 1:
            x = arrive(self.process.level(self.times[teacher_first]), teacher_renoising)
        elif said:
            level = self.process.level(self.times[0])
            x = arrive(level, "fixed") / (math.hypot(level.alpha, level.sigma) if self.unit else level.sigma)
        made = self._student(x, labels, generator, teacher_first if calls > 1 else 0)
        return [*(x0 for x0, _ in said), *made]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Save weights, settings and this file, so that the folder alone is the pipeline; then upload the folder."""
        super().save_pretrained(save_directory, safe_serialization=safe_serialization, variant=variant)
        (Path(save_directory) / f"{_MODULE}.py").write_bytes(Path(__file__).read_bytes())
        index = Path(save_directory) / "model_index.json"
        named = {**json.loads(index.read_text()), "_class_name": [_MODULE, type(self).__name__]}
        index.write_text(json.dumps(named, indent=2) + "\n")

    def _teacher_times(self, first: int, steps: int | None) -> list[float]:
        """Times of the teacher's calls."""
        calls = len(self.times)
        if first < 0 or first >= calls > 1:
            raise ValueError(f"teacher_first must lie in 0..{calls - 1} for a student of {calls} calls, got {first}")
        if first == 0:
            return []
        grid = self.process.grid(max(calls, first) if steps is None else steps)
        if calls > 1:
            nearest = min(range(len(grid)), key=lambda i: round(abs(grid[i] - self.times[first]), 9))
            return grid[: max(nearest, 1)]
        level = self.process.level(self.times[0])
        if level.alpha < _LEAST_SIGNAL * level.sigma:
            raise ValueError("the student's only call is at pure noise and would see nothing of the teacher's draft")
        if len(grid) < first:
            raise ValueError(f"teacher_steps must be at least teacher_first={first}, got {steps}")
        return grid[:first]

    def _labels(self, class_labels: Labels, batch_size: int) -> torch.Tensor | None:
        classes = self.unet.config["num_class_embeds"]
        if (class_labels is None) != (classes is None):
            raise ValueError(f"the networks have {classes or 'no'} classes; class_labels are {class_labels}")
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        if labels.shape != (batch_size,):
            raise ValueError(f"class_labels must be one per image, ({batch_size},), got shape {tuple(labels.shape)}")
        return labels

    def _teacher(
        self, x: torch.Tensor, level: Level, labels: torch.Tensor | None, guidance_scale: float, null_label: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(x0, eps)`` at state ``x``."""
        network: Any = self.teacher_unet
        told = torch.full((len(x),), level.label, device=x.device)
        output = network(x.to(network.dtype), told, class_labels=labels, return_dict=False)[0]
        if guidance_scale != 1:
            if labels is None or null_label is None:
                raise ValueError("guidance needs networks with classes, class_labels and null_label")
            null = torch.full_like(labels, null_label)
            without = network(x.to(network.dtype), told, class_labels=null, return_dict=False)[0]
            output = without + guidance_scale * (output - without)
        return self.process.read(x.float(), output.float(), level)

    def _student(
        self, x: torch.Tensor, labels: torch.Tensor | None, generator: Generators, first: int
    ) -> Iterator[torch.Tensor]:
        """The student's calls from ``first`` on, by its own stock scheduler."""
        network: Any = self.unet
        scheduler: Any = self.scheduler
        scheduler.set_timesteps(len(self.times))
        timesteps, flow = scheduler.timesteps, isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        for k in range(first, len(timesteps)):
            output = network(x.to(network.dtype), timesteps[k], class_labels=labels, return_dict=False)[0]
            step = scheduler.step(output, timesteps[k], x, generator=generator)
            if k == len(timesteps) - 1:
                yield step.prev_sample
            elif flow:
                yield x - scheduler.sigmas[k] * output
            else:
                yield step.get("denoised", step.get("pred_original_sample"))
            x = step.prev_sample
