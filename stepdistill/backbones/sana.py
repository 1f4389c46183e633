"""``SanaTransformer2DModel``: Sana, a flow on the latents of a deep-compression autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, last_norm, numbers, rows, square

_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the stock pipeline puts before every prompt."""


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, 32, h, w)`` velocity at latents ``x`` and labels ``(B,)`` in [0, 1000]."""
    return network(
        x,
        encoder_hidden_states=cond["encoder_hidden_states"],
        encoder_attention_mask=cond["encoder_attention_mask"],
        timestep=label.float() * cond["timestep_scale"],
        return_dict=False,
        **numbers(cond),
    )[0]


def _encode(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), False, device=pipeline.text_encoder.device, complex_human_instruction=_INSTRUCTION
    )
    return _rows(embeds, mask, config)


def _null(pipeline: Any, negative: str | None, config: Config, size: int) -> Cond:  # noqa: ANN401
    _, _, embeds, mask = pipeline.encode_prompt("", True, negative or "", device=pipeline.text_encoder.device)
    return _rows(embeds, mask, config)


def _rows(embeds: Tensor, mask: Tensor, config: Config) -> Cond:
    scale = embeds.new_full((len(embeds),), config["timestep_scale"])
    return rows(encoder_hidden_states=embeds, encoder_attention_mask=mask, timestep_scale=scale)


def _told(config: Config) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (300, config["caption_channels"]), "encoder_attention_mask": (300,)}
    return {**text, "timestep_scale": ()}


@torch.no_grad()
def _whatever_guidance(network: Any, guidance: float | None) -> Any:  # noqa: ANN401
    """The network with a guidance embedding that is zero: Sana-Sprint's pipeline tells every network a scale."""
    embed = network.time_embed
    told = SanaCombinedTimestepGuidanceEmbeddings(embed.linear.in_features)
    for parameter in told.guidance_embedder.linear_2.parameters():
        nn.init.zeros_(parameter)
    nn.Module.to(told, network.device, network.dtype)
    told.timestep_embedder, told.linear, network.time_embed = embed.emb.timestep_embedder, embed.linear, told
    network.register_to_config(guidance_embeds=True)
    return network


SANA = Family(
    pipelines=("SanaPipeline",),
    component="transformer",
    network=SanaTransformer2DModel,
    call=call,
    shape=square,
    output="proj_out",
    bottleneck=last_norm,
    encode=_encode,
    told=_told,
    scales_input=False,
    null=_null,
    refuse=lambda config: "guidance_embeds (Sana-Sprint) is not supported yet" if config["guidance_embeds"] else None,
    usual_size=1024,
    arguments={"guidance_scale": 1.0, "use_resolution_binning": False},
)

SPRINT = replace(
    SANA,
    pipelines=("SanaSprintPipeline",),
    hosted=_whatever_guidance,
    arguments={"intermediate_timesteps": None, "use_resolution_binning": False},
)
"""Sana-Sprint's pipeline, for students: its scheduler is for one step or a few, and tells times as TrigFlow does."""
