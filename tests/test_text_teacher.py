"""The text-to-image teacher: captions and styles, the bundled pipeline, and the command that trains it."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

import stepdistill.images
import stepdistill.train_text_teacher
from stepdistill.bundled import bundled
from stepdistill.caption_tokenizer import write_tokenizer
from stepdistill.conditions import in_turn
from stepdistill.config import Evaluate
from stepdistill.errors import UserError
from stepdistill.evaluation import Evaluator
from stepdistill.images import load_digits, load_text_digits, to_float, to_uint8
from stepdistill.metrics.digits import DigitsExtractor
from stepdistill.metrics.jackknife import GROUPS
from stepdistill.metrics.sources import load_images
from stepdistill.preflight import check_evaluation
from stepdistill.styles import CAPTIONS, DIGITS, STYLES, caption, styled
from stepdistill.train_text_teacher import generate_captions

FOLDER = bundled("assets") / "digits_text_teacher"
RECORD = json.loads((FOLDER / "training.json").read_text())
SCALE = RECORD["config"]["guidance_scale"]
TRAINING = Path(__file__).parents[1] / "training" / "train_text_teacher.py"
GREY, LABELS = load_digits()
REAL, NUMBERS = load_text_digits()
EXTRACTOR = DigitsExtractor()
SAMPLES = 120


def in_style(style):
    return REAL[STYLES.index(style) == NUMBERS // 10]


def ink(images):
    """Mean brightness of each image."""
    return to_float(images).mean((1, 2, 3)) / 2 + 0.5


def lean(images):
    """Pixels to the right per pixel upwards: the slope of the strokes' principal direction, from central moments."""
    weight = ink(images.flatten()[:, None, None, None]).reshape(images.shape).mean(1)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    total = weight.sum((1, 2))
    dx = x - ((weight * x).sum((1, 2)) / total)[:, None, None]
    dy = y - ((weight * y).sum((1, 2)) / total)[:, None, None]
    return -(weight * dx * dy).sum((1, 2)) / (weight * dy * dy).sum((1, 2))


def recorded(steps, guidance_scale=SCALE):
    (row,) = (row for row in RECORD["generated"] if (row["steps"], row["guidance_scale"]) == (steps, guidance_scale))
    return row


# Captions and styles


