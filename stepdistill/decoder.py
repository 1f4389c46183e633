"""From samples to pictures and back: the pipeline's own VAE or the user's own function, where there is one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor

from .errors import UserError, first_line
from .teacher import Teacher

_BATCH = 16


class Decoder:
    """``(B, C, H, W)`` samples of ``teacher`` to pictures in about [-1, 1].

    The VAE is read when first needed and is on the samples' device only while it decodes.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._vae: Any = None

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Pictures; the samples themselves where nothing decodes them."""
        if self.teacher.decode is not None:
            return self.teacher.decode(samples)
        if not self.teacher.makes_latents:
            return samples
        vae = self._loaded().to(samples.device)
        spread, shift = self._law(vae, samples.device)
        latents = samples / vae.config["scaling_factor"] * spread + shift
        parts = latents.to(vae.dtype).split(_BATCH)
        pictures = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        vae.to("cpu")
        return pictures.float()

    @torch.no_grad()
    def encode(self, pictures: Tensor, device: torch.device) -> Tensor:
        """The means of the samples ``(B, C, H, W)`` that pictures in [-1, 1] are of; the pictures without a VAE."""
        if not self.teacher.makes_latents:
            return pictures.to(device)
        vae = self._loaded().to(device)
        parts = [vae.encode(part.to(device, vae.dtype)) for part in pictures.split(_BATCH)]
        latents = torch.cat([made.latent if "latent" in made else made.latent_dist.mode() for made in parts])
        vae.to("cpu")
        spread, shift = self._law(vae, device)
        return (latents.float() - shift) / spread * vae.config["scaling_factor"]

    def _law(self, vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """Spread and shift of latents, per channel where SDXL's pipeline reads them so (Playground v2.5)."""
        told = [vae.config.get(key) for key in ("latents_std", "latents_mean")]
        if self.teacher.index["_class_name"] != "StableDiffusionXLPipeline" or None in told:
            return 1.0, vae.config.get("shift_factor") or 0.0
        spread, shift = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in told)
        return spread, shift

    def _loaded(self) -> Any:  # noqa: ANN401
        if self._vae is None:
            dtype = getattr(torch, self.teacher.parts_dtype)
            try:
                vae = AutoModel.from_pretrained(str(self.teacher.folder), subfolder="vae", torch_dtype=dtype).eval()
            except (OSError, ValueError, RuntimeError) as error:
                reason = first_line(error)
                raise UserError(f"{self.teacher.source}: cannot read its VAE: {reason}") from None
            # SDXL's exceeds the range of float16, and its settings say so.
            overflows = dtype == torch.float16 and vae.config.get("force_upcast")
            self._vae = vae.float() if overflows else vae
        return self._vae
