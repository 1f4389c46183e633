"""``FluxTransformer2DModel``: Flux.1, whose network may be told the guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, last_norm, numbers, rows


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, C, h, w)`` velocity at latents ``x`` and labels ``(B,)`` in [0, 1000]; ``guidance (B,)`` where it is told.

    The network reads patches of 2x2 latents as tokens.
    """
    height, width, text = x.shape[2] // 2, x.shape[3] // 2, cond["encoder_hidden_states"]
    output = network(
        hidden_states=packed(x),
        timestep=label.float() / 1000,
        guidance=cond.get("guidance"),
        pooled_projections=cond["pooled_projections"],
        encoder_hidden_states=text,
        txt_ids=x.new_zeros(text.shape[1], 3),
        img_ids=_places(height, width, x),
        return_dict=False,
        **numbers(cond),
    )[0]
    return unpacked(output, height, width)


def packed(x: Tensor) -> Tensor:
    """``(B, C, 2h, 2w)`` latents as ``(B, h w, 4 C)`` tokens, row by row."""
    b, c, height, width = x.shape
    x = x.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, height * width // 4, c * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """``(B, h w, 4 C)`` tokens as ``(B, C, 2h, 2w)`` latents."""
    x = tokens.view(len(tokens), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(tokens), -1, 2 * height, 2 * width)


def _later_noise(noise: Tensor) -> Tensor:
    """The pipeline keeps its state in tokens, and draws their noise."""
    b, channels, height, width = noise.shape
    return unpacked(noise.reshape(b, height * width // 4, channels * 4), height // 2, width // 2)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """``(h w, 3)``: zero, row and column of every token."""
    row, column = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).to(like.dtype)


def _encode(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, pipeline.text_encoder.device)
    return rows(encoder_hidden_states=embeds, pooled_projections=pooled)


def _told(config: Config) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (512, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


@torch.no_grad()
def _always_told(network: Any, guidance: float | None) -> Any:  # noqa: ANN401
    """The network without its guidance embedding, which for one scale is constant, hence part of a bias."""
    if guidance is None or not network.config["guidance_embeds"]:
        return network
    embed, scale = network.time_text_embed, torch.tensor([1000 * guidance], device=network.device)
    last, text = embed.timestep_embedder.linear_2, embed.text_embedder
    last.bias.add_(embed.guidance_embedder(embed.time_proj(scale).to(network.dtype))[0])
    stock = CombinedTimestepTextProjEmbeddings(last.out_features, text.linear_1.in_features)
    stock.timestep_embedder, stock.text_embedder, network.time_text_embed = embed.timestep_embedder, text, stock
    network.register_to_config(guidance_embeds=False)
    return network


FLUX = Family(
    pipelines=("FluxPipeline",),
    component="transformer",
    network=FluxTransformer2DModel,
    call=call,
    shape=lambda config: (config["in_channels"] // 4, 128, 128),
    patch=2,
    tokens=lambda config, shape: shape[1] * shape[2] // 4,
    later_noise=_later_noise,
    output="proj_out",
    bottleneck=last_norm,
    encode=_encode,
    told=_told,
    scales_input=False,
    embeds_guidance=lambda config: config["guidance_embeds"],
    hosted=_always_told,
)
