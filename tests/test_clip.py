"""CLIP features and scores against open_clip itself, and the trap of the activations closed."""

import json
from typing import Any

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from random_networks import TINY_CLIP, save_nvidia_inception, save_openai_clip, tell_open_clip
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from stepdistill.errors import UserError
from stepdistill.images import to_picture
from stepdistill.metrics import clip
from stepdistill.metrics.clip import ARCHITECTURES, ClipScorer, centred, load_towers
from stepdistill.metrics.extractors import load_extractor
from stepdistill.metrics.weights import KNOWN, Weights, sha256_of

SIZES = [(64, 64), (256, 256), (97, 200), (333, 101), (32, 48), (64, 81)]


def noise(height, width, batch=2, seed=0):
    grid = torch.randint(256, (batch, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return grid.to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two architectures that differ in the activation alone, and weights for either in two forms."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    (folder / "tiny-quickgelu.json").write_text(json.dumps(TINY_CLIP | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    state = open_clip.CLIP(**TINY_CLIP).half().state_dict()
    save_file(state, folder / "plain.safetensors")
    save_openai_clip(state, folder / "openai.pt")
    return folder


def weights_at(path):
    return Weights(path, sha256_of(path))


@pytest.fixture(scope="module")
def towers(folder):
    return load_towers("tiny-quickgelu", weights_at(folder / "openai.pt"))


@pytest.fixture(scope="module")
def theirs(folder):
    """The model of open_clip, its preprocessing and its tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-quickgelu", pretrained=str(folder / "plain.safetensors")
    )
    return model.eval(), preprocess, open_clip.get_tokenizer("tiny-quickgelu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_weights_get_the_activation_that_they_were_trained_with(name):
    config = open_clip.get_model_config(ARCHITECTURES[name])
    assert config is not None
    assert config.get("quick_gelu", False) == ("openaipublic" in KNOWN[name].url)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images_are_resized_and_cropped_as_torchvision_does_it_pixel_by_pixel(height, width):
    images = noise(height, width)
    # Tall pictures rows first, as when these scores were published: Pillow 13 turns the order round.
    rows = Resize((height, 64), interpolation=InterpolationMode.BICUBIC) if height > 2 * width else nn.Identity()
    whole = Resize((64 * height // min(height, width), 64 * width // min(height, width)), InterpolationMode.BICUBIC)
    for image, got in zip(images, centred(images, 64), strict=True):
        picture = to_picture(image)
        for step in (rows, whole, CenterCrop(64)):
            picture = step(picture)
        assert to_picture(got).tobytes() == picture.tobytes()


@pytest.mark.parametrize(("height", "width"), SIZES[:3])
def test_image_features_are_those_of_open_clip(towers, theirs, height, width):
    model, preprocess, _ = theirs
    images = noise(height, width)
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(to_picture(image)) for image in images]))
    torch.testing.assert_close(towers.images(images), expected, rtol=1e-5, atol=1e-5)


def test_text_features_are_those_of_open_clip(towers, theirs):
    model, _, tokenizer = theirs
    texts = ["a cat", "Two DOGS  on a beach &amp; a boat", "very " * 100 + "long"]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True)
    got = towers.texts(texts)
    torch.testing.assert_close(got.features, expected, rtol=1e-5, atol=1e-5)
    assert got.truncated == 1


@pytest.mark.parametrize(("words", "truncated"), [(75, 0), (76, 1)])
def test_texts_are_counted_as_truncated_from_the_78th_token_on(towers, words, truncated):
    assert towers.texts(["cat " * words]).truncated == truncated


def test_floats_of_the_right_size_pass_and_others_are_refused(towers):
    images = noise(64, 64)
    torch.testing.assert_close(towers.images(images.float()), towers.images(images))
    with pytest.raises(UserError, match="only uint8 images can be resized"):
        towers.images(noise(65, 65).float())


def test_the_two_activations_give_different_features(folder):
    weights = weights_at(folder / "plain.safetensors")
    plain, quick = (load_towers(name, weights).images(noise(64, 64)) for name in ("tiny", "tiny-quickgelu"))
    assert (plain - quick).abs().max() > 1e-3 * quick.abs().max()


def test_weights_of_openai_are_refused_without_their_activation(folder):
    with pytest.raises(UserError, match="trained with QuickGELU, and tiny computes GELU; use tiny-quickgelu"):
        load_towers("tiny", weights_at(folder / "openai.pt"))


def test_weights_of_another_architecture_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"plain\.safetensors does not fit ViT-B-32"):
        load_towers("ViT-B-32", weights_at(folder / "plain.safetensors"))
    state = open_clip.CLIP(**TINY_CLIP).state_dict()
    del state["visual.proj"]
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match="does not fit tiny"):
        load_towers("tiny", weights_at(tmp_path / "partial.safetensors"))
    inception = save_nvidia_inception(tmp_path / "inception.pt", width=6)
    with pytest.raises(UserError, match=r"inception\.pt does not fit ViT-g-14"):  # Nor is it of OpenAI.
        load_towers("ViT-g-14", weights_at(inception))


@pytest.mark.parametrize("architecture", ["no such model", "ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32"])
def test_what_is_no_plain_clip_is_refused(folder, architecture):
    with pytest.raises(UserError, match=f"{architecture} is not a plain CLIP"):
        load_towers(architecture, weights_at(folder / "plain.safetensors"))


@pytest.mark.parametrize(("name", "normalised"), [("clip-vit-b-32", False), ("clip-vit-l-14-336", True)])
def test_extractors_give_the_features_of_the_image_tower(folder, towers, monkeypatch, name, normalised):
    monkeypatch.setitem(clip.ARCHITECTURES, name, "tiny-quickgelu")
    extractor = load_extractor(name, weights=folder / "openai.pt", trust=True)
    assert (extractor.name, extractor.dimension, extractor.weights) == (name, 32, sha256_of(folder / "openai.pt"))
    images = noise(80, 80)
    expected = towers.images(images)
    torch.testing.assert_close(
        extractor(images).features, F.normalize(expected, dim=-1) if normalised else expected, rtol=1e-6, atol=1e-7
    )
    with pytest.raises(UserError, match="needs RGB images"):
        extractor(images[:, :1])


def test_the_score_is_the_cosine_of_image_and_prompt_in_its_template(towers, theirs):
    model, preprocess, tokenizer = theirs
    images, prompts = noise(70, 90, batch=3), ["a {cat}", "2 dogs", "the sea"]
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(to_picture(image)) for image in images]))
        texts = model.encode_text(tokenizer([f"A photo depicts {prompt}" for prompt in prompts]))
    expected = torch.cosine_similarity(pictures, texts)
    scorer = ClipScorer(towers, template="A photo depicts {}", scale=100)
    scores, truncated = scorer(images, prompts)
    torch.testing.assert_close(scores, 100 * expected, rtol=1e-4, atol=1e-4)
    assert truncated == 0
    assert (ClipScorer(towers)(images, prompts).scores - expected).abs().max() > 1e-4
    one_by_one = [scorer(images[k : k + 1], prompts[k : k + 1]).scores for k in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), scores, rtol=1e-4, atol=1e-4)


def test_negative_cosines_are_kept_unless_clamped(towers):
    images, prompts = noise(64, 64, batch=8), [f"prompt number {k}" for k in range(8)]
    scores = ClipScorer(towers)(images, prompts).scores
    flipped = torch.where(scores < 0, 0, scores)
    assert scores.min() < 0 or scores.max() > 0
    torch.testing.assert_close(ClipScorer(towers, clamp=True)(images, prompts).scores, flipped)


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t"])
def test_an_empty_prompt_is_an_error_that_names_its_row(towers, prompt):
    with pytest.raises(UserError, match="prompt 101 is empty"):
        ClipScorer(towers, template="A photo depicts {}")(noise(64, 64), ["a cat", prompt], rows=[99, 101])


def test_every_image_needs_its_prompt(towers):
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        ClipScorer(towers)(noise(64, 64), ["a cat"])


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place_for_the_prompt(towers, template):
    with pytest.raises(UserError, match=r"one \{\} where the prompt goes"):
        ClipScorer(towers, template=template)


def by_hand(architecture, path, images, prompts):
    """100 times the cosine of open_clip's own features, in numpy."""
    made: Any = open_clip.create_model_and_transforms(architecture, pretrained=str(path))
    model, preprocess, tokenizer = made[0].eval(), made[2], open_clip.get_tokenizer(architecture)
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(to_picture(image)) for image in images]))
        texts = model.encode_text(tokenizer(prompts))
    a, b = (side.double().numpy() for side in (pictures, texts))
    return 100 * (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES.values(), "ViT-L-14"])
