"""The command line: ``stepdistill distill | export | report | push | sample | teacher | fid | configs | methods``.

Heavy imports wait until a command really runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import Diverged, UserError

_RAW = argparse.RawDescriptionHelpFormatter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepdistill",
        description="Turn a diffusion or flow pipeline into a one-step generator, without training images.",
        epilog="example: stepdistill distill --config digits_sid\n`stepdistill COMMAND --help` shows one per command.",
        formatter_class=_RAW,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser(
        "distill",
        help="distil a teacher into a student",
        description="Distil the teacher of a recipe; `stepdistill configs` lists the bundled ones.",
        epilog=(
            "examples:\n"
            "  stepdistill distill --config digits_sid\n"
            "  stepdistill distill --config digits_sid method.alpha=1.2 steps=2000 output_dir=runs/mine\n"
            "  stepdistill distill --config digits_sid resume=true\n"
            "  stepdistill distill --config sd15_sid data.prompts=prompts.txt --dry-run\n"
            "  accelerate launch -m stepdistill distill --config digits_sid"
        ),
        formatter_class=_RAW,
    )
    _configured(distill)
    distill.add_argument(
        "--dry-run", action="store_true", help="check everything and say what it takes, without weights or a GPU"
    )
    distill.add_argument(
        "--tflops", type=_amount, default=400.0, help="10^12 operations per second of the device of a dry run (400)"
    )

    teacher = commands.add_parser(
        "teacher",
        help="train a small teacher from images",
        description="Train a small DDPM teacher from images; the bundled digits teacher was made this way.",
        epilog="example: stepdistill teacher --config teacher_digits output_dir=runs/teacher",
        formatter_class=_RAW,
    )
    _configured(teacher)

    sample = commands.add_parser(
        "sample",
        help="write images of a student or teacher",
        description="Write PNG files of a student, of a teacher (any number of steps), or of the two in turn.",
        epilog=(
            "examples:\n"
            "  stepdistill sample runs/digits_sid/student --count 1000 --out runs/images\n"
            "  stepdistill sample runs/few_step/student --teacher-first 1 --trace --out runs/varied\n"
            "  stepdistill sample builtin:digits --steps 10 --out runs/teacher_images"
        ),
        formatter_class=_RAW,
    )
    sample.add_argument("source", help="student folder, teacher folder, hub id or builtin:digits")
    sample.add_argument("--out", type=Path, required=True, help="folder to create")
    sample.add_argument("--count", type=_positive, default=64, help="number of samples (64)")
    sample.add_argument(
        "--steps", type=_positive, help="calls of a teacher (50); before a student, of its whole grid (the student's)"
    )
    sample.add_argument("--solver", choices=("euler", "heun", "dpmpp_2m"), default="euler", help="of a teacher (euler)")
    sample.add_argument("--first-id", type=int, default=0, help="id, and so the noise, of the first sample (0)")
    sample.add_argument("--batch-size", type=_positive, default=64, help="samples at a time (64)")
    sample.add_argument("--labels", type=int, nargs="+", help="class labels to cycle through (all)")
    told = sample.add_mutually_exclusive_group()
    told.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts to cycle through (the student's recipe's)")
    told.add_argument("--prompts", metavar="FILE", help="the same from a text file with one prompt a line")
    sample.add_argument("--guidance-scale", type=float, default=1.0, help="of a teacher (1, none)")
    sample.add_argument(
        "--teacher-first", type=_count, default=0, metavar="N", help="the teacher makes a student's first N calls (0)"
    )
    sample.add_argument("--teacher", metavar="SOURCE", help="that teacher (the one in the student's model card)")
    sample.add_argument(
        "--trust-remote-code", action="store_true", help="run the pipeline file that a student comes with"
    )
    sample.add_argument("--trace", action="store_true", help="also write what every call predicts, to OUT_trace/")

    export = commands.add_parser(
        "export",
        help="export the newest checkpoint of a run",
        description="Write student/ of a run again from its newest checkpoint, stopped or finished, and evaluate it.",
        epilog="example: stepdistill export runs/digits_sid evaluate=null",
        formatter_class=_RAW,
    )
    export.add_argument("run", type=Path, help="output_dir of the run")
    export.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of its recipe")

    report = commands.add_parser(
        "report",
        help="write one HTML page about runs",
        description="Write one self-contained HTML page about one or several runs, finished or not.",
        epilog="example: stepdistill report runs/digits_sid runs/digits_dmd --out compared.html",
        formatter_class=_RAW,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    report.add_argument("--out", type=Path, help="file (RUN/report.html; of several runs report.html)")

    push = commands.add_parser(
        "push",
        help="upload a student to the hub",
        description="Upload the student of a run, or its adapters, in one commit with its model card.",
        epilog="example: stepdistill push runs/digits_sid me/one-step-digits --dry-run",
        formatter_class=_RAW,
    )
    push.add_argument("run", type=Path, help="output_dir of the run")
    push.add_argument("repo", help="owner/name; made if there is none")
    push.add_argument("--adapters", action="store_true", help="student_lora/ in place of student/")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--dry-run", action="store_true", help="only show what would be uploaded; needs no network")

    # The evaluator parses its own arguments, so that `python eval/fid.py` and this command are one.
    commands.add_parser("fid", help="Frechet distance between two sets of images", add_help=False)

    configs = commands.add_parser(
        "configs",
        help="list the bundled recipes, or print one",
        epilog="example: stepdistill configs digits_sid > mine.yaml",
        formatter_class=_RAW,
    )
    configs.add_argument("name", nargs="?", help="recipe to print")

    commands.add_parser(
        "methods",
        help="list the methods, their papers and the teachers they accept",
        epilog="example: stepdistill methods",
        formatter_class=_RAW,
    )
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    match arguments.command:
        case "distill":
            _distill(arguments)
        case "teacher":
            from .recipe import parse
            from .train_teacher import TeacherConfig, train_teacher

            print(train_teacher(parse(TeacherConfig, arguments.config, arguments.overrides)))
        case "sample":
            from .sample import sample

            labels = tuple(arguments.labels) if arguments.labels else None
            folder = sample(
                arguments.source,
                arguments.out,
                count=arguments.count,
                steps=arguments.steps,
                first_id=arguments.first_id,
                batch_size=arguments.batch_size,
                labels=labels,
                prompts=tuple(arguments.prompt) if arguments.prompt else arguments.prompts,
                guidance_scale=arguments.guidance_scale,
                solver=arguments.solver,
                teacher_first=arguments.teacher_first,
                teacher=arguments.teacher,
                trace=arguments.trace,
                trust_remote_code=arguments.trust_remote_code,
            )
            print(folder)
        case "export":
            from .distill import export_run

            export_run(arguments.run, arguments.overrides)
        case "report":
            from .html_report import write_report

            print(write_report(arguments.runs, arguments.out))
        case "push":
            from .push import push

            print(
                push(
                    arguments.run,
                    arguments.repo,
                    adapters=arguments.adapters,
                    private=arguments.private,
                    dry_run=arguments.dry_run,
                )
            )
        case "fid":
            from .fid import main as fid

            return fid(rest)
        case "configs":
            _configs(arguments.name)
        case "methods":
            _methods()
    return 0


def _distill(arguments: argparse.Namespace) -> None:
    from .config import Config
    from .recipe import parse

    config = parse(Config, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from .dry_run import dry_run

        print(dry_run(config, tflops=arguments.tflops))
    else:
        from .distill import distill

        distill(config)


def _configs(name: str | None) -> None:
    from .bundled import bundled_configs

    recipes = bundled_configs()
    if name is None:
        print("\n".join(recipes))
    elif name in recipes:
        print(recipes[name].read_text(), end="")
    else:
        raise UserError(f"no bundled recipe {name!r}; there are {', '.join(recipes)}")


def _methods() -> None:
    from typing import get_args

    from .methods import AnyMethod

    for method in sorted(get_args(AnyMethod), key=lambda kind: kind.__name__.lower()):
        summary = (method.__doc__ or "").splitlines()[0]
        print(f"{method.__name__:<12}{summary}")
        print(f"{'':<12}{method.paper}\n{'':<12}teachers: {', '.join(method.targets)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; user errors are one clear message and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # The first two words suffice to know `fid`, whose flags belong to its own parser.
    known = argv[:1] if argv[:1] == ["fid"] else argv
    parser = _parser()
    arguments, others = parser.parse_known_args(known)
    # argparse takes positional words in one run only; overrides may stand on both sides of --config.
    if others and (arguments.command not in ("distill", "teacher") or any(word.startswith("-") for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.overrides += others
    try:
        code = _run(arguments, argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
