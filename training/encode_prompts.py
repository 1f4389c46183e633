"""Encode the prompts of a recipe ahead of its run, for example where there is memory for the text encoders.

    python training/encode_prompts.py --config RECIPE data.prompts=prompts.txt

``distill`` does the same when it starts; what is encoded once is read from the cache.  Nothing but tokenizers, text
encoders and settings is downloaded or read; ``training.parts_dtype=bfloat16`` halves their memory, and the cache.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from stepdistill.config import Config
from stepdistill.data import data_free
from stepdistill.errors import UserError
from stepdistill.recipe import parse
from stepdistill.sources import whole
from stepdistill.teacher import Teacher, settings_of


def main() -> None:
    """Encode, and say how many distinct prompts there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        config = parse(Config, arguments.config, arguments.overrides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        made = data_free(_with_text(settings_of(config)), config.data, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(made.prompts)} distinct prompts are encoded")


def _with_text(teacher: Teacher) -> Teacher:
    """``teacher`` with the files of its tokenizers and text encoders, and no others."""
    text = {name: kind for name, kind in teacher.index.items() if name.startswith(("text_encoder", "tokenizer"))}
    return replace(teacher, folder=whole(teacher.source, teacher.folder, text))


if __name__ == "__main__":
    main()
