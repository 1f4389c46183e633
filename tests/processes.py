"""Several processes of one job, forked, so that a test can compare what they measure with what one does."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def in_processes(world: int, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns in each of ``world`` processes, by rank; an exception is returned too.

    They find each other as under ``torchrun``. A forked child has the parent's imports, so this takes no second.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    pipes = [context.Pipe(duplex=False) for _ in range(world)]

    def run(rank: int) -> None:
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            result = work()
        except Exception as error:
            result = error
        pipes[rank][1].send(result)

    children = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    results = [receive.recv() if receive.poll(120) else TimeoutError("no answer") for receive, _ in pipes]
    for child in children:
        child.join(10)
    return results
