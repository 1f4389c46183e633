"""Every method at the same cost: distances against network calls and seconds, as one table and one plot.

    python benchmarks/methods.py [--units 300] [--seeds 0 1 2] [--only digits_sid digits_dmd] [--threads 2]

The cost of a run is counted, not claimed: one unit is one row through the network forward; a pass that keeps a
graph costs two more for gradients of the weights, one more for the gradient of the input alone (the usual
factors).  A recipe's first steps are counted, and its length is set so that every run spends ``--units``
thousand rows.  Runs live under ``--runs`` and are skipped when finished and continued when interrupted, so the
command can be stopped and started at will; table and plot come at the end, or with ``--report`` at any time.
Rows of other runs at the same cost stay in them.  Runs may share a busy machine: minutes and images per second are
measured apart, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.bundled import bundled_configs
from stepdistill.conditions import Cond
from stepdistill.config import Config, Training
from stepdistill.dry_run import rehearse
from stepdistill.evaluation import Evaluator
from stepdistill.learners import networks
from stepdistill.methods import TBCM, TSCD, DisBack
from stepdistill.recipe import parse
from stepdistill.samplers import SampleNoise, sample_ode
from stepdistill.teacher import load_teacher
from stepdistill.trainer import Trainer

RECIPES = [
    name
    for name in bundled_configs()
    if name.startswith("digits_") and not any(other in name for other in ("_text_", "_long", "_then_"))
]
"""Of the one teacher that all of them are compared on."""
FEW_STEPS = {
    "digits_sid_2": ("digits_sid_few_step", "method.steps=2"),
    "digits_dmd_2": ("digits_dmd", "method.steps=2", "method.init_ratio=2.5"),
    "digits_dmd_4": ("digits_dmd", "method.steps=4", "method.init_ratio=2.5"),
    "digits_disback_sid_2": ("digits_disback_sid", "method.method.steps=2", "method.method.init_ratio=2.5"),
    "digits_disback_sid_4": ("digits_disback_sid", "method.method.steps=4", "method.method.init_ratio=2.5"),
    "digits_disback_dmd_2": ("digits_disback_dmd", "method.method.steps=2", "method.method.init_ratio=2.5"),
    "digits_disback_dmd_4": ("digits_disback_dmd", "method.method.steps=4", "method.method.init_ratio=2.5"),
    "digits_swiftbrush_2": ("digits_swiftbrush", "method.steps=2", "method.init_ratio=2.5"),
    "digits_swiftbrush_4": ("digits_swiftbrush", "method.steps=4", "method.init_ratio=2.5"),
    "digits_tbcm_2": ("digits_tbcm", "method.steps=2"),
    "digits_tbcm_4": ("digits_tbcm", "method.steps=4"),
    "digits_tscd_2": ("digits_tscd", "method.segments=[8,4,2]", "method.stage_steps=[640,640]"),
    "digits_tscd_4": ("digits_tscd", "method.segments=[8,4]", "method.stage_steps=[1000]"),
}
"""The same with more calls, where a method has them: a recipe and what it is told."""
TEACHER_STEPS = (50, 32, 16, 8, 4, 2, 1)
CURVE_SAMPLES = 1000
"""Of every distance in the plot; a Frechet distance falls with their number."""
Runs = dict[str, list[dict[str, Any]]]
"""What every seed of a row reached."""
_LINES = {1: "-", 2: "--", 4: ":"}


class Counter:
    """Counts rows through networks, weighted by the gradients that are kept."""

    def __init__(self, call: Any) -> None:
        self.call, self.units = call, 0.0

    def __call__(self, network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        output = self.call(network, x, label, cond)
        extra = 0
        if output.requires_grad:
            extra = 2 if any(parameter.requires_grad for parameter in network.parameters()) else 1
        self.units += len(x) * (1 + extra)
        return output


@dataclass(frozen=True)
class Cost:
    """Thousand rows of a step: ``recording`` in the first ``recorded`` steps (DisBack's), then ``learning``."""

    recorded: int
    recording: float
    learning: float

    def units(self, step: float) -> float:
        """Thousand rows of the steps up to ``step``."""
        return self.recording * min(step, self.recorded) + self.learning * max(0, step - self.recorded)

    def steps(self, units: float) -> int:
        """Steps that ``units`` thousand rows pay for."""
        return self.recorded + max(1, round((units - self.recording * self.recorded) / self.learning))


class Started:
    """A recipe past its first steps, with what these cost; TSCD's first states are made, DisBack's path recorded."""

    def __init__(self, config: Config) -> None:
        from stepdistill.distill import Run

        self.run = Run(config.model_copy(update={"output_dir": Path("unused")}))
        method, self.recorded, looked = self.run.stage.method, 0, 1
        if isinstance(method, DisBack):
            self.recorded, looked = method.record_steps, method.points
            method = replace(method, record_steps=looked, switch_every=1)
        self.counter = Counter(self.run.taught.call)
        self.trainer = Trainer(
            method,
            replace(self.run.taught, call=self.counter),
            networks(self.run.stage, self.run.teacher, self.run.config.data),
            cast(Training, self.run.stage.training),
            steps=10**6,
            batches=self.run.data.batch,
            accelerator=Accelerator(),
        )
        self.recording = self.units(looked)

    def units(self, steps: int) -> float:
        """Thousand rows that a step costs, the mean over ``steps`` more of them."""
        self.counter.units = 0.0
        for _ in range(steps):
            self.trainer.step()
        return self.counter.units / steps / 1000

    @torch.no_grad()
    def generate(self, samples: int) -> None:
        """Samples of the student."""
        noise = SampleNoise(range(samples), self.run.teacher.sample_shape)
        self.run.sampler(self.trainer.frozen["student"], noise(), renoise=noise)

    @property
    def cost(self) -> Cost:
        """Of the steps to come."""
        return Cost(self.recorded, self.recording, self.units(40))


def told(name: str, seed: int, folder: Path) -> tuple[str, list[str]]:
    """The recipe of a row, and what it is told."""
    name, *overrides = FEW_STEPS.get(name, (name,))
    return name, [f"seed={seed}", f"output_dir={folder}", *overrides]


def paces(names: Sequence[str], *, rounds: int = 7, steps: int = 4, samples: int = 250) -> dict[str, dict[str, float]]:
    """Seconds per thousand rows of training and student's images per second: medians of rounds in turn."""
    started = {name: Started(parse(Config, *told(name, 0, Path("unused")))) for name in names}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, recipe in started.items():
            begin = time.perf_counter()
            units = recipe.units(steps) * steps
            trained = time.perf_counter()
            recipe.generate(samples)
            seen[name].append(((trained - begin) / units, samples / (time.perf_counter() - trained)))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seen.items()}
    return {name: {"seconds_per_unit": spent, "images_per_second": made} for name, (spent, made) in medians.items()}


