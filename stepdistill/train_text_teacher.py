"""Train the small text-to-image teacher: a stock ``StableDiffusionPipeline`` of captioned digits.

``python training/train_text_teacher.py --config configs/teacher_digits_text.yaml``.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .caption_tokenizer import write_tokenizer
from .conditions import in_turn
from .config import EnoughSamples, Section
from .errors import UserError
from .evaluation import Evaluator, Measurement
from .images import TEXT_DIGITS, load_text_digits, to_float, to_picture, to_uint8
from .metrics.digits import DigitsExtractor
from .samplers import SampleNoise
from .styles import CAPTIONS, STYLES


class Autoencoder(Section):
    """The VAE, trained first and alone."""

    model: dict[str, Any]
    """Arguments of ``diffusers.AutoencoderKL``; its ``scaling_factor`` is measured."""
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 3e-3
    kl_weight: NonNegativeFloat = 3e-4
    """Weight of the mean KL divergence of a latent number beside the mean square error of a pixel."""


class TextEncoder(Section):
    """Sizes of the ``CLIPTextModel``, named as in ``transformers.CLIPTextConfig``, which takes misspelled ones too."""

    hidden_size: PositiveInt = 48
    intermediate_size: PositiveInt = 96
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4


class TextTeacherConfig(Section):
    """What determines a text-to-image teacher."""

    output_dir: Path
    """Folder of the finished ``StableDiffusionPipeline``; must not exist."""
    seed: NonNegativeInt = 0
    vae: Autoencoder
    unet: dict[str, Any]
    """Arguments of ``diffusers.UNet2DConditionModel``; ``cross_attention_dim`` is the text encoder's hidden size."""
    text_encoder: TextEncoder = TextEncoder()
    caption_tokens: int = Field(default=16, ge=8)
    """Length that prompts are padded to and cut at."""
    scheduler: dict[str, Any]
    """Arguments of ``diffusers.DDIMScheduler``."""
    steps: PositiveInt = 3500
    """Training steps of the UNet and the text encoder."""
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = 100
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    empty_captions: float = Field(default=0.15, ge=0, lt=1)
    """Share of captions that are replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = Field(default=3.0, ge=1)
    """Of the measurements and the picture; a pipeline does not store it."""
    evaluate_steps: tuple[PositiveInt, ...] = Field(default=(50, 20, 10, 4, 1), min_length=1)
    """DDIM steps at which the finished teacher is measured, at the first also without guidance."""
    evaluate_samples: EnoughSamples = 600
    """Samples per measurement; multiples of 600 ask for every caption equally often in every jackknife group."""


def train_text_teacher(config: TextTeacherConfig) -> Path:
    """Train on the styled digits; save the pipeline, ``training.json`` and ``preview.png``; return their folder.

    Raises:
        UserError: the folder exists, or a section cannot be built.
    """
    if config.output_dir.exists():
        raise UserError(f"{config.output_dir} exists; choose another output_dir or remove it")
    torch.manual_seed(config.seed)
    started, used = time.monotonic(), time.process_time()
    pipeline = _untrained(config)
    images, captions = load_text_digits()
    means, stds = _train_vae(config.vae, pipeline.vae, to_float(images))
    _train_unet(config, pipeline, means, stds, captions)
    spent = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
    _save(pipeline, config)
    record = {
        "config": config.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        **{name: round(value) for name, value in spent.items()},
        **_measure(config),
        "seconds_with_measurements": round(time.monotonic() - started),
    }
    (config.output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["generated"], indent=1))
    return config.output_dir


def _untrained(config: TextTeacherConfig) -> StableDiffusionPipeline:
    """The pipeline with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer", CAPTIONS, config.caption_tokens)
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
    try:
        text_config = CLIPTextConfig(
            **config.text_encoder.model_dump(),
            vocab_size=len(tokenizer),
            max_position_embeddings=config.caption_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        scheduler: Any = DDIMScheduler(**config.scheduler)  # the constructor's types know an enumeration of schedulers
        missing: Any = None  # and no pipeline without a safety checker
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**config.vae.model),
            text_encoder=CLIPTextModel(text_config),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**config.unet, cross_attention_dim=config.text_encoder.hidden_size),
            scheduler=scheduler,
            safety_checker=missing,
            feature_extractor=missing,
            requires_safety_checker=False,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the vae, unet, text_encoder or scheduler section cannot be built: {error}") from None
    size, channels = pipeline.unet.config["sample_size"], pipeline.unet.config["in_channels"]
    reduction, latents = pipeline.vae_scale_factor, pipeline.vae.config["latent_channels"]
    if size != 16 // reduction or channels != latents:
        raise UserError(
            f"the VAE turns the 16x16 digits into {latents} channels of {16 // reduction}x{16 // reduction}; the unet "
            f"section has in_channels={channels} and sample_size={size}"
        )
    return pipeline


def _train_vae(config: Autoencoder, vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Train ``vae`` on ``images (N, 3, 16, 16)``, set its scaling factor, return its scaled latents.

    Returns:
        Means and standard deviations of the latents' distributions, ``(N, C, H, W)`` each, times the scaling factor.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.lr, fused=True)
    lr_schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=config.steps)
    vae.train()
    for _ in trange(config.steps, desc="vae", mininterval=2):
        x0 = images[torch.randint(len(images), (config.batch_size,))]
        latents: Any = vae.encode(x0, return_dict=False)[0]
        kl = latents.kl().mean() / latents.mean[0].numel()
        decoded = vae.decode(latents.sample(), return_dict=False)[0]
        loss = F.mse_loss(decoded, x0) + config.kl_weight * kl
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
    vae.eval().requires_grad_(False)
    encoded = [vae.encode(part, return_dict=False)[0] for part in images.split(256)]
    means, stds = torch.cat([part.mean for part in encoded]), torch.cat([part.std for part in encoded])
    scale = 1 / (means + stds * torch.randn_like(stds)).std().item()
    vae.register_to_config(scaling_factor=scale)
    return scale * means, scale * stds


