"""What scoring costs, here and with clean-fid, how exact a Frechet distance is, and what memory the whole takes.

    python benchmarks/fid.py [--threads 2] [--workers 2] [--repeats 3] [--out benchmarks/results/fid.json]

Both sides of a pair are measured in turn, A B A B ..., in one run on the same threads; the ratio printed is the median
of the pairs' ratios, since machines are noisy and seconds mean little.  Features of a folder are those of one network
of random weights on both sides, small, as a large one would hide what surrounds it; archives are read without any.
The defaults are the sizes of the published claims; ``--repeats 1 --files 500 --archive 10000 --dimension 512`` is a
look in about a minute.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import scipy
import scipy.linalg
import torch
from cleanfid.utils import ResizeDataset
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stepdistill import scoring
from stepdistill.metrics.base import Extractor, Features
from stepdistill.metrics.collecting import Network, collect, reader
from stepdistill.metrics.frechet import FeatureSums, Moments, Reference
from stepdistill.metrics.resampling import prepare
from stepdistill.metrics.sources import batches, open_source

CLEAN = ["bicubic-float 299"]
BATCH = 64


def paired(ours: Callable[[], object], other: Callable[[], object], repeats: int) -> dict[str, object]:
    """Median and range of the pairwise ratios other / ours, and the median seconds of both."""
    pairs = [(_seconds(ours), _seconds(other)) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    return {
        "other / ours": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "ours_s": round(statistics.median(a for a, _ in pairs), 4),
        "other_s": round(statistics.median(b for _, b in pairs), 4),
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def commuting(dimension: int, rank: int) -> tuple[Moments, Moments, float]:
    """Two Gaussians with common eigenvectors, the second of ``rank``, and their exact distance."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q
    index = torch.arange(1, dimension + 1, dtype=torch.float64)
    one, two = 8 * index**-1.1, torch.where(index <= rank, 5 * index**-0.7, 0)
    zero = torch.zeros(dimension, dtype=torch.float64)
    pair = [Moments(10**6, zero, (basis * values) @ basis.T) for values in (one, two)]
    return pair[0], pair[1], (one.sqrt() - two.sqrt()).square().sum().item()


