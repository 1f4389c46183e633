"""CLIP through open_clip: features of images for CLIP-FID and CMMD, and the score of images against their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import UserError, first_line
from .base import Features
from .network import FrozenNetwork
from .precision import full_precision
from .resampling import crop, resize
from .weights import Weights

ARCHITECTURES = {
    "clip-vit-b-32": "ViT-B-32-quickgelu",
    "clip-vit-l-14": "ViT-L-14-quickgelu",
    "clip-vit-l-14-336": "ViT-L-14-336-quickgelu",
    "clip-vit-g-14": "ViT-g-14",
}
"""open_clip's names of the architectures of known weights; OpenAI trained with QuickGELU, LAION with GELU."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Texts(NamedTuple):
    """What the text tower says."""

    features: Tensor
    """``(B, d)``, of length 1."""
    truncated: int
    """Texts of more tokens than the tower reads, of which it saw the beginning."""


class Scores(NamedTuple):
    """CLIP scores of a batch."""

    scores: Tensor
    """``(B,)``, float32."""
    truncated: int
    """Prompts that did not fit."""


@dataclass(frozen=True)
class Towers:
    """The two networks of a CLIP, in float32."""

    model: Any
    tokenizer: Any
    size: int
    """Side of the images that the image tower reads."""
    weights: str
    """sha256."""

    def images(self, images: Tensor) -> Tensor:
        """Features ``(B, d)`` of ``(B, 3, H, W)`` images in [0, 255], not normalised.

        Images of another size are resized as open_clip and OpenAI do: the short side to ``size`` by Pillow's bicubic
        filter on bytes, then the centre.
        """
        images = centred(images, self.size).float() / 255
        mean, std = images.new_tensor(_MEAN).view(3, 1, 1), images.new_tensor(_STD).view(3, 1, 1)
        with torch.no_grad(), full_precision(images.device):
            return self.model.encode_image((images - mean) / std)

    def texts(self, texts: Sequence[str]) -> Texts:
        """Features of texts, of length 1; what is beyond the tower's context (77 tokens) is cut off and counted."""
        length = self.tokenizer.context_length
        truncated = sum(len(self.tokenizer.encode(text)) + 2 > length for text in texts)  # Two mark start and end.
        tokens = self.tokenizer(list(texts)).to(self.model.logit_scale.device)
        with torch.no_grad(), full_precision(tokens.device):
            return Texts(self.model.encode_text(tokens, normalize=True), truncated)


def load_towers(architecture: str, weights: Weights, *, device: torch.device | str = "cpu") -> Towers:
    """Build open_clip's ``architecture`` and load ``weights`` into it.

    Args:
        architecture: one of ``open_clip.list_models()`` of the plain CLIP kind.
        weights: OpenAI's TorchScript, a ``.safetensors`` file, or a state dict saved by torch.
        device: where the towers live.

    Raises:
        UserError: weights that do not fit, or that were trained with another activation: the shapes would fit, and
            every feature would be wrong.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("CLIP metrics need open_clip: pip install open-clip-torch") from None
    config = open_clip.get_model_config(architecture)
    if config is None or not _is_plain(config):
        raise UserError(f"{architecture} is not a plain CLIP of open_clip.list_models(), such as ViT-B-32-quickgelu")
    state = {name.removeprefix("module."): tensor for name, tensor in weights.state().items()}
    for number in ("input_resolution", "context_length", "vocab_size"):  # OpenAI keeps them beside the weights.
        state.pop(number, None)
    with torch.device("meta"):  # A billion random numbers would only be overwritten.
        model = open_clip.CLIP(**config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{weights.path} does not fit {architecture}: {first_line(error)}") from None
    if weights.is_program() and not config.get("quick_gelu", False):
        raise UserError(
            f"{weights.path} are weights of OpenAI, trained with QuickGELU, and {architecture} computes GELU; use "
            f"{architecture}-quickgelu"
        )
    model.attn_mask = torch.full((model.context_length,) * 2, -torch.inf).triu(1)  # In no state dict.
    model = model.float().eval().requires_grad_(False).to(device)
    return Towers(model, open_clip.get_tokenizer(architecture), config["vision_cfg"]["image_size"], weights.sha256)


class ClipFeatures(FrozenNetwork):
    """Features of the image tower of one known CLIP."""

    normalised: ClassVar[bool]
    """Whether features have length 1."""

    def __init__(self, weights: Weights, *, device: torch.device | str = "cpu") -> None:
        self._towers = load_towers(ARCHITECTURES[self.name], weights, device=device)
        self.weights = weights.sha256
        self.dimension = self._towers.model.visual.output_dim

    def _features(self, images: Tensor) -> Features:
        features = self._towers.images(images)
        return Features(F.normalize(features, dim=-1) if self.normalised else features)


class ClipVitB32(ClipFeatures):
    """What clean-fid's ``clip_vit_b_32`` compares, in float32; OpenAI's code takes float16 on GPUs."""

    name = "clip-vit-b-32"
    normalised = False


class ClipVitL14At336(ClipFeatures):
    """What CMMD compares."""

    name = "clip-vit-l-14-336"
    normalised = True


class ClipScorer:
    """Cosine between an image and its prompt.

    Args:
        towers: the CLIP, see ``load_towers``.
        template: text around the prompt, ``{}``: GigaGAN and DMD2 take "A photo depicts {}", Sana the bare prompt.
        scale: factor of the cosine, 1 (GigaGAN) or 100 (Sana, the usual table).
        clamp: count negative cosines as zero (torchmetrics; not GigaGAN, not Sana).

    Raises:
        UserError: a template with no place, or several, for the prompt.
    """

    def __init__(self, towers: Towers, *, template: str = "{}", scale: float = 1.0, clamp: bool = False) -> None:
        if template.count("{}") != 1:
            raise UserError(f"a prompt template has one {{}} where the prompt goes, got {template!r}")
        self.towers, self.template, self.scale, self.clamp = towers, template, scale, clamp

    def __call__(self, images: Tensor, prompts: Sequence[str], *, rows: Sequence[int] | None = None) -> Scores:
        """Scores of ``(B, 3, H, W)`` images in [0, 255] against their prompts, of these ``rows`` of all.

        Raises:
            UserError: an empty prompt.
        """
        if len(prompts) != len(images):
            raise ValueError(f"every image needs its prompt, got {len(images)} images and {len(prompts)} prompts")
        numbers = range(len(prompts)) if rows is None else rows
        empty = next((row for row, prompt in zip(numbers, prompts, strict=True) if not prompt.strip()), None)
        if empty is not None:
            raise UserError(f"prompt {empty} is empty; the score of an image against nothing means nothing")
        texts = self.towers.texts([self.template.replace("{}", prompt) for prompt in prompts])
        cosines = (F.normalize(self.towers.images(images), dim=-1) * texts.features).sum(-1)
        return Scores(self.scale * (cosines.clamp_min(0) if self.clamp else cosines), texts.truncated)


def centred(images: Tensor, size: int) -> Tensor:
    """The centre ``(B, 3, size, size)`` after the short side was resized to ``size``."""
    height, width = images.shape[2:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)  # torchvision rounds the long side down.
    return crop(resize(images, "bicubic", height, width), size)


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether both towers are open_clip's own, which are all that has no further files and no other interface."""
    parts = [*config["vision_cfg"], *config["text_cfg"]]
    own = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
    return set(config) <= own and not any(name.startswith(("hf_", "timm_")) for name in parts)