def test_a_caption_names_digit_and_style():
    assert caption(7) == "a handwritten seven"
    assert caption(3, "bold tilted") == "a bold tilted handwritten three"
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 60
    for number, text in enumerate(CAPTIONS):
        assert text.split()[-1] == DIGITS[number % 10]
        assert " ".join(text.split()[1:-2]) == STYLES[number // 10]


def test_every_caption_is_asked_for_equally_often_in_every_jackknife_group():
    assert in_turn(range(60), len(CAPTIONS)) == list(range(60))
    numbers, groups = torch.tensor(in_turn(range(1200), len(CAPTIONS))), torch.arange(1200) % GROUPS
    assert numbers.bincount().tolist() == [20] * 60
    for group in range(GROUPS):
        assert (numbers[groups == group] % 10).bincount().tolist() == [12] * 10
    assert in_turn(range(500, 510), len(CAPTIONS)) == numbers[500:510].tolist()


def test_the_styled_digits_are_an_image_source_with_captions_beside_it():
    assert torch.equal(load_images("builtin:digits_text"), REAL)
    assert (REAL.dtype, REAL.shape) == (torch.uint8, (6 * 1797, 3, 16, 16))
    assert torch.equal(REAL[:, :1].expand_as(REAL), REAL)
    assert torch.equal(NUMBERS % 10, LABELS.repeat(6))
    again, _ = load_text_digits()
    assert torch.equal(again, REAL)


def test_bold_has_more_ink_than_plain_and_thin_less_in_every_image():
    for tilt in ("", "tilted"):
        plain, bold, thin = (ink(in_style(f"{weight} {tilt}".strip())) for weight in ("", "bold", "thin"))
        assert (bold > plain).all()
        assert (thin < plain).all()
        assert bold.mean() > 1.15 * plain.mean()
        assert thin.mean() < 0.87 * plain.mean()


def test_tilting_leans_every_digit_by_the_shear():
    for weight in ("", "bold", "thin"):
        change = lean(in_style(f"{weight} tilted".strip())) - lean(in_style(weight))
        assert change.median() == pytest.approx(0.3, abs=0.05)  # A shear adds its slope; the border cuts some off.
        assert (change > 0.1).double().mean() > 0.99


def test_the_plain_style_reduced_to_8x8_is_nearly_the_digit_itself():
    reduced = torch.nn.functional.avg_pool2d(styled(GREY / 255, ""), 2)
    assert (reduced - GREY / 255).abs().mean() < 1 / 16  # On average less than the step between two grey levels.
    with pytest.raises(ValueError, match=r"style must be one of .* got 'wide'"):
        styled(GREY / 255, "wide")


def test_the_classifier_knows_the_real_styled_digits_as_recorded():
    right = (EXTRACTOR.classify(REAL[::4]) == NUMBERS[::4] % 10).double().mean().item()
    recorded_share = RECORD["real"]["prompt_accuracy"]
    assert recorded_share > 0.93
    assert right == pytest.approx(recorded_share, abs=4 * math.sqrt(recorded_share * (1 - recorded_share) / 2696))


# What measures it


def test_the_evaluator_counts_the_digits_that_were_asked():
    measured = Evaluator("builtin:digits", batch_size=30).measure(
        "real", 1, lambda ids: to_float(GREY[ids[0] : ids[-1] + 1]), samples=100, digits=LABELS[:100]
    )
    expected = (EXTRACTOR.classify(GREY[:100]) == LABELS[:100]).double().mean().item()
    assert measured.prompt_accuracy == pytest.approx(expected)
    assert replace(measured, prompt_accuracy=None).prompt_accuracy is None


@pytest.mark.parametrize(
    ("shape", "scale", "refused"),
    [
        ((1, 8, 8), 1, None),
        ((3, 16, 16), 1, None),
        ((4, 8, 8), 2, None),
        ((3, 12, 12), 1, "12x12 images with 3"),
        ((2, 8, 8), 1, "8x8 images with 2"),
        ((4, 8, 12), 8, "96x64 images with 3"),
    ],
)
def test_evaluation_takes_pictures_that_are_square_multiples_of_8x8(shape, scale, refused):
    teacher: Any = SimpleNamespace(sample_shape=shape, scale=scale, makes_latents=scale > 1, denoiser=None)
    evaluate = Evaluate(reference="builtin:digits_text", teacher_steps=())
    if refused is None:
        check_evaluation(evaluate, teacher)
    else:
        with pytest.raises(UserError, match=f"the teacher makes {refused}; set evaluate=null"):
            check_evaluation(evaluate, teacher)


# The tokenizer


def test_every_word_of_the_captions_is_one_token_and_other_text_survives(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", CAPTIONS, 16)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in (*CAPTIONS, "A Bold handwritten SIX"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert tokenizer.decode(tokenizer("größe 7").input_ids, skip_special_tokens=True).strip() == "größe 7"
    assert (
        tokenizer(["", "x" * 50], padding="max_length", truncation=True, return_tensors="pt").input_ids.shape[1] == 16
    )
    files = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt"} <= files.keys()
    assert files == {file.name: file.read_bytes() for file in (FOLDER / "tokenizer").iterdir()}


# The bundled pipeline


@pytest.fixture(scope="module")
def pipeline():
    loaded = DiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def guided(pipeline):
    """Samples 0..119 in ten steps, two of every caption."""
    return to_uint8(generate_captions(pipeline, range(SAMPLES), steps=10, guidance_scale=SCALE))


def accuracy(images):
    """Share of the samples 0, 1, ... that show the digit asked of them."""
    wanted = torch.tensor(in_turn(range(len(images)), len(CAPTIONS))) % 10
    return (EXTRACTOR.classify(images) == wanted).double().mean().item()


def test_the_bundled_folder_loads_as_it_is_without_a_warning(caplog, recwarn):
    logging.enable_propagation()
    loaded = DiffusionPipeline.from_pretrained(FOLDER)
    logging.disable_propagation()
    assert type(loaded) is StableDiffusionPipeline
    assert not [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not [str(warning.message) for warning in recwarn]
    assert (loaded.safety_checker, loaded.feature_extractor, loaded.image_encoder) == (None, None, None)
    assert loaded.scheduler.config["prediction_type"] == "epsilon"
    assert loaded.scheduler.config["beta_schedule"] == "scaled_linear"
    assert len(loaded.scheduler.betas) == 1000


def test_the_text_encoder_has_the_weight_names_that_every_transformers_reads():
    assert all(name.startswith("text_model.") for name in load_file(FOLDER / "text_encoder" / "model.safetensors"))
    loaded: Any = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", output_loading_info=True)
    assert not any(loaded[1].values())


def test_the_bundled_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 6_000_000


def test_the_scaling_factor_gives_latents_unit_deviation(pipeline):
    with torch.no_grad():
        latents = pipeline.vae.encode(to_float(REAL[::50])).latent_dist.sample(torch.Generator().manual_seed(0))
        decoded = pipeline.vae.decode(latents).sample
    assert (latents * pipeline.vae.config["scaling_factor"]).std().item() == pytest.approx(1, abs=0.03)
    assert (decoded - to_float(REAL[::50])).square().mean() < 0.01  # 26 dB; one of the digits' 17 levels is 0.0156


def test_samples_show_the_digit_of_their_prompt_as_often_as_recorded(guided):
    share = recorded(10)["prompt_accuracy"]
    assert recorded(50)["prompt_accuracy"] >= 0.9
    assert accuracy(guided) > share - 0.02 - 4 * math.sqrt(share * (1 - share) / SAMPLES)


def test_samples_show_the_style_of_their_prompt(guided):
    styles = torch.tensor(in_turn(range(SAMPLES), len(CAPTIONS))) // 10
    weights = {style: ink(guided[styles == k]).mean() for k, style in enumerate(STYLES)}
    assert weights["thin"] < weights[""] < weights["bold"]
    assert weights["thin tilted"] < weights["tilted"] < weights["bold tilted"]
    tilted = (styles == 3) | (styles == 4) | (styles == 5)
    assert lean(guided[tilted]).mean() > lean(guided[~tilted]).mean() + 0.15


def test_guidance_brings_samples_nearer_to_their_prompt(pipeline, guided):
    plain = to_uint8(generate_captions(pipeline, range(SAMPLES), steps=10, guidance_scale=1.0))
    assert accuracy(guided) > accuracy(plain)
    assert recorded(50)["prompt_accuracy"] > recorded(50, 1.0)["prompt_accuracy"]


def test_a_sample_is_the_same_in_any_batch_and_prompts_alone_change_the_digit(pipeline, guided):
    some = to_uint8(generate_captions(pipeline, range(62, 66), steps=10, guidance_scale=SCALE))
    assert (some.int() - guided[62:66].int()).abs().max() <= 1
    one_noise = [torch.Generator().manual_seed(0) for _ in range(10)]
    images = pipeline(
        list(CAPTIONS[:10]), num_inference_steps=10, guidance_scale=SCALE, generator=one_noise, output_type="pt"
    ).images
    assert accuracy(to_uint8(images * 2 - 1)) >= 0.6


def test_the_empty_prompt_gives_many_different_digits(pipeline):
    generators = [torch.Generator().manual_seed(k) for k in range(30)]
    images = pipeline([""] * 30, num_inference_steps=10, guidance_scale=1.0, generator=generators, output_type="pt")
    assert EXTRACTOR.classify(to_uint8(images.images * 2 - 1)).unique().numel() >= 5


def test_the_record_holds_what_a_student_is_compared_with():
    assert [row["steps"] for row in RECORD["generated"]] == [50, 20, 10, 4, 1, 50]
    assert {"seconds", "cpu_seconds", "threads", "metric", "real", "config"} <= RECORD.keys()
    assert RECORD["config"]["seed"] == 0
    distances = [row["distance"]["value"] for row in RECORD["generated"][:5]]
    assert distances[0] < distances[3] < distances[4]


# The training command


TINY = (
    "vae.steps=3",
    "vae.model.block_out_channels=[4,4]",
    "unet.block_out_channels=[8,8]",
    "unet.attention_head_dim=2",
    "text_encoder.hidden_size=8",
    "text_encoder.intermediate_size=8",
    "steps=3",
    "batch_size=8",
    "evaluate_steps=[2]",
    "evaluate_samples=20",
)


def run(*overrides):
    """Run the training script in this process; its exit code."""
    try:
        runpy.run_path(str(TRAINING))["main"](["--config", "teacher_digits_text", *overrides])
    except SystemExit as end:
        return end.code
    return 0


def test_training_makes_a_pipeline_with_its_record_and_picture(tmp_path, capsys, monkeypatch):
    for module in (stepdistill.images, stepdistill.train_text_teacher):  # every twentieth image, to be quick
        monkeypatch.setattr(module, "load_text_digits", lambda: (REAL[::20], NUMBERS[::20]))
    folder = tmp_path / "teacher"
    with torch.random.fork_rng():
        assert run(*TINY, f"output_dir={folder}") == 0
    assert str(folder) in capsys.readouterr().out
    record = json.loads((folder / "training.json").read_text())
    assert [(row["steps"], row["guidance_scale"]) for row in record["generated"]] == [(2, 3.0), (2, 1.0)]
    assert record.keys() == RECORD.keys()
    ours, theirs = ({file.relative_to(at) for at in [root] for file in root.rglob("*")} for root in (FOLDER, folder))
    assert ours == theirs
    text_encoders = (load_file(root / "text_encoder" / "model.safetensors") for root in (FOLDER, folder))
    assert len({frozenset(weights) for weights in text_encoders}) == 1
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    (image,) = loaded("a handwritten one", num_inference_steps=1, return_dict=False)[0]
    assert image.size == (16, 16)
    assert run(*TINY, f"output_dir={folder}") == 2
    assert "exists; choose another output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "stpes: unexpected key, got 3; did you mean steps?"),
        ("text_encoder.hiden_size=8", "text_encoder.hiden_size: unexpected key, got 8; did you mean hidden_size?"),
        ("unet.no_such_key=1", "the vae, unet, text_encoder or scheduler section cannot be built: "),
        ("unet.sample_size=16", "into 4 channels of 8x8; the unet section has in_channels=4 and sample_size=16"),
        ("guidance_scale=0.5", "guidance_scale: must be greater than or equal to 1, got 0.5"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(override, message, tmp_path, capsys):
    assert run(override, f"output_dir={tmp_path / 'none'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
