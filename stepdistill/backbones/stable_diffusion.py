"""``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x and XL, LCM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, numbers, rows, square
from .unet2d import bottleneck

_ADDED = ("text_embeds", "time_ids")


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, 4, h, w)`` output at latents ``x`` and labels ``(B,)`` for ``encoder_hidden_states (B, L, D)``.

    SDXL adds the pooled ``text_embeds (B, P)`` and the sizes ``time_ids (B, 6)``, LCM the ``guidance`` scale ``(B,)``.
    """
    told: dict[str, Any] = {**numbers(cond), "added_cond_kwargs": {key: cond[key] for key in _ADDED if key in cond}}
    if "guidance" in cond:
        told["timestep_cond"] = _scale_embedding(cond["guidance"]).to(x.dtype)
    return network(x, label.float(), cond["encoder_hidden_states"], return_dict=False, **told)[0]


def _scale_embedding(guidance: Tensor) -> Tensor:
    """What the stock pipeline tells a network of scales ``(B,)``: sinusoids ``(B, 256)`` of ``1000 (scale - 1)``."""
    rates = torch.exp(torch.arange(128, device=guidance.device, dtype=torch.float32) * -(math.log(10_000.0) / 127))
    angles = ((guidance.float() - 1) * 1000)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _encode(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
    return rows(encoder_hidden_states=embeds)


def _told(config: Config) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (77, config["cross_attention_dim"])}


def _told_xl(config: Config) -> dict[str, tuple[int, ...]]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {**_told(config), "text_embeds": (pooled,), "time_ids": (6,)}


def _encode_xl(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, pipeline.text_encoder.device, 1, False)
    return rows(encoder_hidden_states=embeds, text_embeds=pooled, time_ids=_sizes(size, len(embeds)))


def _null_xl(pipeline: Any, negative: str | None, config: Config, size: int) -> Cond:  # noqa: ANN401
    """Without a negative prompt SDXL takes zeros (``force_zeros_for_empty_prompt``)."""
    _, embeds, _, pooled = pipeline.encode_prompt("", None, pipeline.text_encoder.device, 1, True, negative)
    return rows(encoder_hidden_states=embeds, text_embeds=pooled, time_ids=_sizes(size, 1))


def _sizes(size: int, count: int) -> Tensor:
    """Original size, crop and target size, as the pipeline has them by default."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(count, -1)


def _refuse(config: Config) -> str | None:
    if config["in_channels"] != config["out_channels"]:
        return f"the UNet maps {config['in_channels']} to {config['out_channels']} channels (inpainting, upscaling)"
    if config.get("addition_embed_type") not in (None, "text_time"):
        return f"addition_embed_type={config['addition_embed_type']!r}"
    if config.get("time_cond_proj_dim") not in (None, 256):
        return f"time_cond_proj_dim={config['time_cond_proj_dim']}; LCM's is 256"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        return "the UNet takes class embeddings beside the text"
    return None


@torch.no_grad()
def whatever_guidance(network: UNet2DConditionModel, guidance: float | None) -> UNet2DConditionModel:
    """The same network with a guidance embedding that is zero; what LCM's says of the scale becomes part of a bias.

    Stable Diffusion's pipelines guide by default (scale 7.5 or 5), but never a network that has such an embedding.
    """
    told = network
    if network.config["time_cond_proj_dim"] is None:
        told = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(network.config, time_cond_proj_dim=256))
        missing, _ = told.load_state_dict(network.state_dict(), strict=False)
        assert missing == ["time_embedding.cond_proj.weight"]
    elif guidance is None:
        return network
    first, embedding = told.time_embedding.linear_1, cast(nn.Linear, told.time_embedding.cond_proj)
    if guidance is not None:
        scale = torch.tensor([guidance], device=network.device)
        first.bias.add_(first.weight @ embedding(_scale_embedding(scale).to(network.dtype))[0])
    nn.init.zeros_(embedding.weight)
    return cast(UNet2DConditionModel, cast(nn.Module, told).to(network.device).eval())


SD = Family(
    pipelines=("StableDiffusionPipeline",),
    component="unet",
    network=UNet2DConditionModel,
    call=call,
    shape=square,
    output="conv_out",
    encode=_encode,
    told=_told,
    bottleneck=bottleneck,
    embeds_guidance=lambda config: config["time_cond_proj_dim"] is not None,
    refuse=_refuse,
    hosted=whatever_guidance,
)

SDXL = replace(SD, pipelines=("StableDiffusionXLPipeline",), encode=_encode_xl, told=_told_xl, null=_null_xl)
