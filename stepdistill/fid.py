"""The command ``stepdistill fid``: the Frechet distance between two sets of images."""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from typing import Any

_CALC = """Compare the images A with the reference images B. Either is a folder of images (read recursively),
an .npz with uint8 arr_0 (N, H, W[, C]), builtin:digits or builtin:digits_text."""
_EXAMPLE = "example:\n  stepdistill fid calc runs/digits_sid/samples builtin:digits --json"


def main(argv: list[str]) -> int:
    """Run ``stepdistill fid`` with the arguments after ``fid``; returns the exit code.

    Raises:
        UserError: an input that cannot be read or compared.
    """
    arguments = _parser().parse_args(argv)
    result = calc(arguments.images, arguments.reference)
    print(json.dumps(result) if arguments.json else _table(result))
    return 0


def calc(images: str, reference: str) -> dict[str, Any]:
    """Distance of ``images`` to ``reference``, both sources for ``load_images``, as a record ready for JSON.

    Raises:
        UserError: an input that cannot be read or compared.
    """
    began = time.perf_counter()
    from .evaluation import Evaluator  # Here, so that --help does not wait for torch.
    from .images import load_images

    evaluator = Evaluator(reference)
    distance = evaluator.distance(load_images(images))
    return {
        "metric": evaluator.extractor.name,
        "value": distance.value,
        "se": distance.se,
        "debiased": distance.debiased,
        "n": distance.n,
        "n_ref": evaluator.reference.moments.n,
        "images": images,
        "reference": reference,
        "seconds": round(time.perf_counter() - began, 3),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("stepdistill", "torch", "numpy", "pillow")},
        },
    }


def _table(result: dict[str, Any]) -> str:
    debiased = "n/a" if result["debiased"] is None else f"{result['debiased']:z.4f}"
    row = (result["metric"], f"{result['value']:z.4f} +- {result['se']:.4f}", debiased, result["n"], result["n_ref"])
    head = ("metric", "value +- se", "debiased", "n", "n_ref")
    return "\n".join(f"{a:<14}{b:<20}{c:<10}{d:>8}{e:>8}" for a, b, c, d, e in (head, row))


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="stepdistill fid",
        description="Frechet distances between sets of images, in float64, with their statistical error.",
        epilog=_EXAMPLE,
        formatter_class=style,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "calc",
        help="compare images with reference images",
        description=_CALC,
        epilog=_EXAMPLE,
        formatter_class=style,
    )
    command.add_argument("images", metavar="A", help="the images to judge")
    command.add_argument("reference", metavar="B", help="the images to compare with")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser
