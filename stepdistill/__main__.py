"""The command line: ``stepdistill distill | export | report | push | sample | teacher | fid | configs | methods``.

Heavy imports wait until a command really runs, so that help answers at once.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .arguments import amount, count, positive, taken
from .errors import Diverged, NotExported, UserError, first_line, plain_warnings


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="stepdistill",
        description="Turn a diffusion or flow pipeline into a one-step generator, without training images.",
        epilog="example: stepdistill distill --config digits_sid\n`stepdistill COMMAND --help` shows one per command.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = _declare_distill, _declare_teacher, _declare_sample, _declare_export, _declare_report, _declare_push
    for declare in every:
        declare(commands)
    # The evaluator parses its own arguments, so that `python eval/fid.py` and this command are one.
    commands.add_parser("fid", help="score images or a pipeline: FID, CLIP score and the rest", add_help=False)
    _declare_configs(commands)
    _command(
        commands,
        "methods",
        _methods,
        "list the methods, their papers and the teachers they accept",
        "stepdistill methods",
    )
    return parser


def _command(
    commands: Any,  # noqa: ANN401  argparse's type has no public name.
    name: str,
    run: Callable[[Namespace], None],
    text: str,
    *examples: str,
    told: str = "",
) -> ArgumentParser:
    """Declare a command: one line in the list, ``told`` and examples in its own help."""
    shown = "\n".join(f"  {example}" for example in examples)
    made = commands.add_parser(
        name,
        help=text,
        description=told or f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:\n{shown}" if len(examples) > 1 else f"example: {shown.strip()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=run)
    return made


def _configured(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe")


def _declare_distill(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "distill",
        _distill,
        "distil a teacher into a student",
        "stepdistill distill --config digits_sid",
        "stepdistill distill --config digits_sid method.alpha=1.2 steps=2000 output_dir=runs/mine",
        "stepdistill distill --config digits_sid resume=true",
        "stepdistill distill --config sd15_sid data.prompts=prompts.txt --dry-run",
        "accelerate launch -m stepdistill distill --config digits_sid",
        told="Distil the teacher of a recipe; `stepdistill configs` lists the bundled ones.",
    )
    _configured(made)
    made.add_argument(
        "--dry-run", action="store_true", help="check everything and say what it takes, without weights or a GPU"
    )
    made.add_argument(
        "--tflops", type=amount, default=400.0, help="10^12 operations per second of the device of a dry run (400)"
    )
    made.add_argument("--gpus", type=positive, default=1, help="devices that a dry run tells the hours of (1)")


def _distill(told: Namespace) -> None:
    from .config import Config
    from .recipe import parse

    config = parse(Config, told.config, told.overrides)
    if told.dry_run:
        from .dry_run import dry_run

        print(dry_run(config, tflops=told.tflops, gpus=told.gpus))
    else:
        from .distill import distill

        distill(config)


def _declare_teacher(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "teacher",
        _teacher,
        "train a small teacher from images",
        "stepdistill teacher --config teacher_digits output_dir=runs/teacher",
        told="Train a small DDPM teacher from images; the bundled digits teacher was made this way.",
    )
    _configured(made)


def _teacher(told: Namespace) -> None:
    from .recipe import parse
    from .train_teacher import TeacherConfig, train_teacher

    print(train_teacher(parse(TeacherConfig, told.config, told.overrides)))


def _declare_sample(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "sample",
        _sample,
        "write images of a student or teacher",
        "stepdistill sample runs/digits_sid/student --count 1000 --out runs/images",
        "stepdistill sample runs/few_step/student --teacher-first 1 --trace --out runs/varied",
        "stepdistill sample builtin:digits --steps 10 --out runs/teacher_images",
        told="Write PNG files of a student, of a teacher (any number of steps), or of the two in turn.",
    )
    made.add_argument("source", help="student folder, or a teacher as in a recipe")
    made.add_argument("--out", type=Path, required=True, help="folder to create")
    made.add_argument("--count", "--num", type=positive, default=64, help="number of samples (64)")
    made.add_argument(
        "--steps", type=positive, help="calls of a teacher (50); before a student, of its whole grid (the student's)"
    )
    made.add_argument("--solver", choices=("euler", "heun", "dpmpp_2m"), default="euler", help="of a teacher (euler)")
    made.add_argument("--first-id", type=count, default=0, help="id, and so the noise, of the first sample (0)")
    made.add_argument("--batch-size", type=positive, default=64, help="samples at a time (64)")
    made.add_argument("--labels", type=int, nargs="+", help="class labels to cycle through (the student's, or all)")
    told = made.add_mutually_exclusive_group()
    told.add_argument(
        "--prompt", dest="prompts", nargs="+", metavar="TEXT", help="prompts to cycle through (the student's recipe's)"
    )
    told.add_argument("--prompts", metavar="FILE", help="the same from a text file with one prompt a line")
    made.add_argument("--guidance-scale", type=float, help="of a teacher (1); before a student (its recipe's)")
    made.add_argument(
        "--teacher-first", type=count, default=0, metavar="N", help="the teacher makes a student's first N calls (0)"
    )
    made.add_argument("--teacher", metavar="SOURCE", help="that teacher, or that of adapters (the one in the card)")
    made.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a student comes with or names"
    )
    made.add_argument("--trace", action="store_true", help="also write what every call predicts, to OUT_trace/")


def _sample(told: Namespace) -> None:
    from .sample import Sampling, sample

    asked = taken(Sampling, told)
    print(sample(asked, told.out, count=told.count, first_id=told.first_id, batch_size=told.batch_size))


def _declare_export(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "export",
        _export,
        "export the newest checkpoint of a run",
        "stepdistill export runs/digits_sid evaluate=null",
        told="Write student/ of a run again from its newest checkpoint, stopped or finished, and evaluate it.",
    )
    made.add_argument("run_folder", metavar="run", type=Path, help="output_dir of the run")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of its recipe")


def _export(told: Namespace) -> None:
    from .distill import export_run

    export_run(told.run_folder, told.overrides)


def _declare_report(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "report",
        _report,
        "write one HTML page about runs",
        "stepdistill report runs/digits_sid runs/digits_dmd --out compared.html",
        told="Write one self-contained HTML page about one or several runs, finished or not.",
    )
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    made.add_argument("--out", type=Path, help="file (RUN/report.html; of several runs report.html)")


def _report(told: Namespace) -> None:
    from .html_report import write_report

    print(write_report(told.runs, told.out))


def _declare_push(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "push",
        _push,
        "upload a student to the hub",
        "stepdistill push runs/digits_sid me/one-step-digits --dry-run",
        told="Upload the student of a run, or its adapters, in one commit with its model card.",
    )
    made.add_argument("run_folder", metavar="run", type=Path, help="output_dir of the run")
    made.add_argument("repo", help="owner/name; made if there is none")
    made.add_argument("--adapters", action="store_true", help="student_lora/ in place of student/")
    made.add_argument("--private", action="store_true", help="make a new repository private")
    made.add_argument("--dry-run", action="store_true", help="only show what would be uploaded; needs no network")


def _push(told: Namespace) -> None:
    from .push import push

    print(push(told.run_folder, told.repo, adapters=told.adapters, private=told.private, dry_run=told.dry_run))


def _declare_configs(commands: Any) -> None:  # noqa: ANN401
    made = _command(
        commands,
        "configs",
        _configs,
        "list the bundled recipes, or print one",
        "stepdistill configs digits_sid > mine.yaml",
    )
    made.add_argument("name", nargs="?", help="recipe to print")


def _configs(told: Namespace) -> None:
    from .bundled import bundled_configs

    name, recipes = told.name, bundled_configs()
    if name is None:
        print("\n".join(recipes))
    elif name in recipes:
        print(recipes[name].read_text(), end="")
    else:
        raise UserError(f"no bundled recipe {name!r}; there are {', '.join(recipes)}")


def _methods(told: Namespace) -> None:
    from typing import get_args

    from .methods import AnyMethod

    for method in sorted(get_args(AnyMethod), key=lambda kind: kind.__name__.lower()):
        summary = (method.__doc__ or "").splitlines()[0]
        print(f"{method.__name__:<12}{summary}")
        print(f"{'':<12}{method.paper}\n{'':<12}teachers: {', '.join(method.targets)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; user errors are one clear message and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    plain_warnings()
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
        code = 0
        if arguments.command == "fid":
            from .fid import main as fid

            code = fid(argv[1:])
        else:
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, Diverged, NotExported, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {first_line(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, (Diverged, NotExported)) else 2)
    sys.exit(code)


if __name__ == "__main__":
    main()
