"""The three Inceptions behind FID; they share the weights of Google's 2015 graph and differ in resizing and scaling.

Logits come without the bias of the last layer, as the inception score has been computed since its first code: it
multiplies the features by the weights of the graph's softmax layer (so do StyleGAN's ``no_output_bias`` and
torch-fidelity's ``logits_unbiased``). All 1,008 outputs of the graph are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import UserError, first_line
from .base import Features
from .network import FrozenNetwork
from .weights import Weights

if TYPE_CHECKING:
    from torchvision.models import Inception3

SIZE = 299


class Inception(FrozenNetwork):
    """NVIDIA's TorchScript, which resizes inside as TensorFlow 1 did (bilinear, corners aligned at zero, no blur).

    EDM, StyleGAN, SiD, FastGen; clean-fid's ``legacy_tensorflow``.
    """

    name = "inception"

    def __init__(self, weights: Weights, *, device: torch.device | str = "cpu") -> None:
        self.weights = weights.sha256
        self._base, _, self._head = _torchscript(weights, device)
        self.dimension = self._head.shape[1]

    def _features(self, images: Tensor) -> Features:
        features = self._base(images, return_features=True)
        return Features(features, features @ self._head.T)


class CleanInception(FrozenNetwork):
    """The layers of NVIDIA's TorchScript on images that were resized before: clean-fid, GigaGAN, DMD2."""

    name = "inception-clean"

    def __init__(self, weights: Weights, *, device: torch.device | str = "cpu") -> None:
        self.weights = weights.sha256
        _, self._layers, self._head = _torchscript(weights, device)
        self.dimension = self._head.shape[1]

    def _features(self, images: Tensor) -> Features:
        height, width = images.shape[2:]
        if (height, width) != (SIZE, SIZE):
            raise UserError(
                f"{self.name} needs images resized to {SIZE}x{SIZE} (bicubic-float {SIZE}), got {width}x{height}"
            )
        features = self._layers((images.float() - 128) / 128).flatten(1)
        return Features(features, features @ self._head.T)


class PytorchInception(FrozenNetwork):
    """The network of pytorch-fid: bilinear to 299 with half-pixel centres and no blur, then ``2 x / 255 - 1``.

    Sana; clean-fid's ``legacy_pytorch``.
    """

    name = "inception-pytorch"
    dimension = 2048

    def __init__(self, weights: Weights, *, device: torch.device | str = "cpu") -> None:
        self.weights = weights.sha256
        self._net = _pytorch_fid(weights).to(device)

    def _features(self, images: Tensor) -> Features:
        x = F.interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        features = fid_inception(self._net, 2 * x - 1)
        return Features(features, features @ self._net.fc.weight.T)


def _torchscript(weights: Weights, device: torch.device | str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The program, its layers without the resizing before them, and the weights ``(1008, 2048)`` of the last one."""
    try:
        program = weights.program(device)
        return program, program.layers, program.output.weight.detach()
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{weights.path} is not NVIDIA's TorchScript Inception: {first_line(error)}") from None


def _pytorch_fid(weights: Weights) -> Inception3:
    """Inception v3 of torchvision with pytorch-fid's weights in it, to be called through ``fid_inception``."""
    try:
        from torchvision.models import inception_v3
    except ImportError:
        raise UserError("inception-pytorch needs torchvision: pip install torchvision") from None
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    try:
        net.load_state_dict(weights.state())
    except RuntimeError as error:
        raise UserError(f"{weights.path} is not pytorch-fid's Inception: {first_line(error)}") from None
    return net.float().eval().requires_grad_(False)


def fid_inception(net: Inception3, x: Tensor) -> Tensor:
    """Pooled features ``(B, 2048)`` of ``(B, 3, 299, 299)`` in [-1, 1], by torchvision's layers in TensorFlow's way.

    Average pools do not count padding, and the last block pools by maximum, an error of the 2015 graph that its
    weights were trained with.
    """
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = net.get_submodule(name)(x)
    x = net.get_submodule("maxpool2")(x)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _branches(net.get_submodule(name), x, ("branch1x1",), ("branch5x5_1", "branch5x5_2"), _DOUBLE_3X3)
    x = net.get_submodule("Mixed_6a")(x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _branches(net.get_submodule(name), x, ("branch1x1",), _SINGLE_7X7, _DOUBLE_7X7)
    x = net.get_submodule("Mixed_7a")(x)
    x = _wide(net.get_submodule("Mixed_7b"), x, _average(x))
    x = _wide(net.get_submodule("Mixed_7c"), x, F.max_pool2d(x, 3, stride=1, padding=1))
    return x.mean((2, 3))


_DOUBLE_3X3 = tuple(f"branch3x3dbl_{k}" for k in (1, 2, 3))
_SINGLE_7X7 = tuple(f"branch7x7_{k}" for k in (1, 2, 3))
_DOUBLE_7X7 = tuple(f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _chain(block: nn.Module, x: Tensor, *names: str) -> Tensor:
    for name in names:
        x = block.get_submodule(name)(x)
    return x


def _branches(block: nn.Module, x: Tensor, *branches: tuple[str, ...]) -> Tensor:
    parts = [_chain(block, x, *branch) for branch in branches]
    return torch.cat([*parts, _chain(block, _average(x), "branch_pool")], dim=1)


def _wide(block: nn.Module, x: Tensor, pooled: Tensor) -> Tensor:
    """The last two blocks, whose 3x3 branches fork into 1x3 and 3x1."""
    single, double = _chain(block, x, "branch3x3_1"), _chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
    parts = [_chain(block, x, "branch1x1")]
    parts += [_chain(block, single, f"branch3x3_2{side}") for side in "ab"]
    parts += [_chain(block, double, f"branch3x3dbl_3{side}") for side in "ab"]
    return torch.cat([*parts, _chain(block, pooled, "branch_pool")], dim=1)
