"""A frozen teacher in fewer bits, by torchao, by bitsandbytes, or as a GGUF file has it.

Every layer unpacks its weights when it is called and goes on with plain products, so that gradients to the input and
forward mode pass as they do through whole weights.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from .config import Training
from .errors import UserError, first_line
from .sources import part
from .teacher import Teacher

_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
_BLOCK = 64


def quantized(teacher: Teacher, training: Training) -> Teacher:
    """The teacher with a frozen network of its own in fewer bits, where asked; the whole weights stay for the others.

    Raises:
        UserError: a GGUF file does not hold this network.
    """
    asked = training.quantize_teacher
    if asked is None:
        return teacher
    network = copy.deepcopy(teacher.network) if asked in _PACKAGES else _from_file(teacher, Path(asked).expanduser())
    if asked == "int8":
        torchao: Any = importlib.import_module("torchao.quantization")
        torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    elif asked == "nf4":
        importlib.import_module("bitsandbytes")  # which adds its operations to torch's
        for layer in [module for module in network.modules() if isinstance(module, nn.Linear)]:
            register_parametrization(layer, "weight", _NF4(layer.weight.shape), unsafe=True)
    return replace(teacher, denoiser=replace(teacher.denoiser, network=network.requires_grad_(False)))


class _NF4(nn.Module):
    """Weights in four bits whose levels fit normal numbers (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    bitsandbytes' own layer multiplies packed weights in kernels without a forward mode, and on some CPUs without
    gradients once it was called without.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two weights to a byte, and the largest magnitude of every block, which is one of theirs and as precise."""
        packed, largest = torch.ops.bitsandbytes.quantize_4bit(weight, _BLOCK, "nf4", torch.uint8)
        return packed, largest.to(weight.dtype)

    def forward(self, packed: Tensor, largest: Tensor) -> Tensor:
        """The weights, in the precision that ``largest`` has."""
        unpack = torch.ops.bitsandbytes.dequantize_4bit
        return unpack(packed, largest.float(), _BLOCK, "nf4", self.shape, largest.dtype)


def _from_file(teacher: Teacher, file: Path) -> nn.Module:
    whole, kind = teacher.network, teacher.family.network
    misfit = f"training.quantize_teacher: {file} does not hold the {kind.__name__} of {teacher.source}"
    try:
        network = cast(Any, kind).from_single_file(
            str(file),
            config=str(part(teacher.folder, teacher.family.component)),
            quantization_config=GGUFQuantizationConfig(compute_dtype=whole.dtype),
            torch_dtype=whole.dtype,
        )
    except Exception as error:  # names of other tools are translated, which fails in as many ways as there are files
        raise UserError(f"{misfit}: {first_line(error)}") from None
    if missing := [name for name, parameter in network.named_parameters() if parameter.is_meta]:
        raise UserError(f"{misfit}: it has no {missing[0]}")
    unpack: Any = importlib.import_module("diffusers.quantizers.gguf.utils").dequantize_gguf_tensor
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            unpacks = isinstance(module, nn.Linear) and name == "weight"
            if parameter.dtype == torch.uint8 and not unpacks:
                setattr(module, name, nn.Parameter(unpack(parameter).to(whole.dtype)))
    return network.to(whole.device)


def check_quantized(network: nn.Module, asked: str) -> None:
    """Refuse what ``quantized`` cannot do with ``network``.

    Raises:
        UserError: a package or a file is missing, or diffusers reads no such file into this kind of network.
    """
    package = _PACKAGES.get(asked, "gguf")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"training.quantize_teacher={asked} needs {package}; pip install stepdistill[quantize]")
    if asked in _PACKAGES:
        return
    if not isinstance(network, FromOriginalModelMixin):
        raise UserError(
            f"training.quantize_teacher: diffusers reads no GGUF file into a {type(network).__name__}; give "
            f"{' or '.join(_PACKAGES)}"
        )
    if not Path(asked).expanduser().is_file():
        raise UserError(f"training.quantize_teacher: there is no file {asked}")
