"""Diversity distillation (Gandikota & Bau 2025, arXiv:2503.10637): the teacher draws first, the student finishes.

A distilled model settles the structure of an image in its first call, which costs variety; the teacher's first
steps bring it back.  ``trace_x0`` is the same paper's view of what every call predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .conditions import NO_COND, Cond
from .denoiser import Denoiser, Prediction
from .process import InputScale, NoiseProcess, broadcast
from .samplers import Renoising, Solver, StudentSampler, ode_steps, teacher_grid

_LEAST_SIGNAL = 0.05
"""Smallest ``alpha / sigma`` at which a one-call student can see what it is given."""


class _Call(NamedTuple):
    denoiser: Denoiser
    t: float
    cond: Cond
    renoising: Renoising
    """How the state that it is fed comes from what was said before."""
    input: InputScale = "sigma"
    """Scale of that state: the process's own, or the unit norm ``alpha^2 + sigma^2 = 1``."""

    def time(self, like: Tensor) -> Tensor:
        """``(B,)`` in float64."""
        return like.new_full((len(like),), self.t, dtype=torch.float64)

    def state(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network is fed."""
        process, t = self.denoiser.process, self.time(x0)
        x = process.add_noise(x0, eps, t)
        if self.input == "sigma":
            return x
        return x / broadcast((process.alpha(t).square() + process.sigma(t).square()).sqrt(), x)


@dataclass(frozen=True)
class HybridSampler:
    """The teacher in place of a student's first calls.

    A student of several calls takes over at its call ``j = teacher_first``: the teacher goes along its own grid
    ``T_0 > T_1 > ...`` and makes the steps ``0 .. i* - 1``, at least one, with ``i* = argmin_i |T_i - t_j|``; the
    last one arrives exactly at ``t_j``.  Teacher and student may live in different processes: a state is handed
    over as ``(x0, eps)``, which have one meaning in all of them.

    A student of one call knows its own level alone.  The teacher makes ``teacher_first`` steps, and its last ``x0``
    is taken back to that level with the noise that the sample began with (a student that was fed unit noise is fed
    the state of unit norm).  Such students never saw a state with an image in it: what comes out is an experiment.
    One that makes its call at pure noise is refused.
    """

    student: StudentSampler
    teacher_first: int = 1
    """Calls of the student that the teacher replaces; steps of the teacher before a one-call student; 0 is none."""
    teacher_steps: int | None = None
    """Steps of the teacher's whole grid, the first of which are made; by default the student's calls (of a one-call
    student: ``teacher_first``)."""
    teacher_renoising: Renoising = "ddim"
    """How the teacher's steps go on: DDIM, or as a student's calls would (the paper gives both one scheduler)."""

    def __post_init__(self) -> None:
        calls, first = len(self.student.times), self.teacher_first
        if first < 0:
            raise ValueError(f"teacher_first must not be negative, got {first}")
        if first >= calls > 1:
            raise ValueError(f"teacher_first must leave one of the student's {calls} calls, got {first}")
        if self.teacher_steps is not None and self.teacher_steps < (first if calls == 1 else 1):
            raise ValueError(f"teacher_steps must be at least {first if calls == 1 else 1}, got {self.teacher_steps}")

    def teacher_times(self, teacher: NoiseProcess, student: NoiseProcess) -> list[float]:
        """Times of the teacher's calls, decreasing, in the coordinate of its process."""
        if self.teacher_first == 0:
            return []
        grid = teacher_grid(teacher, self.teacher_steps or max(len(self.student.times), self.teacher_first))
        if len(self.student.times) == 1:
            return grid[: self.teacher_first]
        level = torch.tensor([self.student.times[self.teacher_first]], dtype=torch.float64)
        aim = teacher.time_at_log_snr(student.log_snr(level)).item()
        nearest = min(range(len(grid)), key=lambda i: round(abs(grid[i] - aim), 9))  # of two the earlier
        return grid[: max(nearest, 1)]

    def check(self, student: NoiseProcess) -> None:
        """Raise ``ValueError`` where the teacher's draft cannot reach a student in this process."""
        if self.teacher_first == 0 or len(self.student.times) > 1:
            return
        level = torch.tensor(self.student.times, dtype=torch.float64)
        ratio = (student.alpha(level) / student.sigma(level)).item()
        if ratio < _LEAST_SIGNAL:
            raise ValueError(
                f"teacher_first needs a student that is fed less than pure noise: this one makes its only call at "
                f"alpha / sigma = {ratio:.2g} and would see nothing of the teacher's draft (at least {_LEAST_SIGNAL})"
            )

    def trace(
        self,
        teacher: Denoiser,
        student: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        renoise: Callable[[], Tensor] | None = None,
    ) -> Iterator[Prediction]:
        """What every call says, the teacher's first.

        Args:
            teacher: with its guidance, if any.
            student: as ``self.student`` runs it.
            noise: standard normal, ``(B, ...)``.
            cond: condition of the batch, for both.
            renoise: gives the fresh noise of later calls; torch's generator by default.
        """
        self.check(student.process)
        if self.teacher_first == 0:
            yield from self.student.trace(student, noise, cond, renoise=renoise)
            return
        first, *later = self._calls(teacher, student, cond, noise)
        said = teacher(teacher.process.prior_scale * noise, first.time(noise), cond)
        yield said
        for call in later:
            if call.renoising == "fresh":
                eps = torch.randn_like(noise) if renoise is None else renoise()
            else:
                eps = noise if call.renoising == "fixed" else said.eps
            said = call.denoiser(call.state(said.x0, eps), call.time(noise), call.cond)
            if call.denoiser is student:
                said = self.student.shown(said)
            yield said

    def _calls(self, teacher: Denoiser, student: Denoiser, cond: Cond, like: Tensor) -> list[_Call]:
        """All calls in order."""
        plan, alone = self.student, len(self.student.times) == 1
        times = self.teacher_times(teacher.process, student.process)
        calls = [_Call(teacher, t, cond, self.teacher_renoising) for t in times]
        told, rule = plan.cond(student.process, cond, like), self.teacher_renoising
        if alone:
            return [*calls, _Call(student, plan.times[0], told, "fixed", plan.input)]
        for t in plan.times[self.teacher_first :]:
            calls.append(_Call(student, t, told, rule))
            rule = plan.renoising
        return calls

    def __call__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        renoise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """``(B, ...)`` samples from standard normal ``noise``."""
        *_, last = self.trace(teacher, student, noise, cond, renoise=renoise)
        return last.x0


def trace_ode(
    denoiser: Denoiser, noise: Tensor, steps: int, cond: Cond = NO_COND, *, solver: Solver = "euler"
) -> Iterator[Prediction]:
    """What a teacher says at every step of ``sample_ode``, in order; the last ``x0`` is the sample."""
    x, grid = denoiser.process.prior_scale * noise, teacher_grid(denoiser.process, steps)
    return (step.prediction for step in ode_steps(denoiser, x, grid, cond, solver=solver))


def trace_x0(predictions: Iterable[Prediction]) -> Tensor:
    """The clean samples that a trace predicts, ``(B, K, ...)`` for K calls; the last is the sample.

    Takes the traces of ``StudentSampler``, ``HybridSampler`` and ``trace_ode``.
    """
    return torch.stack([said.x0 for said in predictions], dim=1)