def _train_unet(
    config: TextTeacherConfig, pipeline: StableDiffusionPipeline, means: Tensor, stds: Tensor, captions: Tensor
) -> None:
    """Train UNet and text encoder together to predict the noise; they end as their averages.

    Args:
        config: the settings.
        pipeline: its networks are trained.
        means: ``(N, C, H, W)`` of the images' scaled latents.
        stds: likewise.
        captions: ``(N,)`` numbers of the images' captions in ``CAPTIONS``.
    """
    unet, text_encoder, scheduler = pipeline.unet.train(), pipeline.text_encoder.train(), pipeline.scheduler
    # Sixty captions and the empty one: all of them together cost less than the text of one batch.
    texts = pipeline.tokenizer([*CAPTIONS, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    lr_schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    for _ in trange(config.steps, desc="unet", mininterval=2):
        chosen = torch.randint(len(means), (config.batch_size,))
        x0 = means[chosen] + stds[chosen] * torch.randn_like(means[chosen])
        kept = torch.rand(config.batch_size) >= config.empty_captions
        t = torch.randint(scheduler.config.num_train_timesteps, (config.batch_size,))
        eps = torch.randn_like(x0)
        states = text_encoder(texts)[0][captions[chosen].where(kept, len(CAPTIONS))]
        loss = F.mse_loss(unet(scheduler.add_noise(x0, eps, t), t, states).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        ema.step(parameters)
    ema.copy_to(parameters)


def _save(pipeline: StableDiffusionPipeline, config: TextTeacherConfig) -> None:
    """Save with the names that every version of transformers reads.

    Version 5 writes a tokenizer that version 4 cannot read, and weights under shorter names, in place of which version
    4 takes random numbers.
    """
    pipeline.save_pretrained(config.output_dir)
    shutil.rmtree(config.output_dir / "tokenizer")
    write_tokenizer(config.output_dir / "tokenizer", CAPTIONS, config.caption_tokens)
    file = config.output_dir / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _measure(config: TextTeacherConfig) -> dict[str, Any]:
    """Prompt accuracy and distance of the saved pipeline and of the real images; draws ``preview.png``."""
    pipeline = StableDiffusionPipeline.from_pretrained(config.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    evaluator = Evaluator(TEXT_DIGITS, batch_size=120)
    settings = [(steps, config.guidance_scale) for steps in config.evaluate_steps] + [(config.evaluate_steps[0], 1.0)]
    rows = []
    for steps, guidance_scale in settings:

        def generate(ids: Sequence[int], steps: int = steps, guidance_scale: float = guidance_scale) -> Tensor:
            return generate_captions(pipeline, ids, steps=steps, guidance_scale=guidance_scale)

        digits = torch.tensor(in_turn(range(config.evaluate_samples), len(CAPTIONS))) % 10
        measured = evaluator.measure(f"{steps} steps", steps, generate, samples=config.evaluate_samples, digits=digits)
        rows.append({"steps": steps, "guidance_scale": guidance_scale, **_row(measured)})
    picture = to_uint8(generate_captions(pipeline, range(60), steps=50, guidance_scale=config.guidance_scale))
    grid = picture.reshape(6, 10, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 96, 160)
    to_picture(grid).resize((480, 288), 0).save(config.output_dir / "preview.png")
    return {"metric": evaluator.protocol.title("fid"), "real": _real(evaluator, config.seed), "generated": rows}


def generate_captions(
    pipeline: StableDiffusionPipeline, ids: Sequence[int], *, steps: int, guidance_scale: float
) -> Tensor:
    """Samples ``ids (B, 3, 16, 16)`` in [-1, 1]; the captions come in turn, and each is the same in any batch."""
    images = pipeline(
        [CAPTIONS[number] for number in in_turn(ids, len(CAPTIONS))],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=SampleNoise(ids, ()).generators,
        output_type="pt",
        return_dict=False,
    )[0]
    return images * 2 - 1


def _row(measured: Measurement) -> dict[str, Any]:
    accuracy = measured.prompt_accuracy
    assert accuracy is not None
    error = math.sqrt(accuracy * (1 - accuracy) / measured.metrics["fid"].n)
    shown = {"prompt_accuracy": round(accuracy, 4), "prompt_accuracy_se": round(error, 4)}
    return {**shown, "distance": asdict(measured.metrics["fid"])}


def _real(evaluator: Evaluator, seed: int) -> dict[str, Any]:
    """What real images reach: the accuracy of every style, and the distance of a random half of the images."""
    images, captions = load_text_digits()
    right = DigitsExtractor().classify(images) == captions % 10
    styles = {STYLES[k] or "plain": right[captions // 10 == k].double().mean().item() for k in range(len(STYLES))}
    return {
        "prompt_accuracy": round(right.double().mean().item(), 4),
        "prompt_accuracy_by_style": {style: round(share, 4) for style, share in styles.items()},
        "half": evaluator.floor(images, seed),
    }
