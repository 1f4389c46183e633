"""Tiny random pipelines of every family, built offline, with tokenizers that read single characters."""

# pyright: reportArgumentType=false
# Constructors of diffusers are annotated more narrowly than they are.

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from stepdistill.caption_tokenizer import byte_letters

TABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def clip_tokenizer() -> Any:
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(tokenizer: Any, *, projection: bool = False) -> Any:
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=8,
        **ends,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5_tokenizer() -> Any:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512)


def t5(tokenizer: Any, width: int = 8) -> Any:
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def gemma_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*(chr(c) for c in range(33, 127)), "\u2581"]
    vocabulary = {word: k for k, word in enumerate(words)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=512)


def gemma(tokenizer: Any) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        head_dim=4,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        sliding_window=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.Gemma2Model(config).eval()


def vae(**options: Any) -> Any:
    settings = {"scaling_factor": 0.18215, **options}
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(4, 4),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
        **settings,
    ).eval()


def deep_vae() -> Any:
    blocks, channels = ("ResBlock", "EfficientViTBlock"), (8, 8)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()


def text_unet(**options: Any) -> Any:
    settings = {"cross_attention_dim": 8, **options}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **settings,
    ).eval()


def sd(prediction: str = "epsilon", unet: Any = None) -> Any:
    tokenizer = clip_tokenizer()
    scheduler: Any = DDIMScheduler(
        **TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet or text_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm() -> Any:
    parts = sd().components
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    kept |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return LatentConsistencyModelPipeline(
        **kept, unet=text_unet(time_cond_proj_dim=256), scheduler=LCMScheduler(**TABLE)
    )


def sdxl() -> Any:
    one, two = clip_tokenizer(), clip_tokenizer()
    unet = text_unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(one),
        text_encoder_2=clip(two, projection=True),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=cast(Any, EulerDiscreteScheduler(**TABLE, steps_offset=1, timestep_spacing="leading")),
        add_watermarker=False,
    )


def sd3(*, with_t5: bool = True) -> Any:
    one, two, three = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    t5_parts: Any = {"text_encoder_3": None, "tokenizer_3": None}
    if with_t5:
        t5_parts = {"text_encoder_3": t5(three, 16), "tokenizer_3": three}
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(one, projection=True),
        tokenizer=one,
        text_encoder_2=clip(two, projection=True),
        tokenizer_2=two,
        **t5_parts,
    )


def pixart(kind: type[Any] = PixArtSigmaPipeline) -> Any:
    """Alpha's network is told the size of its pictures, as the stock pipeline does if they are of 128 latents."""
    tokenizer, told_sizes = t5_tokenizer(), kind is PixArtAlphaPipeline
    transformer = PixArtTransformer2DModel(
        sample_size=128 if told_sizes else 8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=12 if told_sizes else 8,  # three sizes share the width
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=24 if told_sizes else 16,
        out_channels=8,
        norm_num_groups=4,
        use_additional_conditions=told_sizes,
    )
    return kind(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=cast(Any, DPMSolverMultistepScheduler(**LINEAR)),
    )


def sana(*, timestep_scale: float = 1.0) -> Any:
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        timestep_scale=timestep_scale,
    )
    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=deep_vae(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def flux(*, guidance: bool = True) -> Any:
    one, two = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(one),
        tokenizer=one,
        text_encoder_2=t5(two),
        tokenizer_2=two,
        transformer=transformer.eval(),
    )


def dit(scheduler: Any = None) -> Any:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    scheduler = scheduler or DDIMScheduler(**LINEAR, clip_sample=False)
    return DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=scheduler)


def sit(*, inverted: bool) -> Any:
    """Labels in [0, 1]: from noise to data as SiT has them, or the other way as REPA has."""
    return dit(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=inverted))


BUILD = {
    "sd": sd,
    "sd-v": lambda: sd("v_prediction"),
    "lcm": lcm,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-without-t5": lambda: sd3(with_t5=False),
    "pixart": pixart,
    "pixart-alpha": lambda: pixart(PixArtAlphaPipeline),
    "sana": sana,
    "flux": flux,
    "flux-schnell": lambda: flux(guidance=False),
    "dit": dit,
    "sit": lambda: sit(inverted=True),
    "repa": lambda: sit(inverted=False),
}


def build(name: str, folder: Path, **options: Any) -> Path:
    """The pipeline ``name``, with such ``options``, in ``folder``; every weight is away from its initial zeros."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    pipeline = BUILD[name](**options)
    with torch.no_grad():
        for part in ("unet", "transformer"):
            for parameter in getattr(pipeline, part).parameters() if hasattr(pipeline, part) else ():
                parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder


__all__ = ["BUILD", "build"]
