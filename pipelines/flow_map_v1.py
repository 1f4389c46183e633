"""A flow map ``X(x, t -> s)`` in its own pipeline: one jump from noise to sample, or any number of shorter ones.

Its network is told two times: the level of its state, as every network is, and the level to go to, by an embedding that
is added to that of the first.  ``stepdistill`` copies this file into the folder of such a student under a name of its
own, with ``STUDENT`` filled in.  Code from a folder runs only with consent:

    pipe = DiffusionPipeline.from_pretrained("STUDENT", trust_remote_code=True)
    image = pipe("a fox").images[0]
    image = pipe("a fox", num_inference_steps=4).images[0]
"""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.schedulers.scheduling_utils import SchedulerOutput

STUDENT: dict[str, Any] = {}
"""``stock``: class of the stock pipeline; ``call``: what a plain call says; ``grid``: the ``FlowMapScheduler``'s."""

_Stock: Any = getattr(diffusers, STUDENT.get("stock", "DiffusionPipeline"))
_TIMES = ("time_embedding", "timestep_embedder")
"""What diffusers' networks call the embedding of the time; a DiT has one in every block."""


class TargetEmbedding(ModelMixin, ConfigMixin):
    """The embedding ``(1, D)`` of the label of the level to go to."""

    @register_to_config
    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(in_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(in_channels, time_embed_dim)

    def forward(self, label: float) -> torch.Tensor:
        """For a number as networks are told times."""
        told = self.time_proj(torch.tensor([label], dtype=torch.float32, device=self.device))
        return self.embedding(told.to(self.dtype))


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """Jumps along ``x = alpha x0 + sigma eps`` from level to level, as many as asked; no new noise.

    Args:
        levels: on the way from noise, evenly spaced, each with ``label`` (what the network is told), ``alpha``,
            ``sigma``, ``input`` (what the state is multiplied by for the network), and ``skip``, ``output`` of
            ``x0 = skip state + output network``; a grid takes the nearest of them.
        end: what the network is told about the sample.
        start: what the noise is multiplied by to be the first state.
        clip_sample: keep the sample in [-1, 1].
        num_train_timesteps: read by pipelines that tell a network a share of it.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        levels: list[dict[str, float]],
        end: float = 0.0,
        start: float = 1.0,
        clip_sample: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.levels, self.end, self.start, self.clip_sample = levels, end, start, clip_sample
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a sample of so many jumps, one by default; of ``sigmas`` the number counts, and ``mu`` for nothing."""
        steps = (num_inference_steps or 1) if sigmas is None else len(sigmas)
        if not 1 <= steps <= len(self.levels):
            raise ValueError(f"num_inference_steps must be 1 to {len(self.levels)}, got {steps}")
        self.calls = [self.levels[round(k * len(self.levels) / steps)] for k in range(steps)]
        self.timesteps = torch.tensor([call["label"] for call in self.calls], dtype=torch.float32, device=device)
        self.num_inference_steps, self._done = steps, 0

    @property
    def target(self) -> float:
        """What the network is told about where the jump in progress leads."""
        return self.calls[self._done + 1]["label"] if self._done + 1 < len(self.calls) else self.end

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
            state = self.start * state
        x = call["skip"] * state + call["output"] * model_output.float()
        self._done += 1
        if self._done < len(self.calls):
            eps, ahead = (state - call["alpha"] * x) / call["sigma"], self.calls[self._done]
            x = ahead["alpha"] * x + ahead["sigma"] * eps
        elif self.clip_sample:
            x = x.clamp(-1, 1)
        made = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=made) if return_dict else (made,)


class FlowMapPipeline(_Stock):
    """The stock pipeline round a network that is also told where to go."""

    def __init__(self, *args: Any, target_embedding: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.register_modules(target_embedding=target_embedding)

    @functools.wraps(_Stock.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        stock, self.scheduler = self.scheduler, FlowMapScheduler(**STUDENT["grid"])
        scheduler, network = self.scheduler, self.components.get("unet") or self.components["transformer"]

        def lead(part: Any, told: Any, embedding: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
            return embedding + self.target_embedding(scheduler.target).to(embedding)

        hooks = [
            part.register_forward_hook(lead)
            for name, part in network.named_modules()
            if isinstance(part, TimestepEmbedding) and name.rpartition(".")[2] in _TIMES
        ]
        try:
            return super().__call__(*args, **{**STUDENT.get("call", {}), **kwargs})
        finally:
            self.scheduler = stock
            for hook in hooks:
                hook.remove()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save weights, settings and this file, so that the folder alone is the pipeline again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        here, folder = Path(__file__), Path(save_directory)
        for place in (folder, folder / "target_embedding"):
            (place / here.name).write_bytes(here.read_bytes())
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [here.stem, "FlowMapPipeline"]
        index["target_embedding"] = [here.stem, "TargetEmbedding"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


_own: Any = FlowMapPipeline.__init__
_parts = [part for name, part in inspect.signature(_Stock.__init__).parameters.items() if name != "kwargs"]
_target = inspect.Parameter("target_embedding", inspect.Parameter.KEYWORD_ONLY, annotation=Any)
_own.__signature__ = inspect.Signature([*_parts, _target])  # what from_pretrained loads
