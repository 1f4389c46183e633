"""What following single trajectories can come to: a one-step student regressed on the teacher's own noise-sample pairs.

    python benchmarks/regression.py [--steps 320 640 1280] [--pairs 20000] [--threads 2]

BOOT, FreeFlow, TBCM and TSCD learn the map from noise to the sample that the teacher's ODE arrives at, each by a way
of its own.  Here the ends are simply given, at no cost, to the same network with the recipes' optimizer, so that what
is left of the distance is not the methods' equations but what so many steps of regression leave: compared as they are,
and as the pictures that they are shown as (``method.clip_sample``).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.evaluation import Evaluator
from stepdistill.images import to_uint8
from stepdistill.methods._shared import few_step_times
from stepdistill.samplers import SampleNoise, StudentSampler, ode_steps
from stepdistill.teacher import Teacher, load_teacher

TEACHER_STEPS = 32
BATCH = 32


@torch.no_grad()
def ends(teacher: Teacher, noise: Tensor, ratio: float) -> Tensor:
    """Where the teacher's ODE takes ``noise`` from the level at which the student is called."""
    process = teacher.denoiser.process
    times = few_step_times(process, ratio, TEACHER_STEPS)
    parts = []
    for part in noise.split(500):
        *_, last = ode_steps(teacher.denoiser, part, times)
        parts.append(last.x)
    return torch.cat(parts)


def regress(
    teacher: Teacher, sampler: StudentSampler, noise: Tensor, samples: Tensor, steps: int
) -> tuple[Denoiser, float]:
    """A student of ``steps`` steps of Adam at batch 32, and its mean squared error on pairs it has not seen."""
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    student = replace(teacher.denoiser, network=network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    average = EMAModel(network.parameters(), decay=0.5 ** (BATCH / 4000), use_ema_warmup=True, power=1.0)
    held = len(noise) // 20
    for _ in range(steps):
        rows = torch.randint(held, len(noise), (BATCH,))
        loss = (sampler(student, noise[rows]) - sampler.picture(samples[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.step(network.parameters())
    average.copy_to(network.parameters())
    with torch.no_grad():
        error = (sampler(student, noise[:held]) - sampler.picture(samples[:held])).square().mean().item()
    return student, error


def main() -> None:
    """Make the pairs, regress, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[320, 640, 1280])
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--ratio", type=float, default=10.0, help="sigma / alpha at which noise enters")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/regression.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    teacher, evaluator = load_teacher("builtin:digits"), Evaluator("builtin:digits")
    noise = torch.randn(arguments.pairs, *teacher.sample_shape)
    samples = ends(teacher, noise, arguments.ratio)
    plain = StudentSampler(few_step_times(teacher.denoiser.process, arguments.ratio, 1), "unit")

    def distance(images: Tensor) -> float:
        return evaluator.score(to_uint8(images))["fid"].value

    rows = [{"what": f"the teacher's own {TEACHER_STEPS} steps", "fd": distance(samples[: arguments.samples])}]
    fresh = SampleNoise(range(arguments.samples), teacher.sample_shape)()
    for steps, sampler in itertools.product(arguments.steps, (plain, replace(plain, clip_sample=True))):
        student, error = regress(teacher, sampler, noise, samples, steps)
        with torch.no_grad():
            made = torch.cat([sampler(student, part) for part in fresh.split(500)])
        name = f"regression, {steps} steps{', as pictures' if sampler.clip_sample else ''}"
        rows.append({"what": name, "fd": distance(made), "error": error})
        print(rows[-1], flush=True)
    machine = f"{platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}"
    arguments.out.write_text(json.dumps({"machine": machine, "pairs": arguments.pairs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
