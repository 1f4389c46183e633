"""Teachers in fewer bits: what they compute, what passes through them, what they take, and what is refused."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from families import build
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill import prompts
from stepdistill.config import Config, Training
from stepdistill.distill import distill
from stepdistill.dry_run import rehearse, role_of
from stepdistill.errors import UserError
from stepdistill.learners import check_learners
from stepdistill.quantization import quantized
from stepdistill.teacher import load_teacher


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "gguf": "gguf"}
KINDS = [pytest.param(kind, marks=needs(package)) for kind, package in PACKAGES.items()]
ROUNDING = {"int8": 0.02, "nf4": 0.2, "gguf": 0.02}
"""Relative, of an output; four bits are a sixteenth as fine as eight."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def flux(folder):
    return load_teacher(str(folder), resolution=16)


def write_gguf(file, weights):
    """Rows of whole blocks in eight bits, as llama.cpp's Q8_0 has them, norms in bfloat16, the others as they are."""
    gguf: Any = importlib.import_module("gguf")
    writer, kinds = gguf.GGUFWriter(str(file), "flux"), gguf.GGMLQuantizationType
    for name, weight in weights.items():
        kind = kinds.Q8_0 if weight.ndim == 2 and weight.shape[1] % 32 == 0 else kinds.F32
        kind = kinds.BF16 if "norm_q" in name else kind
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def asked(request, flux, tmp_path):
    """What ``training.quantize_teacher`` says for the kind that a test is given."""
    if request.param != "gguf":
        return request.param
    write_gguf(tmp_path / "flux-Q8_0.gguf", flux.network.state_dict())
    return str(tmp_path / "flux-Q8_0.gguf")


def light(teacher, asked):
    return quantized(teacher, Training(quantize_teacher=asked))


def inputs(teacher):
    shapes = {**teacher.family.told(teacher.network.config), "encoder_hidden_states": (7, 8)}
    cond = {key: torch.randn(2, *shape) for key, shape in shapes.items()} | {"guidance": torch.ones(2)}
    return torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.8]), cond


def unpacked(layer: Any):
    """The weights that a layer in fewer bits computes with."""
    if type(layer).__name__ == "GGUFLinear":
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(layer.weight).float()
    return layer.weight.dequantize() if type(layer.weight).__name__ == "Int8Tensor" else layer.weight


@pytest.mark.parametrize("asked", KINDS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_in_fewer_bits_is_nearly_the_teacher_and_leaves_the_whole_weights(dtype, asked, folder, request):
    teacher = load_teacher(str(folder), resolution=16, dtype=dtype)
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    at = inputs(teacher)
    whole, few = (each.denoiser(*at).x0 for each in (teacher, light(teacher, asked)))
    assert 0 < (whole - few).norm() / whole.norm() < ROUNDING[request.node.callspec.params["asked"]]
    assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())


@pytest.mark.parametrize("asked", KINDS, indirect=True)
def test_values_gradients_and_forward_mode_are_those_of_the_rounded_weights(asked, flux):
    few, same = light(flux, asked), copy.deepcopy(flux)
    packed, changed = dict(few.denoiser.network.named_modules()), 0
    for name, layer in same.denoiser.network.named_modules():
        if name.endswith("norm_q"):
            layer.load_state_dict(packed[name].state_dict())
        elif isinstance(layer, torch.nn.Linear):
            weight = unpacked(packed[name])
            changed += not torch.equal(layer.weight, weight)
            layer.weight.data = weight.detach().clone()
    assert changed > 20
    x, t, cond = inputs(flux)
    tangent, found = torch.randn_like(x), []
    for teacher in (few, same):
        at = x.clone().requires_grad_()
        value = teacher.denoiser(at, t, cond).x0
        (gradient,) = torch.autograd.grad(value.square().sum(), at)
        with sdpa_kernel(SDPBackend.MATH):
            slope = jvp(lambda x: teacher.denoiser(x, t, cond).x0, (x,), (tangent,))[1]  # noqa: B023
        found.append((value.detach(), gradient, slope))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def config(folder, output_dir, asked, **training):
    return Config.model_validate(
        {
            "teacher": str(folder),
            "output_dir": str(output_dir),
            "steps": 1,
            "method": {"name": "sid", "init_ratio": float("inf"), "input": "unit"},
            # of a range of scales, as for one the embedding of the scale is folded away
            "data": {"prompts": ["a cat"], "guidance_scale": [2.0, 4.0], "resolution": 16},
            "training": {"batch_size": 2, "trackers": [], "quantize_teacher": asked, **training},
        }
    )


