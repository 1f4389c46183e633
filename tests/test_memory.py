"""Memory on a CPU: what is freed is kept between steps; adapters and checkpointing save what they should."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from families import build

from stepdistill import prompts as prompts_module
from stepdistill.config import Config
from stepdistill.distill import Run
from stepdistill.recipe import parse

PROGRAM = """
import resource, sys, torch
from stepdistill.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(1 << 18) for _ in range(40)]  # 40 times 1 MiB, freed together
step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's way of allocating")
def test_a_large_tensor_made_again_touches_no_fresh_page():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert all(faults("keep") < 20_000 for _ in range(2))
    # Whether glibc gives the memory back depends on what happens to lie above it: about every second time.
    assert any(faults("plain") > 100_000 for _ in range(10))


ADAPTERS = [f"training.lora.{role}={{rank: 4, alpha: 4, targets: [to_q, to_v]}}" for role in ("fake", "student")]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def peak(words: list[str]) -> int:
    """Bytes that building a run and two steps of it add to this process at their peak."""

    def resident(which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    run = Run(parse(Config, "sd15_sid", words))
    for _ in range(2):
        run.trainer.step()
    return resident("VmHWM") - before


@linux
def test_adapters_save_copies_and_their_optimizers_and_checkpointing_activations(tmp_path, monkeypatch):
    """SiD of a wide UNet on small latents: the weights are nearly all there is."""
    monkeypatch.setattr(prompts_module, "CACHE", tmp_path / "prompts")
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=8,
        attention_head_dim=8,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    copy = 4 * sum(weight.numel() for weight in unet.parameters())
    plain = [
        *(f"teacher={build('sd', tmp_path / 'teacher', unet=unet)}", "data.prompts=[a cat, a dog]"),
        *("training.lora={}", "training.gradient_checkpointing=false", "training.gradient_accumulation=1"),
        *("training.mixed_precision=no", "training.teacher_dtype=float32", "training.trackers=[]"),
        *("training.batch_size=3", "method.low_memory=false", f"output_dir={tmp_path / 'run'}"),
    ]
    del unet
    full, adapted = peak(plain), peak([*plain, *ADAPTERS])
    light = peak([*plain, *ADAPTERS, "training.gradient_checkpointing=true"])
    # Gone are two copies and the average, Adam's two moments of both copies, and the gradients of one at a time.
    assert full - adapted == pytest.approx(8 * copy, rel=0.15)
    assert adapted - light > copy / 4
