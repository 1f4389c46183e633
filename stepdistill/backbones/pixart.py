"""``PixArtTransformer2DModel``: PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, last_norm, numbers, rows, square

_ADDED = ("resolution", "aspect_ratio")


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, 4, h, w)`` output at latents ``x`` and labels ``(B,)``; a predicted variance is left out."""
    output = network(
        x,
        encoder_hidden_states=cond["encoder_hidden_states"],
        encoder_attention_mask=cond["encoder_attention_mask"],
        timestep=label.float(),
        added_cond_kwargs={key: cond.get(key) for key in _ADDED},
        return_dict=False,
        **numbers(cond),
    )[0]
    return output[:, : x.shape[1]]


def _encode(pipeline: Any, prompts: Sequence[str], config: Config, size: int) -> Cond:  # noqa: ANN401
    device = pipeline.text_encoder.device
    embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=device, clean_caption=True)
    return _rows(embeds, mask, config, size)


def _null(pipeline: Any, negative: str | None, config: Config, size: int) -> Cond:  # noqa: ANN401
    device = pipeline.text_encoder.device
    _, _, embeds, mask = pipeline.encode_prompt("", True, negative or "", device=device, clean_caption=True)
    return _rows(embeds, mask, config, size)


def _rows(embeds: Tensor, mask: Tensor, config: Config, size: int) -> Cond:
    made = rows(encoder_hidden_states=embeds, encoder_attention_mask=mask)
    if not _told_sizes(config):
        return made
    sizes = torch.tensor([[float(size), float(size)]]).expand(len(embeds), -1)
    return {**made, "resolution": sizes, "aspect_ratio": torch.ones(len(embeds), 1)}


def _told_sizes(config: Config) -> bool:
    added = config["use_additional_conditions"]
    return config["sample_size"] == 128 if added is None else added


def _told(config: Config) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (300, config["caption_channels"]), "encoder_attention_mask": (300,)}
    return {**text, "resolution": (2,), "aspect_ratio": (1,)} if _told_sizes(config) else text


PIXART = Family(
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    component="transformer",
    network=PixArtTransformer2DModel,
    call=call,
    shape=square,
    output="proj_out",
    bottleneck=last_norm,
    encode=_encode,
    told=_told,
    null=_null,
    arguments={"guidance_scale": 1.0, "use_resolution_binning": False},
)
