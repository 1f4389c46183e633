"""What networks do to an image before they look at it, and what metrics reckon, in the words of protocols."""

from __future__ import annotations

COLOUR = "8-bit RGB as Pillow converts it; grey is repeated, alpha left out, colour profiles and orientation ignored"

_POOLED = "2048 features of the last pooling layer"
_TOKEN = "divided by 255, less ImageNet's mean, by its deviation; class token after the last norm"


def _clip(size: int, features: str) -> str:
    return (
        f"short side to {size} by Pillow's bicubic (bytes), centre {size}, divided by 255, less CLIP's mean, by its "
        f"deviation; {features}"
    )


NETWORKS = {
    "inception": f"resized inside to 299x299, bilinear as in TensorFlow 1, float, no blur; (x - 128) / 128; {_POOLED}",
    "inception-clean": f"takes 299x299; (x - 128) / 128; {_POOLED}",
    "inception-pytorch": f"bilinear to 299x299, half-pixel centres, float, no blur; 2 x / 255 - 1; {_POOLED}",
    "dinov2-vit-l-14": f"bicubic to 224x224 with blur, float, by torch; {_TOKEN}",
    "dinov2-vit-l-14-pillow": f"bicubic to 224x224 by Pillow (bytes); {_TOKEN}",
    "clip-vit-b-32": _clip(224, "embedding as it is; QuickGELU"),
    "clip-vit-l-14": _clip(224, "embedding; QuickGELU"),
    "clip-vit-l-14-336": _clip(336, "embedding of length one; QuickGELU"),
    "clip-vit-g-14": _clip(224, "embedding; GELU"),
    "digits": "grey by the mean of colours, 8x8 by area; 80 features of three layers, standardised on real digits",
}
"""By extractor; images come in [0, 255]."""

LAWS = {
    "fid": "|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features, float64",
    "fd-dinov2": "as fid, of DINOv2's features",
    "clip-fid": "as fid, of CLIP's features",
    "kid": "unbiased squared MMD of all pairs, kernel (x y / d + 1)^3",
    "kid-subsets": "mean of 100 unbiased squared MMDs of 1000 of either side, kernel (x y / d + 1)^3, seeded",
    "cmmd": "1000 times the biased squared MMD of directions, kernel exp(-|x - y|^2 / 200)",
    "prdc": "precision, recall, density, coverage of balls to the k-th neighbour",
    "is": "exp of the mean KL of class probabilities to their mean, no bias in the last layer; mean over the splits",
    "clip": "mean cosine of image and prompt, times the scale",
    "diversity": "mean over prompts of the mean 1 - cosine between two of its images' features",
    "vendi": "exp of the entropy of the eigenvalues of the features' cosine kernel",
}
"""By metric."""
