"""DINOv2 ViT-L/14 for FD-DINOv2: the normalised class token, as EDM2 and dgm-eval take it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import UserError, first_line
from .base import Features
from .network import FrozenNetwork
from .resampling import resize
from .weights import Weights

if TYPE_CHECKING:
    from transformers import Dinov2Model

SIZE, PATCH, HEAD = 224, 14, 64
"""Side of the images, side of their patches, width of an attention head; the same for every DINOv2."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class _DinoV2(FrozenNetwork):
    """A DINOv2 on 224x224 images."""

    def __init__(self, weights: Weights, *, device: torch.device | str = "cpu") -> None:
        self.weights = weights.sha256
        self._net = _load(weights, device)
        self.dimension = self._net.config.hidden_size

    def _token(self, images: Tensor) -> Features:
        """Features of ``(B, 3, 224, 224)`` images in [0, 255]."""
        x = images.float() / 255
        x = (x - x.new_tensor(_MEAN).view(3, 1, 1)) / x.new_tensor(_STD).view(3, 1, 1)
        return Features(self._net(x).pooler_output)


class DinoV2(_DinoV2):
    """EDM2's default: resized by torch in float32, bicubic with a blur, neither rounded nor clipped."""

    name = "dinov2-vit-l-14"

    def _features(self, images: Tensor) -> Features:
        return self._token(F.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True))


class DinoV2Pillow(_DinoV2):
    """dgm-eval, and EDM2's slow form: resized by Pillow and rounded to bytes."""

    name = "dinov2-vit-l-14-pillow"

    def _features(self, images: Tensor) -> Features:
        return self._token(resize(images, "bicubic", SIZE, SIZE))


def _load(weights: Weights, device: torch.device | str) -> Dinov2Model:
    """The network of the transformers library; its shape is read off the weights."""
    from transformers import Dinov2Config, Dinov2Model

    state = _hub_to_transformers(weights.state())
    try:
        width = state["embeddings.cls_token"].shape[-1]
        state["embeddings.position_embeddings"] = _positions(state["embeddings.position_embeddings"], SIZE // PATCH)
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")),
            num_attention_heads=width // HEAD,
            image_size=SIZE,
            patch_size=PATCH,
        )
        loaded: Any = Dinov2Model.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{weights.path} is no DINOv2: {first_line(error)}") from None
    net, report = loaded
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:  # Missing ones were filled with noise.
        raise UserError(f"{weights.path} is no DINOv2 that is known here: missing or unknown {', '.join(wrong[:5])}")
    return net.eval().requires_grad_(False).to(device)


_NAMES = (
    (r"^cls_token", "embeddings.cls_token"),
    (r"^mask_token", "embeddings.mask_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
)


def _hub_to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of facebookresearch's files as transformers spells them; those that it spells already stay."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in _NAMES:
            name = re.sub(ours, theirs, name)
        if ".attn.qkv." in name:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = chunk.clone()
        else:
            renamed[name] = tensor
    return renamed


def _positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings ``(1, 1 + side^2, d)`` out of those of another resolution, as facebookresearch's code does.

    It scales by ``(side + 0.1) / old``, against rounding, and samples at that scale; transformers resizes to ``side``,
    which is a slightly different network, and not the one behind published numbers.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    old = math.isqrt(grid.shape[1])
    if old == side:
        return positions
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)
