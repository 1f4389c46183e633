"""DINOv2 against timm's implementation, facebookresearch's positions, and both forms of resizing."""

import numpy as np
import pytest
import torch
from PIL import Image
from random_networks import save_dinov2, timm_dinov2
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.images import to_picture
from stepdistill.metrics.extractors import load_extractor

WIDTH, DEPTH = 128, 2


def noise(height, width, batch=2):
    coarse = torch.randint(256, (batch, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    return smooth.to(torch.uint8)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model for 224x224, where no positions are interpolated, and its file."""
    model = timm_dinov2(224)
    return model, save_dinov2(model, tmp_path_factory.mktemp("dinov2") / "small.pth")


def extractor(path, name="dinov2-vit-l-14"):
    return load_extractor(name, weights=path, trust=True)


def normalised(images):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("name", ["dinov2-vit-l-14", "dinov2-vit-l-14-pillow"])
def test_features_are_the_normalised_class_token_of_timm(small, name):
    model, path = small
    images = noise(224, 224)
    with torch.no_grad():
        expected = model.forward_features(normalised(images.float()))[:, 0]
    network = extractor(path, name)
    assert (network.name, network.dimension) == (name, WIDTH)
    torch.testing.assert_close(network(images).features, expected, rtol=1e-4, atol=1e-4)


def test_files_under_the_names_of_transformers_are_read_too(small, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=224)
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    images = noise(224, 224)
    with torch.no_grad():
        expected = model(normalised(images.float())).pooler_output
    got = extractor(tmp_path / "model.safetensors")(images).features
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def bicubic(scale, old, new):
    """Interpolation by Keys' kernel with a = -0.75 at ``(k + 0.5) / scale - 0.5``, edges repeated."""
    matrix = np.zeros((new, old))
    for k in range(new):
        place = (k + 0.5) / scale - 0.5
        for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x, a = abs(place - neighbour), -0.75
            inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[k, min(max(neighbour, 0), old - 1)] += inner if x <= 1 else outer
    return torch.from_numpy(matrix)


def test_positions_are_interpolated_at_the_scale_of_facebookresearch(tmp_path):
    large, side = timm_dinov2(518), 16
    matrix = bicubic((side + 0.1) / 37, 37, side)
    state = large.state_dict()
    grid = state["pos_embed"][:, 1:].reshape(37, 37, WIDTH).double()
    grid = torch.einsum("ik,jl,klc->ijc", matrix, matrix, grid).reshape(1, side**2, WIDTH).float()
    reference = timm_dinov2(224)
    reference.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], grid], dim=1)})
    images = noise(224, 224)
    with torch.no_grad():
        expected = reference.forward_features(normalised(images.float()))[:, 0]
    got = extractor(save_dinov2(large, tmp_path / "large.pth"))(images).features
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # What transformers does by itself, to the size of 16 without the tenth, is another network.
    plain = torch.nn.functional.interpolate(
        state["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2), size=(side, side), mode="bicubic"
    )
    plain = plain.flatten(2).transpose(1, 2)
    reference.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], plain], dim=1)})
    with torch.no_grad():
        other = reference.forward_features(normalised(images.float()))[:, 0]
    assert (other - expected).abs().max() > 10 * (got - expected).abs().max()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (300, 200)])
def test_the_exact_form_resizes_as_pillow_does(small, height, width):
    images = noise(height, width)
    # Rows first, as when these values were published: Pillow 13 turns the order round for some shapes.
    rows = [to_picture(image).resize((224, height), Image.Resampling.BICUBIC) for image in images]
    resized = [np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in rows]
    resized = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    network = extractor(small[1], "dinov2-vit-l-14-pillow")
    torch.testing.assert_close(network(images).features, network(resized).features, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512)])
def test_the_fast_form_resizes_without_rounding_and_with_a_blur(small, height, width):
    images = noise(height, width)
    pictures = [[Image.fromarray(channel.float().numpy(), mode="F") for channel in image] for image in images]
    resized = [[np.asarray(p.resize((224, 224), Image.Resampling.BICUBIC)) for p in picture] for picture in pictures]
    network = extractor(small[1])
    exact = network(torch.from_numpy(np.stack([np.stack(picture) for picture in resized]))).features
    got = network(images).features
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)
    rounded = extractor(small[1], "dinov2-vit-l-14-pillow")(images).features
    assert (rounded - got).abs().max() > 3 * (got - exact).abs().max()


def test_what_is_no_dinov2_is_refused(small, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    state = torch.load(small[1], weights_only=True)
    lacking = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save({**state, "register_tokens": torch.zeros(1, 4, WIDTH)}, tmp_path / "registers.pth")
    for file, said in (
        ("foreign.safetensors", "is no DINOv2"),
        ("lacking.pth", "layernorm"),
        ("registers.pth", "regi"),
    ):
        with pytest.raises(UserError, match=said):
            extractor(tmp_path / file)
