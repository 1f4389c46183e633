"""``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5, with or without the T5 encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, last_norm, numbers, rows, square


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, 16, h, w)`` velocity at latents ``x`` and labels ``(B,)`` in [0, 1000]."""
    return network(
        hidden_states=x,
        timestep=label.float(),
        encoder_hidden_states=cond["encoder_hidden_states"],
        pooled_projections=cond["pooled_projections"],
        return_dict=False,
        **numbers(cond),
    )[0]


def _encode(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, None, pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return rows(encoder_hidden_states=embeds, pooled_projections=pooled)


def _told(config: Config) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (77 + 256, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


SD3 = Family(
    pipelines=("StableDiffusion3Pipeline",),
    component="transformer",
    network=SD3Transformer2DModel,
    call=call,
    shape=square,
    output="proj_out",
    bottleneck=last_norm,
    encode=_encode,
    told=_told,
    scales_input=False,
    arguments={"guidance_scale": 1.0},
)
