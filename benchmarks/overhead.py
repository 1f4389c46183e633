"""What the trainer and the samplers cost beyond the network passes they must make.

    python benchmarks/overhead.py [--threads 2] [--repeats 12] [--out benchmarks/results/overhead.json]

Each pair is measured in turn, A B A B ..., in one process on the bundled teacher's network; the ratio printed is
the median of the pairs' ratios, since machines are noisy and seconds mean little.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.config import Optimizer, Training
from stepdistill.methods import BOOT, Batch, SiD
from stepdistill.samplers import sample_ode
from stepdistill.teacher import load_teacher
from stepdistill.trainer import Trainer

TEACHER = load_teacher("builtin:digits")


def paired(ours: Callable[[], object], bare: Callable[[], object], repeats: int) -> dict[str, object]:
    """Median of the pairwise ratios ours / bare, their quartiles, and the median seconds of both."""
    for warm_up in (ours, bare):
        warm_up()
    pairs = [(_seconds(ours), _seconds(bare)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(quarters[1], 3),
        "ratio_quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
        "ours_s": round(statistics.median(a for a, _ in pairs), 4),
        "bare_s": round(statistics.median(b for _, b in pairs), 4),
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def trainer(method: SiD | BOOT, batch_size: int) -> Trainer:
    """A trainer as ``stepdistill distill`` builds it."""
    from stepdistill.backbones.conditioned import Conditioned

    networks: dict[str, nn.Module] = {
        r: copy.deepcopy(TEACHER.network).requires_grad_(True) for r in ("student", *method.roles)
    }
    if method.two_times:
        networks["student"] = Conditioned(copy.deepcopy(TEACHER.network)).requires_grad_(True)
    return Trainer(
        method,
        TEACHER.denoiser,
        networks,
        Training(batch_size=batch_size, optimizer=Optimizer(lr=1e-5)),
        steps=10**6,
        batches=lambda size: Batch(torch.randn(size, *TEACHER.sample_shape)),
        accelerator=Accelerator(cpu=True),
    )


class Passes:
    """Bare passes of one network: forward, forward and backward, forward and backward to the input only."""

    def __init__(self, batch_size: int) -> None:
        self.learning = copy.deepcopy(TEACHER.network).requires_grad_(True)
        self.frozen = copy.deepcopy(TEACHER.network).requires_grad_(False)
        self.x, self.label = torch.randn(batch_size, *TEACHER.sample_shape), torch.rand(batch_size) * 999

    def forward(self, x: Tensor | None = None) -> None:
        """One pass without a graph (1 unit)."""
        x = self.x if x is None else x
        with torch.no_grad():
            self.frozen(x, self.label[: len(x)], return_dict=False)

    def learn(self, x: Tensor | None = None) -> None:
        """Forward, and backward to the weights (3 units)."""
        x = self.x if x is None else x
        label = self.label if len(x) <= len(self.label) else self.label.repeat(2)
        self.learning(x, label[: len(x)], return_dict=False)[0].square().mean().backward()
        self.learning.zero_grad()

    def through(self) -> None:
        """Forward, and backward to the input (2 units)."""
        x = self.x.clone().requires_grad_(True)
        self.frozen(x, self.label, return_dict=False)[0].square().mean().backward()


def sid(batch_size: int, repeats: int, *, low_memory: bool) -> dict[str, object]:
    """A SiD step against its 11 (13) units: 1 + 3 for the fake network, 3 + 2 + 2 (+ 2) for the generator."""
    ours, bare = trainer(SiD(low_memory=low_memory), batch_size), Passes(batch_size)

    def passes() -> None:
        bare.forward()
        bare.learn()
        bare.learn()
        bare.through()
        bare.through()
        if low_memory:
            bare.forward()
            bare.forward()

    return paired(ours.step, passes, repeats)


def boot(batch_size: int, repeats: int) -> dict[str, object]:
    """A BOOT step (DDIM): student and teacher forward, 1/4 batch twice through the teacher, student on 5/4 batch."""
    ours, bare = trainer(BOOT(t_max=0.7), batch_size), Passes(batch_size)
    quarter = bare.x[: batch_size // 4]

    def passes() -> None:
        bare.forward()
        bare.forward()
        bare.forward(quarter)
        bare.forward(quarter)
        bare.learn(torch.cat([bare.x, quarter]))

    return paired(ours.step, passes, repeats)


def sampler(batch_size: int, repeats: int, steps: int = 10) -> dict[str, object]:
    """Ten DDIM steps against ten bare calls."""
    bare = Passes(batch_size)

    def ours() -> None:
        with torch.no_grad():
            sample_ode(TEACHER.denoiser, bare.x, steps)

    def passes() -> None:
        for _ in range(steps):
            bare.forward()

    return paired(ours, passes, repeats)


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size, repeats = arguments.batch_size, arguments.repeats
    results = {
        "machine": f"{platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}",
        "batch_size": size,
        "SiD step / 11 units": sid(size, repeats, low_memory=False),
        "SiD low_memory step / 13 units": sid(size, repeats, low_memory=True),
        "BOOT step / its passes": boot(size, repeats),
        "DDIM 10 steps / 10 calls": sampler(size, repeats),
    }
    print(json.dumps(results, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
