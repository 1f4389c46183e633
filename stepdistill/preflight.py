"""What can be refused before any work starts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from accelerate.utils import LoggerType

from .errors import UserError


def check_launch() -> None:
    """Refuse ``accelerate launch --cpu --num_processes N``, which starts one process and says nothing.

    Raises:
        UserError: accelerate was asked for several processes (it sets MASTER_PORT) but started no group (no
            WORLD_SIZE, no MPI).
    """
    asked = "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    started = any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if asked and not started:
        raise UserError(
            "accelerate launch starts a single process on the CPU whatever --num_processes says; use\n"
            "  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m stepdistill distill --config ..."
        )


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, and a resumed run without one.

    Raises:
        UserError: as said.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not resume:
        raise UserError(f"output_dir {folder} holds another run; choose another, or continue it with resume=true")
    if resume and not occupied:
        raise UserError(f"nothing to resume: output_dir {folder} is empty or does not exist")


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that accelerate does not know or that are not installed.

    Raises:
        UserError: naming the tracker and what to do.
    """
    known = [kind.value for kind in LoggerType if kind.value != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"training.trackers: {name!r} is not one of {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name} is not installed; pip install {name}")
