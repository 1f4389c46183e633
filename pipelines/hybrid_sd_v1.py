"""A teacher makes the first calls of its distilled student: Stable Diffusion 1, 2 and XL (arXiv:2503.10637).

A student settles the structure of an image in its first call, which costs variety; the teacher's first steps bring it
back.  The student is any network with an LCM or a DDIM scheduler, distilled from a teacher with a DDPM table; it needs
not be of stepdistill.  Students of several calls go on from where the teacher stops.  For a student of one call, which
knows its own noise level alone, the teacher's draft is taken back to that level; at pure noise there is no such way.

    teacher = StableDiffusionXLPipeline.from_pretrained("TEACHER")
    pipe = DiffusionPipeline.from_pretrained(
        "STUDENT", custom_pipeline="hybrid_sd_v1.py", trust_remote_code=True,
        teacher_unet=teacher.unet, teacher_scheduler=teacher.scheduler,
    )
    image = pipe("a fox", num_inference_steps=4, teacher_first=1, guidance_scale=5.0).images[0]
    pipe.save_pretrained("HYBRID")  # DiffusionPipeline.from_pretrained("HYBRID", trust_remote_code=True)

Of a student that is adapters there is one set of weights: the teacher is the network with these adapters off.

    teacher.load_lora_weights("STUDENT_LORA", adapter_name="student")
    pipe = DiffusionPipeline.from_pretrained(
        "TEACHER", custom_pipeline="hybrid_sd_v1.py", trust_remote_code=True, unet=teacher.unet,
        scheduler=LCMScheduler.from_pretrained("STUDENT_LORA", subfolder="scheduler"),
        teacher_scheduler=teacher.scheduler, student_adapter="student",
    )
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Renoising = Literal["ddim", "fresh", "fixed"]
Generators = torch.Generator | list[torch.Generator] | None

_MODULE = "hybrid_sd_v1"
_LEAST_SIGNAL = 0.05
_RENOISINGS = get_args(Renoising)
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_OPTIONAL = ["text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor", "image_encoder", "teacher_unet"]
_ALIKE = ("in_channels", "sample_size", "cross_attention_dim", "addition_embed_type")


class Level(NamedTuple):
    """A noise level ``x = alpha x0 + sigma eps``."""

    alpha: float
    sigma: float


class Told(NamedTuple):
    """What networks are told, one row per image."""

    embeds: torch.Tensor
    null: torch.Tensor | None
    """Of the negative prompt, where there is guidance."""
    added: list[dict[str, torch.Tensor]]
    """Of XL, for ``embeds`` and ``null``: the pooled text and the sizes."""
    scale: float

    def alone(self, network: Any, x: torch.Tensor, t: torch.Tensor, *, null: bool = False) -> torch.Tensor:  # noqa: ANN401
        """The network's output."""
        stock: Any = StableDiffusionPipeline
        text: Any = self.null if null else self.embeds
        width, scale = network.config["time_cond_proj_dim"], torch.full((len(x),), self.scale - 1, device=x.device)
        output = network(
            x.to(network.dtype),
            t,
            encoder_hidden_states=text.to(network.dtype),
            timestep_cond=width and stock.get_guidance_scale_embedding(None, scale, width, network.dtype),
            added_cond_kwargs=self.added[null],
            return_dict=False,
        )
        return output[0].float()

    def guided(self, network: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """The same with guidance; a network that is told a scale needs none."""
        said = self.alone(network, x, t)
        if self.null is None or network.config["time_cond_proj_dim"] is not None:
            return said
        without = self.alone(network, x, t, null=True)
        return without + self.scale * (said - without)


def level(scheduler: Any, timestep: int) -> Level:  # noqa: ANN401
    """Of a table at one entry; a zero-SNR table ends in pure noise."""
    square = max(scheduler.alphas_cumprod[timestep].double().item(), 8e-27)
    return Level(math.sqrt(square), math.sqrt(1 - square))


def read(prediction: str, x: torch.Tensor, output: torch.Tensor, now: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x0, eps)`` that a network's ``output`` at state ``x`` says."""
    a, s = now
    match prediction:
        case "epsilon":
            return (x - s * output) / a, output
        case "sample":
            return output, (x - a * output) / s
    return a * x - s * output, s * x + a * output


class HybridSDPipeline(DiffusionPipeline):
    """The student's own stock pipeline for ``teacher_first=0``, and with the teacher in place of its first calls.

    Args:
        unet: the student's network.
        scheduler: the student's, LCM's or DDIM's.
        teacher_scheduler: names the teacher's noise process; with a table, as all of Stable Diffusion's have.
        teacher_unet: the teacher's network; without one the student's has adapters, and the teacher is it without.
        student_adapter: their name, where there are others: those stay on for both.
        others: as in the stock pipeline; the second text encoder and its tokenizer are XL's.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->teacher_unet->unet->vae"
    _optional_components = _OPTIONAL

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        teacher_scheduler: SchedulerMixin,
        teacher_unet: UNet2DConditionModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        safety_checker: Any = None,  # noqa: ANN401
        feature_extractor: Any = None,  # noqa: ANN401
        image_encoder: Any = None,  # noqa: ANN401
        student_adapter: str | None = None,
        force_zeros_for_empty_prompt: bool = True,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(scheduler, LCMScheduler | DDIMScheduler):
            raise ValueError(
                f"the student's scheduler must be LCMScheduler or DDIMScheduler, got {type(scheduler).__name__}"
            )
        prediction = teacher_scheduler.config.get("prediction_type")  # type: ignore[attr-defined]
        if "alphas_cumprod" not in vars(teacher_scheduler) or prediction not in _PREDICTIONS:
            raise ValueError(
                f"the teacher's scheduler must have a DDPM table and predict one of {_PREDICTIONS}, got "
                f"{type(teacher_scheduler).__name__} and {prediction!r}"
            )
        for key in _ALIKE:
            if teacher_unet is not None and unet.config[key] != teacher_unet.config[key]:
                raise ValueError(f"{key} of student and teacher differ: {unet.config[key]}, {teacher_unet.config[key]}")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            teacher_unet=teacher_unet,
            teacher_scheduler=teacher_scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(
            student_adapter=student_adapter,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_safety_checker=requires_safety_checker,
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 4,
        teacher_first: int = 1,
        *,
        teacher_steps: int | None = None,
        teacher_renoising: Renoising = "ddim",
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        output_type: Literal["pil", "np", "pt", "latent", "trace"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image per prompt.

        Args:
            prompt: one or several.
            num_inference_steps: the student's own number of calls.
            teacher_first: calls of the student that the teacher replaces; before a student of one call, steps of the
                teacher, whose last ``x0`` is taken back to the student's own level with the noise of the beginning.
            teacher_steps: steps of the teacher's whole grid, the first of which are made; as many as the student's
                calls by default.  The teacher stops at its time nearest to the student's next call and goes there.
            teacher_renoising: how the teacher's steps go on: DDIM, with new noise (as LCM), or with the first noise.
            guidance_scale: classifier-free guidance of the teacher, 1 is none; the student is never guided.  Networks
                that are told a scale (LCM's) are told it, in place of guidance.
            negative_prompt: what guidance leads away from, for all images.
            height: in pixels; the student's own by default.
            width: likewise.
            generator: one, or one per image.
            output_type: ``pil``, ``np`` (``(B, H, W, C)`` in [0, 1]), ``pt`` (``(B, C, H, W)``), ``latent``, or
                ``trace``, see ``trace_x0``.
            return_dict: ``ImagePipelineOutput`` rather than a tuple.
        """
        if teacher_renoising not in _RENOISINGS:
            raise ValueError(f"teacher_renoising must be one of {_RENOISINGS}, got {teacher_renoising!r}")
        prompts, device = [prompt] if isinstance(prompt, str) else prompt, self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        teacher_times = self._teacher_times(teacher_first, teacher_steps)
        shape = len(prompts), self.unet.config["in_channels"], *self._latent_size(height, width)
        told = self._told(prompts, negative_prompt, guidance_scale, shape)

        def draw() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype).float()

        drafts, x = self._drafted(draw, teacher_times, teacher_first, teacher_renoising, told)
        made = [*drafts, *self._finished(x, teacher_first, told, generator)]
        images: Any = made[-1]
        if output_type == "trace":
            images = [self._decoded(x0) for x0 in made]
        elif output_type != "latent":
            images = self.image_processor.postprocess(self._decoded(made[-1]), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def trace_x0(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:  # noqa: ANN401
        """What every call predicts, decoded, in order, each ``(B, 3, H, W)`` in about [-1, 1]; the last is the image.

        Arguments are those of the pipeline's call.
        """
        made: Any = self(*args, **kwargs, output_type="trace")
        return made.images

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Save weights, settings and this file, so that the folder alone is the pipeline; then upload the folder."""
        if self._active_adapters():
            raise ValueError("adapters cannot be saved in a pipeline; keep them as they are, and load them as before")
        super().save_pretrained(save_directory, safe_serialization=safe_serialization, variant=variant)
        (Path(save_directory) / f"{_MODULE}.py").write_bytes(Path(__file__).read_bytes())
        index = Path(save_directory) / "model_index.json"
        named = {**json.loads(index.read_text()), "_class_name": [_MODULE, type(self).__name__]}
        index.write_text(json.dumps(named, indent=2) + "\n")

    def _drafted(
        self, draw: Callable[[], torch.Tensor], times: list[int], first: int, rule: str, told: Told
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What the teacher's calls at ``times`` predict, and the state that the student begins at."""
        noise, kind = draw(), self.teacher_scheduler.config["prediction_type"]

        def arrive(timestep: int, scheduler: Any, rule: str = rule) -> torch.Tensor:  # noqa: ANN401
            (a, s), (x0, eps) = level(scheduler, timestep), said[-1]
            return a * x0 + s * (eps if rule == "ddim" else noise if rule == "fixed" else draw())

        said: list[tuple[torch.Tensor, torch.Tensor]] = []
        if not times:
            return [], noise
        with self._teacher() as network:
            for t in times:
                x = arrive(t, self.teacher_scheduler) if said else noise
                output = told.guided(network, x, torch.tensor(t, device=x.device))
                said.append(read(kind, x, output, level(self.teacher_scheduler, t)))
        calls = self.scheduler.timesteps.tolist()
        x = arrive(calls[first], self.scheduler) if len(calls) > 1 else arrive(calls[0], self.scheduler, "fixed")
        return [x0 for x0, _ in said], x

    def _finished(self, x: torch.Tensor, first: int, told: Told, generator: Generators) -> Iterator[torch.Tensor]:
        """The student's calls, but for the ``first`` of several, by its own stock scheduler."""
        scheduler: Any = self.scheduler
        for t in scheduler.timesteps[first if len(scheduler.timesteps) > 1 else 0 :]:
            step = scheduler.step(told.alone(self.unet, x, t), t, x, generator=generator)
            yield step.get("denoised", step.get("pred_original_sample"))
            x = step.prev_sample

    def _teacher_times(self, first: int, steps: int | None) -> list[int]:
        """Timesteps of the teacher's calls, trailing in its table."""
        student, size = self.scheduler.timesteps.tolist(), len(self.teacher_scheduler.alphas_cumprod)
        calls = len(student)
        if first < 0 or first >= calls > 1:
            raise ValueError(f"teacher_first must lie in 0..{calls - 1} for a student of {calls} calls, got {first}")
        if first == 0:
            return []
        steps, least = max(calls, first) if steps is None else steps, first if calls == 1 else 1
        if not least <= steps <= size:
            raise ValueError(f"teacher_steps must lie in {least}..{size}, got {steps}")
        grid = [round(size - k * size / steps) - 1 for k in range(steps)]
        if calls > 1:
            nearest = min(range(steps), key=lambda i: abs(grid[i] - student[first]))
            return grid[: max(nearest, 1)]
        alpha, sigma = level(self.scheduler, student[0])
        if alpha < _LEAST_SIGNAL * sigma:
            raise ValueError("the student's only call is at pure noise and would see nothing of the teacher's draft")
        return grid[:first]

    @contextmanager
    def _teacher(self) -> Iterator[Any]:
        """The teacher's network; one that is the student's has its adapters back afterwards, whatever happens."""
        if self.teacher_unet is not None:
            yield self.teacher_unet
            return
        unet, active = self.unet, self._active_adapters()
        name = self.config["student_adapter"] or (active[0] if len(active) == 1 else None)
        if name not in active:
            raise ValueError(
                f"give teacher_unet, or a unet with the student's adapters and their name as student_adapter; got "
                f"{self.config['student_adapter']!r}, active are {active}"
            )
        others = [other for other in active if other != name]
        try:
            if others:
                unet.set_adapter(others)
            else:
                unet.disable_adapters()
            yield unet
        finally:
            unet.enable_adapters()
            unet.set_adapter(active)

    def _active_adapters(self) -> list[str]:
        return list(self.unet.active_adapters()) if "peft_config" in vars(self.unet) else []

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own, scale = self.unet.config["sample_size"], self.vae_scale_factor
        usual = (own, own) if isinstance(own, int) else own
        if any(side is not None and side % scale for side in (height, width)):
            raise ValueError(f"height and width must be multiples of {scale}, got {height}, {width}")
        return usual[0] if height is None else height // scale, usual[1] if width is None else width // scale

    def _told(self, prompts: list[str], negative: str | None, scale: float, shape: tuple[int, ...]) -> Told:
        """The prompts, and the negative one where there is guidance, as the stock pipeline encodes them."""
        stock: Any = StableDiffusionPipeline if self.tokenizer_2 is None else StableDiffusionXLPipeline
        settings = {"device": self._execution_device, "num_images_per_prompt": 1}
        if negative is not None:
            settings["negative_prompt"] = [negative] * len(prompts)
        embeds, null, *pooled = stock.encode_prompt(self, prompts, **settings, do_classifier_free_guidance=scale != 1)
        if self.tokenizer_2 is None:
            return Told(embeds, null, [{}, {}], scale)
        size = torch.tensor([*shape[2:], 0, 0, *shape[2:]], device=embeds.device) * self.vae_scale_factor
        sizes = size.to(embeds.dtype).expand(len(prompts), -1)
        return Told(embeds, null, [{"text_embeds": each, "time_ids": sizes} for each in pooled], scale)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures; XL's VAE exceeds the range of float16, and its settings say so."""
        vae: Any = self.vae
        overflows = vae.dtype == torch.float16 and vae.config["force_upcast"]
        if overflows:
            vae.to(torch.float32)
        pictures = vae.decode((latents / vae.config["scaling_factor"]).to(vae.dtype), return_dict=False)[0]
        if overflows:
            vae.to(torch.float16)
        if self.safety_checker is not None:
            stock: Any = StableDiffusionPipeline
            _, unsafe = stock.run_safety_checker(self, pictures, pictures.device, self.unet.dtype)
            pictures[torch.tensor(unsafe, device=pictures.device)] = -1.0
        return pictures.float()