def test_every_known_architecture_at_reduced_width_scores_as_by_hand(architecture, tmp_path, monkeypatch):
    for registry in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        monkeypatch.setattr(open_clip.factory, registry, open_clip.factory.__dict__[registry].copy())
    tell_open_clip(tmp_path, architecture)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), tmp_path / "model.safetensors")
    images, prompts = noise(90, 70), ["a cat", "two dogs by the sea"]
    towers = load_towers(architecture, weights_at(tmp_path / "model.safetensors"))
    expected = by_hand(architecture, tmp_path / "model.safetensors", images, prompts)
    np.testing.assert_allclose(ClipScorer(towers, scale=100)(images, prompts).scores, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Random weights of ViT-L-14, 428 million numbers in half precision."""
    config = open_clip.get_model_config("ViT-L-14")
    assert config is not None
    torch.manual_seed(0)
    state = open_clip.CLIP(**config).half().state_dict()
    path = tmp_path_factory.mktemp("full") / "ViT-L-14.safetensors"
    save_file(state, path)
    return path


@pytest.mark.slow
def test_vit_l_14_in_full_size_scores_as_by_hand_with_and_without_quick_gelu(full_size):
    images, prompts = noise(300, 260), ["a cat", "two dogs by the sea"]
    scores = []
    for architecture in ("ViT-L-14", "ViT-L-14-quickgelu"):
        towers = load_towers(architecture, weights_at(full_size))
        scores.append(ClipScorer(towers, scale=100)(images, prompts).scores.numpy())
        del towers
        expected = by_hand(architecture, full_size, images, prompts)
        np.testing.assert_allclose(scores[-1], expected, rtol=1e-3, atol=1e-3)
    assert np.abs(scores[0] - scores[1]).min() > 0.01