def by_sqrtm(a: Moments, b: Moments) -> float:
    """As clean-fid, pytorch-fid and EDM."""
    root = np.real(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    return ((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * root.trace()).item()


def by_eigvals(a: Moments, b: Moments) -> float:
    """As torch-fidelity and torchmetrics."""
    values = np.linalg.eigvals(a.covariance.numpy() @ b.covariance.numpy())
    root = np.real(np.sqrt(values.astype(np.complex128))).sum()
    return ((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * root).item()


def frechet(dimension: int, repeats: int) -> dict[str, object]:
    """Time and error of the distance; the reference is factored once, as for every evaluation after the first."""
    results = {}
    for rank in (dimension, dimension // 2):
        a, b, exact = commuting(dimension, rank)
        reference = Reference(a)
        results[f"rank {rank}"] = {
            "exact": exact,
            "factoring_s": round(_seconds(lambda a=a: Reference(a)), 4),
            "relative error of ours": reference.distance(b) / exact - 1,
            **{
                name: {
                    "relative error": other(a, b) / exact - 1,
                    **paired(lambda r=reference, b=b: r.distance(b), lambda f=other, a=a, b=b: f(a, b), repeats),
                }
                for name, other in (("scipy.linalg.sqrtm", by_sqrtm), ("numpy.linalg.eigvals", by_eigvals))
            },
        }
    return results


def pictures(count: int, size: int) -> Iterator[np.ndarray]:
    """Colour images with the compressibility of photographs: blurred noise with a little noise on it."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (max(size // 16, 2),) * 2 + (3,), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
        yield (smooth + rng.integers(-3, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def clean_fid(folder: Path, workers: int) -> DataLoader:
    """The loader that ``cleanfid.fid.get_files_features`` builds."""
    files = sorted(str(file) for file in folder.glob("*.png"))
    return DataLoader(ResizeDataset(files, mode="clean"), batch_size=BATCH, num_workers=workers)


def exhaust(batches: DataLoader) -> None:
    """Take every batch and keep none."""
    for _ in batches:
        pass


def fit_of(path: Path, workers: int, see: Callable[[Tensor], Tensor], dimension: int) -> Moments:
    """Mean and covariance of the features of images, with ten groups for their error, as ``stepdistill fid calc``."""
    source = open_source(path)
    stream = reader(source, batch_size=BATCH, workers=workers, skip_broken=None)
    told = Network("small", dimension, tuple(CLEAN), lambda images, ids: Features(see(images)), "random")
    return collect(stream, len(source), {"fid": told}, device=torch.device("cpu"))["fid"].sums.moments()


def nothing(images: Tensor) -> Tensor:
    """A network that costs nothing."""
    return torch.zeros(len(images), 1)


def fit_of_clean_fid(folder: Path, workers: int, see: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The same as clean-fid's ``make_custom_stats``: all features first."""
    features = np.concatenate([see(batch).numpy() for batch in clean_fid(folder, workers)])
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def small_network() -> Callable[[Tensor], Tensor]:
    """2,048 features of 299x299 images in [0, 255] by random weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 7, stride=7), nn.ReLU(), nn.Conv2d(16, 2048, 3, stride=3), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    return lambda images: network((images - 128) / 128)


def difference(path: Path, folder: Path) -> float:
    """Largest difference of the first batch, in grey levels."""
    [first] = batches(open_source(path), range(BATCH), batch_size=BATCH, rgb=True)
    return (prepare(torch.stack(first.images), CLEAN) - next(iter(clean_fid(folder, 0)))).abs().max().item()


def files(count: int, size: int, workers: int, repeats: int) -> dict[str, object]:
    """Mean and covariance of a folder of PNGs: decoded, resized, and seen by one network."""
    network = small_network()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k, pixels in enumerate(pictures(count, size)):
            Image.fromarray(pixels).save(folder / f"{k:06d}.png")
        result = paired(
            lambda: fit_of(folder, workers, network, 2048), lambda: fit_of_clean_fid(folder, workers, network), repeats
        )
        return {"images": count, "largest difference": difference(folder, folder), **result}


def archive(count: int, size: int, workers: int, repeats: int) -> dict[str, object]:
    """An ``.npz`` of small images, read as it is; clean-fid has them written out as files first."""
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name, "images.npz"), Path(name, "files")
        folder.mkdir()
        np.savez(path, np.stack(list(pictures(count, size))))

        def written_out() -> None:
            with np.load(path) as content:
                for k, pixels in enumerate(content["arr_0"]):
                    Image.fromarray(pixels).save(folder / f"{k:06d}.png")
            exhaust(clean_fid(folder, workers))

        result = paired(lambda: fit_of(path, workers, nothing, 1), written_out, repeats)
        return {"images": count, "largest difference": difference(path, folder), **result}


def memory(count: int, dimension: int, threads: int) -> dict[str, object]:
    """Peak memory beyond the start while features turn into moments, each way in a process of its own."""
    found = {}
    for name, run in (("ours_MiB", streamed), ("features kept_MiB", kept)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[name] = pool.submit(_peak, run, count, dimension, threads).result()
    return {"features": count, "dimension": dimension, **found}


def streamed(count: int, dimension: int) -> None:
    """Sums of ten jackknife groups."""
    sums = FeatureSums(dimension)
    for start in range(0, count, BATCH):
        sums.add(torch.randn(min(BATCH, count - start), dimension), range(start, min(start + BATCH, count)))
    sums.moments()


def kept(count: int, dimension: int) -> None:
    """All features first, then numpy, as clean-fid and pytorch-fid."""
    parts = [torch.randn(min(BATCH, count - start), dimension).numpy() for start in range(0, count, BATCH)]
    features = np.concatenate(parts)
    np.mean(features, axis=0)
    np.cov(features, rowvar=False)


def scored(count: int, dimension: int) -> None:
    """``stepdistill fid calc`` of the metrics of ``clean`` and the Vendi score, by a network of no size."""

    class Projection(Extractor):
        """Random features of 8x8 images."""

        name, weights = "digits", "none"
        matrix = torch.randn(64, dimension, generator=torch.Generator().manual_seed(0))

        def __call__(self, images: Tensor) -> Features:
            return Features((images[:, 0].flatten(1).float() / 255 @ self.matrix).relu())

    Projection.dimension = dimension
    scoring.load_extractor = lambda *_, **__: Projection()
    with tempfile.TemporaryDirectory() as name:
        for number, part in enumerate(("images.npz", "others.npz")):
            np.savez(Path(name, part), np.random.default_rng(number).integers(0, 256, (count, 8, 8), np.uint8))
        told = scoring.Options(preset="digits", metrics=("fid", "kid", "prdc", "vendi"), workers=0)
        scoring.calc(f"{name}/images.npz", f"{name}/others.npz", told)


def command(counts: list[int], dimension: int, threads: int) -> dict[str, object]:
    """Peak memory and seconds of a whole command, by the number of images on either side."""
    found = {}
    for count in counts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            began = time.perf_counter()
            peak = pool.submit(_peak, scored, count, dimension, threads).result()
        found[f"{count} images"] = {"MiB": peak, "s": round(time.perf_counter() - began, 1)}
    return {"dimension": dimension, **found}


def _peak(run: Callable[[int, int], None], count: int, dimension: int, threads: int) -> float:
    torch.set_num_threads(threads)
    run(2 * BATCH, 8)  # The libraries' own buffers belong to the start.
    before = _status("VmRSS")
    run(count, dimension)
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """A line of Linux's account of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of linear algebra")
    parser.add_argument("--workers", type=int, default=2, help="that read images: threads here, processes in clean-fid")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--file-size", type=int, default=256)
    parser.add_argument("--archive", type=int, default=50_000)
    parser.add_argument("--archive-size", type=int, default=32)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--calc", type=int, nargs="+", default=[5_000, 20_000], help="images of a whole command")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fid.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workers, repeats = options.workers, options.repeats
    with threadpool_limits(options.threads):
        results = {
            "machine": f"{platform.machine()} CPU, {options.threads} threads, {workers} workers, torch "
            f"{torch.__version__}, scipy {scipy.__version__}, Pillow {PIL.__version__}",
            f"distance, d = {options.dimension}": frechet(options.dimension, repeats),
            f"PNG {options.file_size}": files(options.files, options.file_size, workers, repeats),
            f"npz {options.archive_size}": archive(options.archive, options.archive_size, workers, repeats),
            "memory of a Frechet distance": memory(options.features, options.dimension, options.threads),
            "memory of fid calc": command(options.calc, options.dimension, options.threads),
        }
    print(json.dumps(results, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
