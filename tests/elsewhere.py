"""A process that has diffusers and in which ``import stepdistill`` fails; imports are slow, so it stays."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, cast

import torch

_PROGRAM = """
import sys
sys.modules["stepdistill"] = None  # importing it would raise
import contextlib, json, traceback
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    code, seed, file = json.loads(line)
    space = {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for part in [code] if seed is None else code.splitlines():
                if seed is not None:
                    torch.manual_seed(seed)  # loading draws numbers too
                exec(part, space)
            torch.save(torch.as_tensor(space["image"]), file)
        answer = None
    except BaseException:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class Elsewhere:
    """Runs code where stepdistill is not, and gives what is then called ``image``."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-c", _PROGRAM]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def __call__(self, code: str, *, seed: int | None = None) -> torch.Tensor:
        """``image`` after ``code``; with a ``seed``, which every line begins with, line by line."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.pt"
            asked, answers = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
            asked.write(json.dumps([code, seed, str(file)]) + "\n")
            asked.flush()
            answer = answers.readline()
            assert answer, self._said()
            failed = json.loads(answer)
            assert failed is None, failed
            return torch.load(file, weights_only=True)

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:]

    def close(self) -> None:
        """End the process."""
        cast(IO[str], self.process.stdin).close()
        self.process.wait(60)
        self.log.close()
