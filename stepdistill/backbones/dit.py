"""``DiTTransformer2DModel``: DiT, conditioned on ImageNet's classes."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ..conditions import Cond
from .family import Family, last_norm, numbers, square


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, 4, h, w)`` output at latents ``x`` and labels ``(B,)``; a predicted variance is left out."""
    labels = cond["class_labels"]
    output = network(x, timestep=label.float(), class_labels=labels, return_dict=False, **numbers(cond))[0]
    return output[:, : x.shape[1]]


DIT = Family(
    pipelines=("DiTPipeline",),
    component="transformer",
    network=DiTTransformer2DModel,
    call=call,
    shape=square,
    output="proj_out_2",
    bottleneck=last_norm,
    classes=lambda config: config["num_embeds_ada_norm"],
    null_label=lambda config: config["num_embeds_ada_norm"],  # 1000 in DiTPipeline
    arguments={"guidance_scale": 1.0},
)