def train(name: str, seed: int, units: float, folder: Path, threads: int, samples: int) -> None:
    """Run one recipe to the common cost in a process of its own."""
    done = folder / "cost.json"
    if done.is_file():
        return
    name, overrides = told(name, seed, folder)
    config = parse(Config, name, overrides)
    cost = Started(config).cost
    steps = cost.steps(units)
    share = steps / cast(int, config.steps)
    resume = folder.is_dir() and any(folder.glob("checkpoints/**/step_*"))
    if folder.is_dir() and not resume:
        shutil.rmtree(folder)
    every = max(1, steps // 8)
    overrides += [
        *(f"steps={steps}", f"resume={str(resume).lower()}"),
        *(f"training.preview_every={every}", f"training.checkpoint_every={every}", "training.trackers=[]"),
        *(f"evaluate.samples={samples}", f"evaluate.curve_samples={CURVE_SAMPLES}", "evaluate.teacher_steps=[1]"),
        f"evaluate.every_images={every * config.training.batch_size}",
        *phases(config.method, share),
    ]
    code = (
        f"import torch, sys; torch.set_num_threads({threads})\n"
        "from stepdistill.config import Config; from stepdistill.distill import distill\n"
        "from stepdistill.recipe import parse\n"
        "distill(parse(Config, sys.argv[1], sys.argv[2:]))"
    )
    subprocess.run([sys.executable, "-c", code, name, *overrides], check=True)
    peak = max(rehearse(stage, config).memory for stage in config.plan) / 1e6
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    done.write_text(json.dumps({"cost": asdict(cost), "steps": steps, "memory_mb": peak, "commit": commit}))


def phases(method: object, share: float) -> list[str]:
    """Overrides that scale the parts of a method that are counted in steps with the length of its run."""
    if isinstance(method, TSCD):
        return [f"method.stage_steps={[max(1, round(steps * share)) for steps in method.stage_steps]}"]
    if isinstance(method, TBCM):
        return [f"method.warmup_steps={round(method.warmup_steps * share)}"]
    return []


def read(folder: Path) -> dict[str, Any]:
    """What one finished run reached."""
    written = json.loads((folder / "cost.json").read_text())
    cost = Cost(**written.pop("cost"))
    student = json.loads((folder / "evaluation.json").read_text())["rows"][-1]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = {row["step"]: row["fid"] for row in history if "fid" in row}
    return {
        "calls": student["network_calls"],
        "fd": student["metrics"]["fid"]["value"],
        "least_class": min(student["class_shares"]),
        "diversity": student["diversity"],
        "curve": [(cost.units(step), seen[step]) for step in sorted(seen)],
        "units": cost.units(written["steps"]),
        **written,
    }


def teacher_rows(samples: int) -> list[dict[str, Any]]:
    """The teacher at every number of steps."""
    teacher, evaluator = load_teacher("builtin:digits"), Evaluator("builtin:digits")

    def row(steps: int) -> dict[str, Any]:
        def generate(ids: Sequence[int]) -> Tensor:
            return sample_ode(teacher.denoiser, SampleNoise(ids, teacher.sample_shape)(), steps)

        name = f"teacher {steps}"
        measured = evaluator.measure(name, steps, generate, samples=samples)
        few = evaluator.measure(name, steps, generate, samples=CURVE_SAMPLES)
        shown = {"diversity": measured.diversity, "images_per_second": measured.images_per_second}
        distances = {"fd": measured.metrics["fid"].value, "fd_of_curve": few.metrics["fid"].value}
        return {"steps": steps, **distances, **shown}

    return [row(steps) for steps in TEACHER_STEPS]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; no error for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def title(name: str) -> str:
    """The recipe and what it is told first, as one types it."""
    recipe, *told = FEW_STEPS.get(name, (name,))
    return " ".join([recipe, *told[:1]])


def summary(runs: Runs, pace: dict[str, dict[str, float]], units: float) -> str:
    """The table, in Markdown: means over seeds, of the rarest class the least; under it what was run."""
    lines = [
        "| recipe | calls | distance | rarest digit | diversity | images/s | steps | minutes | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in sorted(runs.items(), key=lambda item: mean_and_error([r["fd"] for r in item[1]])[0]):
        fd, error = mean_and_error([row["fd"] for row in rows])
        shown = f"{fd:.2f} ± {error:.2f}" if len(rows) > 1 else f"{fd:.2f}"
        lines.append(
            f"| `{title(name)}` | {rows[0]['calls']} | {shown} | {100 * min(r['least_class'] for r in rows):.1f} % "
            f"| {statistics.mean(r['diversity'] for r in rows):.1f} | {pace[name]['images_per_second']:.0f} "
            f"| {rows[0]['steps']} | {pace[name]['seconds_per_unit'] * rows[0]['units'] / 60:.1f} "
            f"| {rows[0]['memory_mb']:.1f} MB |"
        )
    commits = sorted({row["commit"] for rows in runs.values() for row in rows})
    seeds = max(len(rows) for rows in runs.values())
    lines += ["", f"`python benchmarks/methods.py --units {units:g}` at {', '.join(commits)}, {seeds} seeds."]
    return "\n".join(lines)


def plot(runs: Runs, pace: dict[str, dict[str, float]], teacher: list[dict[str, Any]], path: Path) -> None:
    """Distance against network calls and against seconds, mean and error; the teacher as reference lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = {recipe: f"C{k}" for k, recipe in enumerate(sorted({title(name).split()[0] for name in runs}))}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for axis, label in ((axes[0], "thousand rows through a network"), (axes[1], "seconds of training")):
        for name, rows in sorted(runs.items(), key=lambda item: title(item[0])):
            each = pace[name]["seconds_per_unit"] if axis is axes[1] else 1.0
            length = min(len(row["curve"]) for row in rows)
            x = [each * statistics.mean(row["curve"][k][0] for row in rows) for k in range(length)]
            seen = [mean_and_error([row["curve"][k][1] for row in rows]) for k in range(length)]
            style = {"color": colours[title(name).split()[0]], "linestyle": _LINES[rows[0]["calls"]]}
            axis.errorbar(
                x, *zip(*seen, strict=True), elinewidth=0.6, label=title(name).removeprefix("digits_"), **style
            )
        for row in teacher:
            axis.axhline(row["fd_of_curve"], color="grey", linewidth=0.5)
            axis.annotate(f"{row['steps']}", (1, row["fd_of_curve"]), xycoords=("axes fraction", "data"), fontsize=7)
        axis.set(yscale="log", xlabel=label)
    axes[0].set_ylabel(f"fd-digits-v1 at {CURVE_SAMPLES:,} samples (grey: teacher, steps)")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.04, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=float, default=300.0, help="thousand network rows of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*RECIPES, *FEW_STEPS], metavar="RECIPE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--report", action="store_true", help="train nothing; table and plot of what is finished")
    parser.add_argument("--pace", action="store_true", help="measure seconds and images per second of every row anew")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for name in arguments.only:
            folder = arguments.runs / f"{name}_{seed}"
            if not arguments.report:
                train(name, seed, arguments.units, folder, arguments.threads, arguments.samples)
            if (folder / "cost.json").is_file():
                runs.setdefault(name, []).append(read(folder))
    kept = arguments.runs / f"teacher_{arguments.samples}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(teacher_rows(arguments.samples)))
    teacher = json.loads(kept.read_text())
    written = arguments.out / "methods.json"
    before = json.loads(written.read_text()) if written.is_file() else {}
    if before.get("units") == arguments.units:
        runs = {**before["runs"], **runs}
    pace = before.get("pace", {})
    missing = [name for name in runs if arguments.pace or name not in pace]
    pace = {**pace, **(paces(missing) if missing else {})}
    machine = f"{platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}"
    results = {"machine": machine, "units": arguments.units, "teacher": teacher, "pace": pace, "runs": runs}
    arguments.out.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(results, indent=1) + "\n")
    table = summary(runs, pace, arguments.units)
    (arguments.out / "methods.md").write_text(table + "\n")
    plot(runs, pace, teacher, arguments.out / "methods.png")
    print(table)


if __name__ == "__main__":
    main()
