"""Train the bundled text-to-image teacher, minutes on two cores; its record is in the folder that it makes.

python training/train_text_teacher.py --config configs/teacher_digits_text.yaml key=value
"""

import argparse
import sys

from stepdistill.errors import UserError
from stepdistill.recipe import parse
from stepdistill.train_text_teacher import TextTeacherConfig, train_text_teacher


def main(argv: list[str]) -> None:
    """Train as the arguments say; a wrong recipe is one clear message and exit code 2."""
    parser = argparse.ArgumentParser(description="Train a small text-to-image teacher on captioned digits.")
    parser.add_argument("--config", required=True, help="YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    try:
        print(train_text_teacher(parse(TextTeacherConfig, arguments.config, arguments.overrides)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
