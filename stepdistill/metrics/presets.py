"""The protocols of published tables, to the step, and a table of them."""

from __future__ import annotations

import difflib
from dataclasses import replace

from ..errors import UserError
from .protocols import Protocol

_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_IMAGENET_TRAIN = 1_281_167
_OWN_GENERATORS = "The source seeds CUDA generators; CPU ones give other images of the same law."

_EDM_CIFAR10 = Protocol(
    name="edm-cifar10",
    summary="CIFAR-10 32x32 as EDM reports it",
    metrics=("fid",),
    extractor="inception",
    file_form="png",
    reference=f"{_NVIDIA}/edm/fid-refs/cifar10-32x32.npz (the training images)",
    reference_count=50_000,
    repeats=3,
    repeats_reported="min",
    source="arXiv:2206.00364; github.com/NVlabs/edm fid.py, generate.py, README",
    notes=(_OWN_GENERATORS,),
)
_EDM_IMAGENET64 = replace(
    _EDM_CIFAR10,
    name="edm-imagenet64",
    summary="ImageNet 64x64 as EDM reports it",
    reference=f"{_NVIDIA}/edm/fid-refs/imagenet-64x64.npz (the training images, center-cropped)",
    reference_count=_IMAGENET_TRAIN,
    notes=(
        _OWN_GENERATORS,
        "ADM's own models were trained on other crops; their reference is imagenet-64x64-baseline.npz.",
    ),
)
_EDM2_IMG64 = replace(
    _EDM_IMAGENET64,
    name="edm2-img64",
    summary="ImageNet 64x64 as EDM2 reports it: FID and FD-DINOv2",
    metrics=("fid", "fd-dinov2"),
    file_form="memory",
    reference=f"{_NVIDIA}/edm2/dataset-refs/img64.pkl (the training images)",
    source="arXiv:2312.02696; github.com/NVlabs/edm2 calculate_metrics.py, generate_images.py, training/encoders.py",
    notes=(_OWN_GENERATORS, "How many repeats the paper's minimum is over is not known; three is its README's advice."),
)
_SID_CIFAR10 = replace(
    _EDM_CIFAR10,
    name="sid-cifar10",
    summary="CIFAR-10 32x32 as SiD's sid_metrics.py: ten trials, covariance over n",
    metrics=("fid", "is"),
    file_form="memory",
    ddof=0,
    repeats=10,
    repeats_reported="mean",
    source="arXiv:2404.04057; github.com/mingyuanzhou/SiD sid_metrics.py, metrics/",
    notes=(
        "SiD draws noise from the global generators, unseeded per sample, and the label of a random training image.",
        "SiD takes the reference's covariance over n too (2e-5 of its size here); the statistics say their own ddof.",
        "How the paper sums up its ten trials is not known from the code; the mean is taken here.",
        "SiD's other script, sid_generate.py, is EDM's protocol on seeds 0-49999: preset edm-cifar10, repeats=1.",
    ),
)
_COCO = Protocol(
    name="coco30k-gigagan",
    summary="zero-shot COCO-2014 at 256x256: 30k captions against all of val2014, clean FID, CLIP ViT-g-14",
    metrics=("fid", "clip"),
    extractor="inception-clean",
    prepare=("center-crop", "lanczos 256", "bicubic-float 299"),
    file_form="png",
    samples=30_000,
    labels="prompts",
    reference="folder val2014 of COCO 2014 (cocodataset.org), scaled like the samples; prompts: captions.txt of "
    "GigaGAN's COCO archive, or captions_coco14_test.pkl of huggingface.co/tianweiy/DMD2",
    reference_count=40_504,
    clip_prepare=("center-crop", "lanczos 256"),
    clip_template="A photo depicts {}",
    source="arXiv:2303.05511, arXiv:2406.01561; github.com/mingukkang/GigaGAN evaluation/, "
    "github.com/mingyuanzhou/SiD-LSG generate_onestep.py (rounded PNG, seed k for prompt k)",
    notes=(
        "GigaGAN's CLIP loader lowers 63 of the 256 levels by one on the way to the network; not repeated.",
        "GigaGAN's script leaves its default CLIP model, ViT-B/32; DMD2 and SiD-LSG take ViT-g-14, called G/14.",
        "DMD2 scores truncated images in memory instead (quantisation=truncate, file_form=memory), with noise seeded "
        "by the number of a batch of ten; truncation shifts images by half a level.",
        "How GigaGAN rounded its own images is not known.",
    ),
)
_CLEAN = Protocol(
    name="clean",
    summary="clean-fid against a reference of your own",
    metrics=("fid", "kid", "prdc"),
    extractor="inception-clean",
    prepare=("bicubic-float 299",),
    file_form="png",
    labels="stratified",
    reference="yours: a folder, an archive or statistics made with this preset",
    source="arXiv:2104.11222; github.com/GaParmar/clean-fid",
    notes=(
        "clean-fid's KID is a mean over 100 random subsets; here it is the full unbiased estimate.",
        "Samples, labels and seeds are this package's choice; clean-fid leaves them open.",
    ),
)

_ALL = (
    _EDM_CIFAR10,
    _EDM_IMAGENET64,
    replace(
        _EDM_CIFAR10,
        name="edm-ffhq64",
        summary="FFHQ 64x64 as EDM reports it",
        labels="none",
        reference=f"{_NVIDIA}/edm/fid-refs/ffhq-64x64.npz (all images)",
        reference_count=70_000,
    ),
    replace(
        _EDM_CIFAR10,
        name="edm-afhqv2",
        summary="AFHQv2 64x64 as EDM reports it",
        labels="none",
        reference=f"{_NVIDIA}/edm/fid-refs/afhqv2-64x64.npz",
        reference_count=None,
        notes=(_OWN_GENERATORS, "How many images the reference was made of is not known."),
    ),
    _EDM2_IMG64,
    replace(
        _EDM2_IMG64,
        name="edm2-img512",
        summary="ImageNet 512x512 as EDM2 reports it: FID and FD-DINOv2",
        quantisation="truncate",
        reference=f"{_NVIDIA}/edm2/dataset-refs/img512.pkl (the training images)",
        notes=(*_EDM2_IMG64.notes, "Its latent decoder truncates, uint8(255 clip(y, 0, 1)); its pixel models round."),
    ),
    _SID_CIFAR10,
    replace(
        _SID_CIFAR10,
        name="sid-imagenet64",
        summary="ImageNet 64x64 as SiD's sid_metrics.py: ten trials, covariance over n",
        metrics=("fid",),
        reference=_EDM_IMAGENET64.reference,
        reference_count=_IMAGENET_TRAIN,
        notes=(
            "SiD draws noise from the global generators, unseeded per sample, and the label of a random training "
            "image, so classes by their frequency (732 to 1,300 images); here every class is as likely.",
            "SiD's precision and recall (k = 3) are against another reference, ADM's VIRTUAL_imagenet64_labeled.npz.",
            *_SID_CIFAR10.notes[2:3],
            "SiD's other script, sid_generate.py, is EDM's protocol on seeds 0-49999: edm-imagenet64, repeats=1.",
        ),
    ),
    replace(
        _EDM_IMAGENET64,
        name="dmd2-imagenet64",
        summary="ImageNet 64x64 as DMD2 reports it: truncated pixels, equal classes",
        quantisation="truncate",
        file_form="memory",
        labels="balanced",
        repeats=1,
        repeats_reported="mean",
        source="arXiv:2405.14867; github.com/tianweiy/DMD2 main/edm/test_folder_edm.py",
        notes=(
            "DMD2 starts its sum of squares at one, not zero, on every process; not repeated. On 30,000 synthetic "
            "features of 512 dimensions, distance 0.185, that adds 0.002 on one process and 0.055 on eight.",
            "Its classes are k mod 1000 from zero on every process, so not quite equal on several; here they are.",
            "DMD2 seeds the global generator with 10 + rank, so its images depend on the number of processes.",
            "DMD2 reports the best of the checkpoints that it polls; this measures one.",
        ),
    ),
    _COCO,
    replace(
        _COCO,
        name="coco10k-dmd2-sdxl",
        summary="COCO 10k at 1024x1024 as DMD2 reports SDXL: clean FID of images reduced to 512, CLIP ViT-g-14",
        prepare=("center-crop", "lanczos 512", "bicubic-float 299"),
        quantisation="truncate",
        file_form="memory",
        samples=10_000,
        reference="folder subset of coco10k.zip, huggingface.co/tianweiy/DMD2 data/coco; prompts: its all_prompts.pkl",
        reference_count=None,
        source="arXiv:2405.14867; github.com/tianweiy/DMD2 main/sdxl/test_folder_sdxl.py, main/coco_eval/",
        notes=(
            "The patch FID of the same table is this protocol with prepare=('crop 299', 'bicubic-float 299').",
            "DMD2 seeds noise by the number of a batch of four, and reports the best of the checkpoints that it polls.",
            "How many images the reference folder holds is not known.",
        ),
    ),
    replace(
        _COCO,
        name="sidlsg-train",
        summary="COCO-2014 FID that SiD-LSG follows in training; its reported figures are coco30k-gigagan",
        metrics=("fid",),
        extractor="inception",
        prepare=("center-crop", "lanczos 256"),
        file_form="memory",
        ddof=0,
        reference="COCO val2014, one image per caption, center-cropped and reduced to 256 by cocodataset_tool.py; "
        "prompts: its captions",
        reference_count=None,
        source="arXiv:2406.01561; github.com/mingyuanzhou/SiD-LSG metrics/, cocodataset_tool.py",
        notes=(
            "An image of several captions, mostly five, is in the reference that many times.",
            "SiD-LSG draws captions by a sampler of seed 0 and noise from the global generator.",
            "Its CLIP figure in training has no template and a bicubic resize without antialiasing; not measured here.",
        ),
    ),
    Protocol(
        name="mjhq30k-sana",
        summary="MJHQ-30K at 512x512 as Sana and SANA-Sprint report it: pytorch-fid, CLIP ViT-L/14 times 100",
        metrics=("fid", "clip"),
        extractor="inception-pytorch",
        prepare=("short-bilinear 512", "crop 512"),
        file_form="jpeg 75",
        samples=30_000,
        labels="prompts",
        reference="huggingface.co/datasets/playgroundai/MJHQ-30K, mjhq30k_imgs.zip; prompts: meta_data.json in order",
        reference_count=30_000,
        clip_model="clip-vit-l-14",
        clip_scale=100.0,
        source="arXiv:2410.10629, arXiv:2503.09641; github.com/NVlabs/Sana tools/metrics/",
        notes=(
            "Sana scores JPEG files; their quality and how pixels were rounded are not known: 75 is Pillow's default.",
            "Sana runs CLIP in float16 on CUDA; here it is float32.",
            "Playground's own MJHQ figures come from a library that is not known.",
        ),
    ),
    Protocol(
        name="cmmd",
        summary="CMMD on COCO 2014: CLIP embeddings, MMD with a Gaussian kernel of width 10, times 1000",
        metrics=("cmmd",),
        extractor="clip-vit-l-14-336",
        prepare=("center-crop", "bicubic 336"),
        file_form="png",
        samples=30_000,
        labels="prompts",
        reference="30,000 images of COCO val2014, those of the prompts",
        reference_count=30_000,
        source="arXiv:2401.09603; github.com/google-research/google-research cmmd/",
        notes=(
            "The source drops the images after the last full batch of 32; not repeated.",
            "How the paper's samples were rounded is not known.",
        ),
    ),
    Protocol(
        name="adm-256",
        summary="ImageNet 256x256 as ADM's evaluator: FID, inception score in parts of 5,000, precision and recall",
        metrics=("fid", "is", "prdc"),
        extractor="inception",
        quantisation="truncate",
        reference=f"{_OPENAI}/imagenet/256/VIRTUAL_imagenet256_labeled.npz (mu, sigma of the training images; "
        "10,000 images for precision and recall)",
        neighbours=3,
        source="arXiv:2105.05233; github.com/openai/guided-diffusion evaluations/evaluator.py, scripts/image_sample.py",
        notes=(
            "ADM also reports sFID (mu_s, sigma_s in the reference, spatial features); not measured here.",
            "ADM runs the TensorFlow graph and takes distances for precision and recall in float16 where finite.",
            "How many images mu and sigma are over is not known; the README says the whole dataset.",
        ),
    ),
    _CLEAN,
    Protocol(
        name="digits",
        summary="8x8 digits with the bundled network; needs no download",
        metrics=("fid",),
        extractor="digits",
        samples=5_000,
        labels="balanced",
        reference="builtin:digits",
        reference_count=1_797,
        source="this package: fd-digits-v1",
    ),
)

PRESETS = {preset.name: preset for preset in _ALL}


def protocol(name: str) -> Protocol:
    """The preset called ``name``.

    Raises:
        UserError: there is none; the message names the nearest and all.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"there is no protocol {name!r}; {hint}There are {', '.join(PRESETS)}")


def table() -> str:
    """All presets, one a line, with their digests."""
    rows = [("preset", "digest", "samples", "metrics", "what it is")]
    rows += [(p.name, p.digest(), f"{p.samples:,}", ",".join(p.metrics), p.summary) for p in PRESETS.values()]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