@pytest.mark.parametrize("asked", KINDS, indirect=True)
def test_a_run_with_a_teacher_in_fewer_bits_trains_whole_networks_and_resumes(asked, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "prompts")
    first = config(folder, tmp_path / "run", asked)
    distill(first)
    student = distill(first.model_copy(update={"steps": 2, "resume": True}))
    weights = load_file(student / "transformer/diffusion_pytorch_model.safetensors")
    whole = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in weights.items()} == {
        key: (value.shape, torch.float32) for key, value in whole.items()
    }
    assert max((weights[key] - whole[key]).abs().max() for key in whole) < 1e-3, "the student starts as whole weights"


@pytest.mark.parametrize("asked", KINDS, indirect=True)
def test_a_dry_run_counts_the_bytes_that_a_teacher_in_fewer_bits_has(asked, folder, flux, tmp_path):
    told = config(folder, tmp_path / "run", asked, mixed_precision="bf16")
    found = rehearse(told.plan[0], told).roles["teacher"]
    assert found.resident == role_of(light(flux, asked).denoiser.network, "teacher", told.training).resident
    assert found.weights == sum(parameter.numel() for parameter in flux.network.parameters())
    whole = role_of(flux.network, "teacher", told.training).resident
    assert found.resident < (0.3 if asked == "nf4" else 0.45) * whole


@pytest.mark.parametrize("value", ["int4", "", "flux.safetensors"])
def test_other_bits_are_refused(value):
    with pytest.raises(ValidationError, match=r"must be int8, nf4 or the path of a \.gguf file"):
        Training.model_validate({"quantize_teacher": value})


@pytest.mark.parametrize(("value", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes"), ("a.gguf", "gguf")])
def test_what_is_not_installed_is_asked_for_by_name(value, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"quantize_teacher={value} needs {package}; pip install stepdistill"):
        check_learners(tiny_unet(), Training(quantize_teacher=value), conditioned=False)


def test_files_that_are_not_there_or_cannot_be_read_into_a_network_are_refused(flux, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    training = Training(quantize_teacher="lost.gguf")
    with pytest.raises(UserError, match="there is no file lost"):
        check_learners(flux.network, training, conditioned=False)
    with pytest.raises(UserError, match="no GGUF file into a UNet2DModel; give int8 or nf4"):
        check_learners(tiny_unet(), training, conditioned=False)


@needs("gguf")
def test_a_file_of_another_network_or_of_a_part_of_one_is_refused(flux, tmp_path):
    weights = flux.network.state_dict()
    part = {key: value for key, value in weights.items() if "proj_mlp" not in key}
    wider = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in weights.items()}
    contents = {"part": part, "wider": wider, "other": {"a.weight": torch.zeros(4, 32)}}
    for name, content in contents.items():
        write_gguf(tmp_path / f"{name}.gguf", content)
        with pytest.raises(UserError, match=f"{name}.gguf does not hold the FluxTransformer2DModel of .*flux"):
            light(flux, str(tmp_path / f"{name}.gguf"))
    (tmp_path / "text.gguf").write_text("no such file")
    with pytest.raises(UserError, match=r"text.gguf does not hold"):
        light(flux, str(tmp_path / "text.gguf"))
