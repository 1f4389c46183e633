"""The command ``stepdistill fid``: FID, CLIP score and the rest, by the protocols of published tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import count, positive, taken

if TYPE_CHECKING:
    from .scoring import Options

_SOURCES = """images: a folder (read recursively), .zip, .npz with arr_0, .npy shards, builtin:digits
reference: images, or statistics as .npz, .pkl or .pt of this command, EDM, EDM2, pytorch-fid, clean-fid, ADM, SiD"""
_EXAMPLE = """examples:
  stepdistill fid calc runs/images builtin:digits --json
  stepdistill fid gen runs/digits_sid/student builtin:digits --num 5000
  stepdistill fid presets"""
Run = Callable[[argparse.Namespace], int]
_STYLE = argparse.RawDescriptionHelpFormatter


def main(argv: list[str]) -> int:
    """Run ``stepdistill fid`` with the arguments after ``fid``; returns the exit code.

    Raises:
        UserError: an input that cannot be read or compared.
    """
    told = _parser().parse_args(argv)
    return told.run(told)


def _calc(told: argparse.Namespace) -> int:
    from .scoring import calc

    return _show(calc(told.images, told.reference, _options(told)), told)


def _gen(told: argparse.Namespace) -> int:
    from .by_steps import by_steps
    from .generating import gen
    from .sample import Sampling

    steps, asked = told.steps or [None], taken(Sampling, argparse.Namespace(**{**vars(told), "steps": None}))
    how = {"repeats": told.repeats, "save_images": told.save_images}
    if len(steps) > 1 or told.plot is not None:
        return _show(by_steps(asked, steps, told.reference, _options(told), plot=told.plot, **how), told)
    return _show(gen(replace(asked, steps=steps[0]), told.reference, _options(told), **how), told)


def _ref(told: argparse.Namespace) -> int:
    from .reference import ref
    from .results import skipped

    record = ref(told.images, told.out, _options(told))
    lines = [record["out"], *skipped(record["skipped"])]
    if left := record["left_out"]:
        lines.append(f"{', '.join(left)}: left out, as a file has features of one network; write another by --metrics")
    return _say(record, "\n".join(lines), told)


def _compare(told: argparse.Namespace) -> int:
    from .comparing import compare

    return _show(compare(told.a, told.b, _options(told), plot=told.plot), told)


def _convert(told: argparse.Namespace) -> int:
    from .metrics.statistics import convert

    written, left = convert(told.source, told.target, kind=told.kind, form=told.form)
    kinds = {kind: found.brief() for kind, found in written.items()}
    lines = [
        f"{told.target}: {kind}, {each['dimension']} features of {each['n'] or 'an unknown number of'} images"
        for kind, each in kinds.items()
    ]
    if left:
        lines.append(f"left out, as the form has no place for it: {', '.join(left)}")
    return _say({"out": told.target, "kinds": kinds, "left_out": left}, "\n".join(lines), told)


def _presets(told: argparse.Namespace) -> int:
    from .metrics.presets import PRESETS, protocol, table

    if told.name:
        found = protocol(told.name)
        return _say(found.described(), found.text(), told)
    return _say({"presets": [each.described() for each in PRESETS.values()]}, table(), told)


def _doctor(told: argparse.Namespace) -> int:
    from .metrics.doctor import report

    rows = report()
    wrong = any(row.state == "wrong" for row in rows)
    lines = [f"{row.state:<8} {row.kind:<8} {row.name}: {row.detail}" for row in rows]
    _say({"ok": not wrong, "rows": [asdict(row) for row in rows]}, "\n".join(lines), told)
    return int(wrong)


def _show(record: dict[str, Any], told: argparse.Namespace) -> int:
    from .results import table_of

    runs = record.get("runs", [record])
    return _say(record, "\n\n".join(map(table_of, runs)), told)


def _say(record: dict[str, Any], text: str, told: argparse.Namespace) -> int:
    from .metrics.ranks import rank_and_world

    if rank_and_world()[0] == 0:
        print(json.dumps(record) if told.json else text)
    return 0


def _options(told: argparse.Namespace) -> Options:
    from .scoring import Options

    return taken(Options, told)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepdistill fid",
        description="FID, CLIP score and the rest with their errors, by the protocols of published tables.",
        epilog=_EXAMPLE,
        formatter_class=_STYLE,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.\n\n{_SOURCES}",
            epilog=f"example:\n  stepdistill fid {example}", formatter_class=_STYLE,
        )  # fmt: skip
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
        return made

    calc = command("calc", _calc, "score images against a reference", "calc runs/images builtin:digits --json")
    calc.add_argument("images", metavar="IMAGES", help="the images to judge")
    calc.add_argument(
        "reference", nargs="?", metavar="REFERENCE", help="what to compare them with, where a metric does"
    )
    gen = command(
        "gen", _gen, "generate with a pipeline and score in memory", "gen STUDENT refs.npz --preset edm-cifar10"
    )
    gen.add_argument("source", metavar="PIPELINE", help="an exported student, or a teacher's folder or hub id")
    gen.add_argument("reference", nargs="?", metavar="REFERENCE", help="what to compare them with, where a metric does")
    gen.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        metavar="N",
        help="network calls (50 of a teacher); several are scored each",
    )
    gen.add_argument("--plot", type=Path, metavar="PNG", help="draw the first metric against the network calls")
    gen.add_argument("--labels", type=int, nargs="+", help="class labels to take in turn; all by default")
    gen.add_argument("--guidance-scale", type=float, default=1.0, help="of a teacher")
    gen.add_argument("--repeats", type=positive, help="sets of images, in place of the protocol's")
    gen.add_argument("--save-images", type=Path, metavar="DIR", help="also keep the images, as PNG")
    gen.add_argument("--trust-remote-code", action="store_true", help="run the code that a student comes with or names")
    ref = command("ref", _ref, "write what images are compared with", "ref IMAGES --preset clean --out stats.npz")
    ref.add_argument("images", metavar="IMAGES", help="the reference images")
    ref.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".npz; `convert` rewrites it for other tools"
    )
    compare = command("compare", _compare, "difference of two runs on common seeds", "compare features_a features_b")
    compare.add_argument("a", type=Path, metavar="A", help="--features folder of one run")
    compare.add_argument("b", type=Path, metavar="B", help="of the other")
    compare.add_argument("--plot", type=Path, metavar="PNG", help="draw the samples on which they agree best and worst")
    for made in (calc, gen, ref, compare):
        _shared(made)
    convert = command("convert", _convert, "rewrite statistics in another form", "convert img64.pkl img64.npz")
    convert.add_argument("source", metavar="IN")
    convert.add_argument("target", metavar="OUT", help=".npz (EDM, pytorch-fid, clean-fid), .pkl (EDM2) or .pt")
    convert.add_argument("--form", help="npz, adm, edm2, sid or torch-fidelity; by the suffix of OUT otherwise")
    convert.add_argument("--kind", help="fid, fd-dinov2 or sfid, of files that hold several; all by default")
    presets = command("presets", _presets, "list the protocols, or spell one out", "presets coco30k-gigagan")
    presets.add_argument("name", nargs="?", metavar="NAME")
    command("doctor", _doctor, "say which weights are found, and test the arithmetic", "doctor")
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", metavar="NAME", help="protocol; digits against builtin:digits, clean otherwise, by default")
    add(
        "--metrics",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="in place of the protocol's: fid,kid,fd-dinov2,clip-fid,cmmd,prdc,is,clip,...",
    )
    add("--count", "--num", type=positive, metavar="N", help="the first N images (torchrun takes --num for its own)")
    add("--prompts", metavar="FILE", help="one prompt an image, a line each; files are in natural order, 2 before 10")
    add("--weights", metavar="FOLDER", help="where the networks' weights are, and downloads go; or the file of one")
    add("--trust", action="store_true", help="take weights with another checksum than the published")
    add("--download", action="store_true", help="fetch weights that are not here")
    add("--batch-size", type=positive, default=64)
    add("--workers", type=count, default=4, help="threads that read images")
    add("--features", type=Path, metavar="DIR", help="keep features there: a killed run continues, two runs compare")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read, and count them")
