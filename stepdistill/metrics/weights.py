"""Finding the weights of the networks behind the metrics, and trusting none whose checksum is not known."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, first_line

VARIABLE = "STEPDISTILL_WEIGHTS"
"""Environment variable with a folder of weights, or one file."""


@dataclass(frozen=True)
class KnownFile:
    """A published file of weights; nothing else is run without being told to."""

    name: str
    url: str
    sha256: str
    size: int
    """Bytes."""
    licence: str
    used_by: str
    aliases: tuple[str, ...] = ()
    """Names under which others publish or cache the same bytes."""
    hub: tuple[str, str] | None = None
    """Repository and file on the Hugging Face hub."""


_OPENAI = "https://openaipublic.azureedge.net/clip/models"

# Where the checksums are from: the URL itself (OpenAI), the file's name and evaluation code that pins it (pytorch-fid),
# k-diffusion (NVIDIA), public manifests that pin revision, size and checksum together (DINOv2, ViT-g).
KNOWN = {
    "inception": KnownFile(
        name="inception-2015-12-05.pt",
        url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        size=95_607_719,
        licence="Apache-2.0 (Google's weights; TorchScript by NVIDIA)",
        used_by="EDM, EDM2, SiD, DMD2, FastGen, GigaGAN, clean-fid",
    ),
    "inception-pytorch": KnownFile(
        name="pt_inception-2015-12-05-6726825d.pth",
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        licence="Apache-2.0",
        used_by="pytorch-fid, Sana, torchmetrics, torch-fidelity",
        aliases=("weights-inception-2015-12-05-6726825d.pth",),
    ),
    "dinov2-vit-l-14": KnownFile(
        name="dinov2_vitl14_pretrain.pth",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        size=1_217_586_395,
        licence="Apache-2.0",
        used_by="EDM2, dgm-eval; converted, facebook/dinov2-large",
    ),
    "clip-vit-b-32": KnownFile(
        name="ViT-B-32.pt",
        url=f"{_OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        size=353_976_522,
        licence="MIT",
        used_by="CLIP-FID of clean-fid",
    ),
    "clip-vit-l-14": KnownFile(
        name="ViT-L-14.pt",
        url=f"{_OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        size=932_768_134,
        licence="MIT",
        used_by="CLIP score of Sana",
    ),
    "clip-vit-l-14-336": KnownFile(
        name="ViT-L-14-336px.pt",
        url=f"{_OPENAI}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
        sha256="3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        size=934_088_680,
        licence="MIT",
        used_by="CMMD",
    ),
    "clip-vit-g-14": KnownFile(
        name="ViT-g-14-laion2b_s12b_b42k.bin",
        url="https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/"
        "4b0305adc6802b2632e11cbe6606a9bdd43d35c9/open_clip_pytorch_model.bin",
        sha256="6aac683f899159946bc4ca15228bb7016f3cbb1a2c51f365cba0b23923f344da",
        size=5_467_006_745,
        licence="MIT",
        used_by="CLIP score of GigaGAN, DMD2, SiD-LSG",
        hub=("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin"),
    ),
}


@dataclass(frozen=True)
class Weights:
    """A file of weights that is the known one, or that the caller trusts."""

    path: Path
    sha256: str

    def is_program(self) -> bool:
        """Whether the file is a TorchScript, as OpenAI's and NVIDIA's are: code, not only numbers."""
        try:
            with ZipFile(self.path) as archive:
                return any(name.endswith("/constants.pkl") for name in archive.namelist())
        except BadZipFile:
            return False

    def program(self, device: torch.device | str) -> torch.jit.ScriptModule:
        """The TorchScript in the file; what is run is the bytes that were checked, even if the file changes meanwhile.

        Raises:
            UserError: the file is no longer the one that was checked.
        """
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{self.path} changed while it was loaded; keep weights where nobody else can write")
        with warnings.catch_warnings():  # That TorchScript is deprecated is no news to whoever scores images.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(io.BytesIO(content), map_location=device).eval()

    def state(self) -> dict[str, Tensor]:
        """The state dict in a ``.safetensors`` file, a TorchScript, or a file saved by torch; on the CPU.

        Raises:
            UserError: none of these.
        """
        try:
            if self.path.suffix == ".safetensors":
                return load_file(self.path)
            if self.is_program():
                return dict(self.program("cpu").state_dict())
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            return state.get("state_dict", state)
        except UserError:
            raise
        except Exception as error:  # Unpicklers raise nearly anything on foreign files.
            raise UserError(f"cannot read weights from {self.path}: {first_line(error)}") from None


def find_weights(name: str, *, path: str | Path | None = None, trust: bool = False, download: bool = False) -> Weights:
    """The weights called ``name`` in ``KNOWN``, checked before anything reads them.

    Args:
        name: key of ``KNOWN``.
        path: the file, or a folder that holds it; by default, and where the file is that of another network,
            ``$STEPDISTILL_WEIGHTS``, then the usual caches.
        trust: take a file whose checksum is not the known one. TorchScript files are programs.
        download: fetch what is nowhere to be found, into the folder ``path`` if there is one; a download must have the
            known checksum.

    Raises:
        UserError: not there, not the known file, or the download failed.
    """
    known, another = KNOWN[name], _another(name, path)
    path = None if another else path
    found = locate(known, path)
    if found is None and not download:
        raise UserError(_missing(known, path) + another)
    found = found or fetch(known, path)
    got = sha256_of(found)
    if got != known.sha256 and not trust:
        raise UserError(
            f"{found} is not the published {known.name}: its sha256 is {got}, expected {known.sha256}; "
            "replace it, or pass --trust if you know where it comes from"
        )
    return Weights(found, got)


def _another(name: str, path: str | Path | None) -> str:
    """What to say of the file at ``path`` where it is the published one of another network than ``name``."""
    file = None if path is None else Path(path).expanduser()
    if file is None or not file.is_file():
        return ""
    got = sha256_of(file)
    other = next((each for each, known in KNOWN.items() if known.sha256 == got), name)
    return "" if other == name else f"; {file} is that of {other}, and --weights FOLDER may hold both"


def locate(known: KnownFile, path: str | Path | None = None) -> Path | None:
    """The first place that has the file; nothing is read of it, save in the folder for temporary files."""
    found = next((place for place in _places(known, path) if place.is_file()), None)
    if found or path:
        return found
    # Everybody can write there, so a file that is not the known one counts as absent, whatever the caller trusts.
    shared = Path(tempfile.gettempdir()) / known.name
    return shared if shared.is_file() and sha256_of(shared) == known.sha256 else None


def sha256_of(path: Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def fetch(known: KnownFile, path: str | Path | None = None) -> Path:
    """Download to the folder ``path``, ``$STEPDISTILL_WEIGHTS`` or the user's cache, whole and checked, or not at all.

    Raises:
        UserError: no connection, or not the known file.
    """
    folder = Path(path).expanduser() if path else _folder()
    part, target = folder / f".{known.name}.{os.getpid()}.part", folder / known.name
    print(f"downloading {known.url} ({known.size / 1e6:.0f} MB) to {folder}", file=sys.stderr)
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(known.url, timeout=60) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != known.sha256:
            raise UserError(
                f"the download of {known.url} is not the published file: {part.stat().st_size} bytes, expected "
                f"{known.size}; sha256 {digest.hexdigest()}, expected {known.sha256}; try again"
            )
        part.replace(target)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot download {known.url} to {folder}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _folder() -> Path:
    """Where downloads go."""
    told = os.environ.get(VARIABLE)
    if told and not Path(told).is_file():
        return Path(told).expanduser()
    return _cache() / "stepdistill"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _places(known: KnownFile, path: str | Path | None) -> Iterator[Path]:
    """Where the file may be, best first."""
    names = (known.name, *known.aliases)
    told = path or os.environ.get(VARIABLE)
    if told:
        told = Path(told).expanduser()
        # A file in the variable is for the one network of its name, a path in a call for the network that is asked.
        if path or told.name in names:
            yield told
        yield from (told / name for name in names)
    if path:
        return
    if known.hub and isinstance(copy := try_to_load_from_cache(*known.hub), str):
        yield Path(copy)
    home = Path.home() / ".cache"  # OpenAI's code and dnnlib look at no variable for it.
    dnnlib = Path(os.environ.get("DNNLIB_CACHE_DIR") or home / "dnnlib")
    folders = (
        _cache() / "stepdistill",
        Path(torch.hub.get_dir()) / "checkpoints",
        home / "clip",
        _cache() / "k-diffusion",
        dnnlib / "torch_hub" / "checkpoints",
    )
    yield from (folder / name for folder in folders for name in names)
    yield from sorted((dnnlib / "downloads").glob(f"*_{known.name}"))  # dnnlib puts a hash of the URL before the name.


def _missing(known: KnownFile, path: str | Path | None) -> str:
    searched = list(dict.fromkeys(str(place.parent) for place in _places(known, path)))
    if not path:
        searched.append(tempfile.gettempdir())
    return (
        f"the weights {known.name} ({known.size / 1e6:.0f} MB) are not in {', '.join(searched)}; download {known.url} "
        f"and pass it with --weights or put it into ${VARIABLE}, allow downloads with --download, or use "
        "--preset digits, which needs none"
    )
