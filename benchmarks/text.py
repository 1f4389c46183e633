"""Text to image: students of the bundled tiny Stable Diffusion against their teacher, by prompt accuracy and distance.

    python benchmarks/text.py [key=value ...] [--seeds 0 1 2] [--only digits_text_sid] [--guidance 3]

Accuracy is the share of samples in which the bundled classifier sees the digit that the prompt names, FD is
fd-digits-v1.  Several seeds give their mean and its standard error, one gives that of its samples.  Runs live under
``--runs`` and are skipped when finished and continued when interrupted; the table is written again after each of them,
from every run that is found there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from stepdistill.bundled import bundled_configs

RECIPES = [name for name in bundled_configs() if name.startswith("digits_text_")]
TEACHER = "a teacher in 50 steps"
_CODE = (
    "import sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
    "from stepdistill.config import Config; from stepdistill.distill import distill\n"
    "from stepdistill.recipe import parse; distill(parse(Config, sys.argv[2], sys.argv[3:]))"
)


def train(recipe: str, folder: Path, threads: int, told: list[str]) -> None:
    """Run one recipe in a process of its own, unless it has been."""
    if (folder / "evaluation.json").is_file():
        return
    resume = any(folder.glob("checkpoints/step_*"))
    words = [f"output_dir={folder}", f"resume={str(resume).lower()}", "training.trackers=[]", *told]
    words += ["training.preview_every=0", "evaluate.every_images=0", "evaluate.teacher_steps=[50]"]
    subprocess.run([sys.executable, "-c", _CODE, str(threads), recipe, *words], check=True)


def read(folder: Path, guidance: float) -> list[dict[str, Any]]:
    """Teacher and student of one finished run."""
    recipe, _, seed = folder.name.rpartition("_seed")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    teacher, student = (row for row in rows if row["network_calls"] == 50 or row is rows[-1])
    shared = {"guidance": guidance, "seed": int(seed)}
    samples = student["metrics"]["fid"]["n"]
    return [
        {
            "recipe": name,
            "calls": row["network_calls"],
            "accuracy": row["prompt_accuracy"],
            "accuracy_se": math.sqrt(row["prompt_accuracy"] * (1 - row["prompt_accuracy"]) / samples),
            "fd": row["metrics"]["fid"]["value"],
            "fd_se": row["metrics"]["fid"]["se"],
            "minutes": minutes,
            **shared,
        }
        for name, row, minutes in ((TEACHER, teacher, 0.0), (recipe, student, history[-1]["seconds"] / 60))
    ]


def shown(runs: list[dict[str, Any]], key: str, unit: float = 1.0) -> str:
    """Mean and standard error over the seeds, or over the samples of a single one."""
    values = [unit * row[key] for row in runs]
    several = len(values) > 1
    error = statistics.stdev(values) / math.sqrt(len(values)) if several else unit * runs[0][f"{key}_se"]
    places = 1 if unit > 1 else 2
    return f"{statistics.mean(values):.{places}f} ± {error:.{places}f}"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every recipe and guidance, as Markdown; of the teacher, whose samples no seed changes, one run."""
    lines = ["| recipe | guidance | calls | prompt accuracy | FD | seeds | minutes |", "|---|---|---|---|---|---|---|"]
    for recipe, guidance in dict.fromkeys((row["recipe"], row["guidance"]) for row in rows):
        runs = [row for row in rows if (row["recipe"], row["guidance"]) == (recipe, guidance)]
        seeds, minutes = len({row["seed"] for row in runs}), statistics.mean(row["minutes"] for row in runs)
        told = runs[:1] if recipe == TEACHER else runs
        accuracy, fd = shown(told, "accuracy", 100), shown(told, "fd")
        lines.append(
            f"| {recipe} | {guidance:g} | {runs[0]['calls']} | {accuracy} % | {fd} | {seeds} | {minutes:.0f} |"
        )
    return "\n".join(lines)


def report(runs: Path, out: Path, machine: dict[str, Any]) -> None:
    """Write ``text.json`` and ``text.md`` of every finished run."""
    rows = []
    for done in sorted(runs.glob("guidance_*/*/evaluation.json")):
        rows += read(done.parent, float(done.parent.parent.name.removeprefix("guidance_")))
    rows.sort(key=lambda row: (row["guidance"], row["recipe"], row["seed"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "text.json").write_text(json.dumps([machine, *rows], indent=1) + "\n")
    (out / "text.md").write_text(table(rows) + "\n")


def main() -> None:
    """Train what is missing; write what is known after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of the teacher's guidance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("told", nargs="*", default=[], metavar="key=value", help="for every recipe: steps=300")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"machine": f"{platform.machine()} CPU, {arguments.threads} threads", "torch": torch.__version__}
    for seed in arguments.seeds:
        for recipe in arguments.only:
            folder = arguments.runs / f"guidance_{arguments.guidance:g}" / f"{recipe}_seed{seed}"
            told = [f"seed={seed}", f"data.guidance_scale={arguments.guidance}", *arguments.told]
            train(recipe, folder, arguments.threads, told)
            report(arguments.runs, arguments.out, machine | {"told": arguments.told})
    print((arguments.out / "text.md").read_text())


if __name__ == "__main__":
    main()
