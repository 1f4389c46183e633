"""``UNet2DModel``: unconditional and class-conditional pixel networks (DDPM, DDIM, consistency, EDM)."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor, nn

from ..conditions import Cond
from .family import Config, Family, square


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, C, H, W)`` output for state ``x`` at float network labels ``(B,)``; ``cond`` may hold ``class_labels``."""
    return network(x, label.float(), **cond, return_dict=False)[0]


def bottleneck(network: nn.Module) -> nn.Module:
    """The middle block, also of a wrapped network."""
    return next(layer for name, layer in network.named_modules() if name.split(".")[-1] == "mid_block")


def _refuse(config: Config) -> str | None:
    channels = config.get("in_channels"), config.get("out_channels")
    if channels[0] is None or channels[0] != channels[1]:
        return (
            f"the UNet maps {channels[0]} to {channels[1]} channels; networks that also predict a variance are not "
            "supported"
        )
    if config.get("time_embedding_type", "positional") != "positional" or config.get("class_embed_type"):
        return "only UNet2DModel with positional time and plain class embeddings is supported"
    if config.get("sample_size") is None:
        return "unet/config.json has no sample_size, so the size of a sample is unknown"
    return None


UNET2D = Family(
    pipelines=("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline"),
    component="unet",
    network=UNet2DModel,
    call=call,
    shape=square,
    output="conv_out",
    classes=lambda config: config["num_class_embeds"],
    bottleneck=bottleneck,
    refuse=_refuse,
)
