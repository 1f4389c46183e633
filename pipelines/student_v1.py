"""A distilled student in its own pipeline: a plain call is right, and any grid of levels runs.

``stepdistill`` copies this file into a student's folder under a name of its own, with ``STUDENT`` filled in, where
``export.own_code=true`` asks for it.  Code from a folder runs only with consent:

    pipe = DiffusionPipeline.from_pretrained("STUDENT", trust_remote_code=True)
    image = pipe("a fox").images[0]

Where stock diffusers runs the student too, the folder loads as the stock pipeline without this file, and
``custom_pipeline="student_v1_..."``, this file's name, asks for this one.
"""

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

STUDENT: dict[str, Any] = {}
"""``stock``: class of the stock pipeline; ``call``: what a plain call says; ``grid``: settings of ``StudentScheduler``,
or nothing where the folder's own scheduler is the student's; ``sole``: no stock pipeline runs it."""

_Stock: Any = getattr(diffusers, STUDENT.get("stock", "DiffusionPipeline"))


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """The student's calls at its own levels ``x = alpha x0 + sigma eps``; other numbers of steps do not exist.

    Args:
        calls: for each call ``label`` (what the network is told), ``alpha``, ``sigma``, ``input`` (what the state is
            multiplied by for the network), and ``skip``, ``output`` of ``x0 = skip state + output network``.
        start: what the noise is multiplied by to be the first state.
        renoising: how ``x0`` returns to the next level: ``fresh`` noise, the ``fixed`` first noise, or ``ddim``, the
            noise that was predicted.
        clip_sample: keep every ``x0`` in [-1, 1].
        num_train_timesteps: read by pipelines that tell a network a share of it.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        calls: list[dict[str, float]],
        start: float = 1.0,
        renoising: str = "fresh",
        clip_sample: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.calls, self.start, self.renoising, self.clip_sample = calls, start, renoising, clip_sample
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin; other numbers of steps, or of sigmas, are refused, and ``mu`` is of no effect."""
        asked = num_inference_steps if sigmas is None else len(sigmas)
        if asked not in (None, len(self.calls)):
            raise ValueError(
                f"this student makes {len(self.calls)} calls, got num_inference_steps={asked}; leave it out"
            )
        self.timesteps = torch.tensor([call["label"] for call in self.calls], dtype=torch.float32, device=device)
        self.num_inference_steps, self._done = len(self.calls), 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines that start at the first call say so."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:  # noqa: ANN401
        """What the network is fed for the state ``sample``."""
        scale = self.calls[self._done]["input"] * (self.start if self._done == 0 else 1.0)
        return sample if scale == 1 else (scale * sample.float()).to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,  # noqa: ANN401
        sample: torch.Tensor,
        generator: Any = None,  # noqa: ANN401
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The next state, or the finished sample."""
        call, state = self.calls[self._done], sample.float()
        if self._done == 0:
            self._noise = state
            state = self.start * state
        x0 = call["skip"] * state + call["output"] * model_output.float()
        eps = (state - call["alpha"] * x0) / call["sigma"]
        x = x0.clamp(-1, 1) if self.clip_sample else x0
        self._done += 1
        if self._done < len(self.calls):
            if self.renoising == "fresh":
                eps = randn_tensor(x.shape, generator=generator, device=x.device, dtype=sample.dtype).float()
            elif self.renoising == "fixed":
                eps = self._noise
            ahead = self.calls[self._done]
            x = ahead["alpha"] * x + ahead["sigma"] * eps
        made = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=made) if return_dict else (made,)


class StudentPipeline(_Stock):
    """The stock pipeline, called as the student wants to be called."""

    @functools.wraps(_Stock.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        stock = self.scheduler
        if STUDENT.get("grid"):
            self.scheduler = StudentScheduler(**STUDENT["grid"])
        try:
            return super().__call__(*args, **{**STUDENT.get("call", {}), **kwargs})
        finally:
            self.scheduler = stock

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save weights, settings and this file, so that the folder alone is the pipeline again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        here = Path(__file__)
        (Path(save_directory) / here.name).write_bytes(here.read_bytes())
        path = Path(save_directory) / "model_index.json"
        index = json.loads(path.read_text())
        index["_class_name"] = [here.stem, "StudentPipeline"] if STUDENT.get("sole") else STUDENT["stock"]
        path.write_text(json.dumps(index, indent=2) + "\n")
