"""The networks behind the metrics with random weights, in files as their authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import inception_v3

from stepdistill.metrics.clip import ARCHITECTURES
from stepdistill.metrics.weights import KNOWN

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


class StandIn(nn.Module):
    """The interface of NVIDIA's TorchScript: its resizing, its three forms of output, few layers."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=7),
            nn.ReLU(),
            nn.Conv2d(16, width, 3, stride=3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.output = nn.Linear(width, 1008)

    def forward(self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
        batch, channels, height, width = img.shape
        x = img.to(torch.float32)
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / width - 1 / 299
        theta[1, 2] += 1 / height - 1 / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([batch, 1, 1]), [batch, channels, 299, 299], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, self.width)
        if return_features:
            return features
        if no_output_bias:
            return F.softmax(F.linear(features, self.output.weight), dim=1)
        return F.softmax(self.output(features), dim=1)


def save_nvidia_inception(path: Path, width: int = 2048) -> Path:
    """NVIDIA's TorchScript, with ``width`` features."""
    torch.manual_seed(0)
    torch.jit.script(StandIn(width).eval()).save(path)
    return path


def save_pytorch_inception(path: Path) -> Path:
    """pytorch-fid's weights, in full size, with batch norms that are not the identity."""
    torch.manual_seed(1)
    state = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "bn.bias", "fc.bias")):
            tensor.normal_(std=0.1)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("conv.weight"):
            tensor.mul_(2.5)  # As large as that, features and logits stay of order one through all layers.
    torch.save(state, path)
    return path


def timm_dinov2(side: int, *, width: int = 128, depth: int = 2) -> VisionTransformer:
    """A small DINOv2 in another implementation."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side, patch_size=14, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=0, init_values=1
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "norm" in name or "gamma" in name else 0.1)
    return model.eval()


def save_dinov2(model: VisionTransformer, path: Path) -> Path:
    """Under facebookresearch's names, which timm shares, with the mask token that their files hold."""
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, model.embed_dim)}, path)
    return path


def save_openai_clip(state: dict[str, Tensor], path: Path) -> Path:
    """OpenAI's TorchScript: three numbers beside the weights."""
    root = nn.Module()
    for number in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(number, torch.tensor(1))
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    torch.jit.script(root).save(path)
    return path


def tell_open_clip(folder: Path, *architectures: str) -> None:
    """Give open_clip tiny models under the names of large ones, all that are known here, with their activations."""
    for name in architectures or ARCHITECTURES.values():
        (folder / f"{name}.json").write_text(json.dumps(TINY_CLIP | {"quick_gelu": "quickgelu" in name}))
    open_clip.add_model_config(folder)


def save_all(folder: Path) -> Path:
    """A file for every known network: its name, its format, and random weights of few features where it can be.

    pytorch-fid's Inception is in full size, since its layers are torchvision's; CLIPs need ``tell_open_clip``.
    """
    save_nvidia_inception(folder / KNOWN["inception"].name, width=24)
    save_pytorch_inception(folder / KNOWN["inception-pytorch"].name)
    save_dinov2(timm_dinov2(224, width=64, depth=1), folder / KNOWN["dinov2-vit-l-14"].name)
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        state = open_clip.CLIP(**TINY_CLIP).state_dict()
        openai = "openaipublic" in KNOWN[name].url
        path = folder / KNOWN[name].name
        save_openai_clip(state, path) if openai else torch.save(state, path)
    return folder
