"""Memory of SiD with full copies, with adapters and with gradient checkpointing: predicted at full size, and measured.

Predicted: dry runs of the recipes for Stable Diffusion 1.5 and XL on settings without weights.  Measured: two training
steps of a small Stable Diffusion with random weights on the CPU, each in a process of its own, its peak of resident
memory above that of the imports beside what the dry run says of the same run.

    python benchmarks/memory.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import architectures  # pyright: ignore[reportMissingImports]
import families  # pyright: ignore[reportMissingImports]

from stepdistill import prompts
from stepdistill.config import Config
from stepdistill.distill import Run
from stepdistill.dry_run import rehearse
from stepdistill.recipe import parse

_LORA = "={rank: 64, alpha: 64}"
VARIANTS: dict[str, list[str]] = {
    "full copies": [],
    "full copies, checkpointing": ["training.gradient_checkpointing=true"],
    "adapters for the fake network": [f"training.lora.fake{_LORA}"],
    "adapters for both": [f"training.lora.fake{_LORA}", f"training.lora.student{_LORA}"],
    "adapters for both, checkpointing": [
        f"training.lora.fake{_LORA}",
        f"training.lora.student{_LORA}",
        "training.gradient_checkpointing=true",
    ],
}
PAPER_SCALE = ("sd15_sid", "sdxl_sid_few_step")
PLAIN = [
    "training.lora={}",
    "training.gradient_checkpointing=false",
    "training.gradient_accumulation=1",
    "method.low_memory=false",
]


@dataclass(frozen=True)
class Row:
    """Bytes of one variant."""

    recipe: str
    variant: str
    networks: int
    """Weights, optimizers and the average of every network."""
    step: int
    """Activations and gradients of a step at its peak."""
    measured: int | None = None
    """Peak of a process above its imports."""


def predicted(recipe: str, variant: str, words: list[str]) -> Row:
    """What a dry run says."""
    config = parse(Config, recipe, [*words, *VARIANTS[variant]])
    said = rehearse(config.plan[0], config)
    return Row(recipe, variant, said.memory - said.peak, said.peak)


def paper_scale(folder: Path) -> list[Row]:
    """Dry runs at full size."""
    rows = []
    for recipe in PAPER_SCALE:
        teacher = architectures.write(parse(Config, recipe, []).teacher, folder / recipe)
        words = [f"teacher={teacher}", f"data.prompts={folder / 'prompts.txt'}", *PLAIN, "training.batch_size=4"]
        rows += [predicted(recipe, variant, words) for variant in VARIANTS]
    return rows


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "activations count: 7 million weights, 32x32 latents": (
        {
            "sample_size": 32,
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        8,
    ),
    "weights count: 89 million, 8x8 latents": (
        {
            "sample_size": 8,
            "block_out_channels": (256, 512),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        1,
    ),
}
"""Of a small Stable Diffusion with random weights, in float32: its UNet, and the batch."""


def words_of(case: str, folder: Path) -> list[str]:
    """The run that is measured, its teacher in ``folder``."""
    options, batch = CASES[case]
    teacher = folder / str(batch)
    if not teacher.is_dir():
        unet = UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=8, **options)
        families.build("sd", teacher, unet=unet.eval())
    return [
        *(f"teacher={teacher}", f"data.prompts={folder / 'prompts.txt'}", *PLAIN, f"training.batch_size={batch}"),
        *("training.mixed_precision=no", "training.teacher_dtype=float32", "training.trackers=[]"),
        *("data.guidance_scale=1.0", "method.fake_guidance=1.0"),
        *("method.delta_guidance=1.0", "method.bracket_guidance=1.0"),
    ]


def measure(words: list[str]) -> int:
    """Peak of this process above what it holds after its imports, over two steps."""
    before = resident("VmRSS")
    run = Run(parse(Config, "sd15_sid", words))
    for _ in range(2):
        run.trainer.step()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Bytes of this process, which ``resource`` would mix with those of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measured(case: str, folder: Path) -> list[Row]:
    """Every variant of a case in a process of its own."""
    rows, base = [], words_of(case, folder)
    for variant, more in VARIANTS.items():
        words = [*base, f"output_dir={folder / 'run'}", *more]
        asked = [sys.executable, __file__, "--measure", json.dumps(words), "--cache", str(folder / "cache")]
        done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True)
        said = predicted("sd15_sid", variant, base)
        rows.append(Row(case, variant, said.networks, said.step, int(done.stdout.split()[-1])))
    return rows


def processor() -> str:
    """Name of the CPU, where the system tells it."""
    told = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in told.read_text().splitlines() if "model name" in line]
        if told.is_file()
        else []
    )
    return names[0] if names else platform.machine()


def table(rows: list[Row]) -> str:
    """Gigabytes as Markdown."""
    lines = ["| recipe | SiD with | networks | a step | together | measured |", "|---|---|---|---|---|---|"]
    for row in rows:
        parts = [row.networks, row.step, row.networks + row.step]
        said = " | ".join(f"{part / 1e9:.2f}" for part in parts)
        seen = "" if row.measured is None else f"{row.measured / 1e9:.2f}"
        lines.append(f"| {row.recipe} | {row.variant} | {said} | {seen} |")
    return "\n".join(lines)


def main() -> None:
    """Write ``memory.json`` and ``memory.md``."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        prompts.CACHE = arguments.cache
        print(measure(json.loads(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        rows = [row for case in CASES for row in measured(case, folder)] + paper_scale(folder)
    machine: dict[str, Any] = {
        "machine": processor(),
        "torch": torch.__version__,
        "batch": {**{case: batch for case, (_, batch) in CASES.items()}, "recipes": 4},
    }
    (arguments.out / "memory.json").write_text(json.dumps([machine, *(vars(row) for row in rows)], indent=1) + "\n")
    (arguments.out / "memory.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
