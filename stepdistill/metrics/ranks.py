"""Several processes that score together: each its share of the samples, all the same result."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import UserError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process among all that a launcher started (``accelerate launch``, ``torchrun``); ``(0, 1)`` alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(_leave)  # A process that ends with its group is aborted now and then.
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def add_up(*sums: Tensor) -> None:
    """Replace every tensor by its sum over the processes."""
    if rank_and_world()[1] > 1:
        # NCCL, which a training run has set up, exchanges nothing that is on a CPU.
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        for tensor in sums:
            total = tensor.to(device)
            distributed.all_reduce(total)
            tensor.copy_(total)


def gathered(mine: Any) -> list[Any]:  # noqa: ANN401
    """What every process holds, in the order of their ranks."""
    world = rank_and_world()[1]
    parts: list[Any] = [mine] * world
    if world > 1:
        distributed.all_gather_object(parts, mine)
    return parts


def together(work: Callable[[], T]) -> T:
    """``work`` of this process; bad input of one process is that of all, who would wait for it or hide its message.

    Raises:
        UserError: as the first process raised it that did.
    """
    done, failure = [], None
    try:
        done.append(work())
    except UserError as error:
        failure = error
    first = next((each for each in gathered(failure and str(failure)) if each is not None), None)
    if first is not None:
        raise UserError(first) from failure
    return done[0]


def device_of_rank() -> torch.device:
    """The GPU of this process, or the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(f"cuda:{local}") if torch.cuda.is_available() else torch.device("cpu")
