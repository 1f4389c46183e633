"""Every method of the union stands still at its exact student of a Gaussian teacher, whatever process and target.

A method that is added to the union is tested here: as a generator that is asked at its first level alone, or by its
own entry in ``EXACT``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from oracles import PROCESSES, Mixture, Told, cubature, gaussian
from test_boot import Chain
from test_freeflow import Map
from test_sid import at
from test_tbcm import End
from test_tscd import chained_jumps, grid_of
from torch import nn

from stepdistill.denoiser import Denoiser, Target
from stepdistill.methods import BOOT, DMD, TBCM, TSCD, AnyMethod, Batch, FreeFlow, Method
from stepdistill.process import VE, NoiseProcess

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LAW, OTHER = gaussian(MEAN, COV), gaussian(MEAN + 0.3, 1.5 * COV)
NOISE, EPS = cubature(4).split(2, dim=1)
"""Batch means of what is quadratic in both are expectations."""
SETTINGS = {
    "init_ratio": 6.0,
    "start_ratio": 6.0,
    "t_max": 0.8,
    "student_times": at(0.45),
    "fake_times": at(0.45),
    "times": at(0.45),
    "fake_updates": 1,
    "derivative": "exact",
    "warmup_steps": 0,
    "route_points": 4,
    "teacher_steps": 4,
    "segments": (2, 1),
    "stage_steps": (1,),
}
"""For those of a method's fields that are among them: a level that every target can be read at, one time, few steps."""


def settled(kind: type[Method], process: NoiseProcess) -> Method:
    told: dict[str, Any] = {**SETTINGS, "input": "sigma" if isinstance(process, VE) else "unit"}
    if "method" in kind.__dataclass_fields__:
        told["method"] = settled(DMD, process)
    return kind(**{name: value for name, value in told.items() if name in kind.__dataclass_fields__})


class Generator(Mixture):
    """The student of one call whose samples have the law of a Gaussian: ``mean + root z``."""

    def __init__(self, law: Mixture, method: Method) -> None:
        nn.Module.__init__(self)
        (self.mean,), (spread,), (axes,) = law.means, law.spreads, law.axes
        self.root, self.method = axes * spread.sqrt(), method

    def expectations(self, x, a, s):
        fed = self.method.sampler(PROCESSES["flow"]).input
        x0 = self.mean + (x if fed == "unit" else x / s) @ self.root.T
        return x0, (x - a * x0) / s


Law = Callable[[Any, NoiseProcess, Target], Mixture | Told]
EXACT: Mapping[type[Method], Law] = {
    BOOT: lambda method, process, target: Chain(method, LAW.denoiser(process, target)),
    FreeFlow: lambda method, process, target: Map(LAW, process),
    TBCM: lambda method, process, target: End(LAW.weights, LAW.means, COV[None]),
    TSCD: lambda method, process, target: chained_jumps(grid_of(method, process), 1, LAW.denoiser(process, target)),
}
"""The exact students of methods whose student is asked for more than samples at its first level."""
KINDS = get_args(AnyMethod)


def exact_student(method: Method, process: NoiseProcess, target: Target) -> Denoiser:
    law = EXACT.get(type(method), lambda method, *told: Generator(LAW, method))
    return law(method, process, target).denoiser(process, target)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_method_has_an_exact_student(kind):
    if kind.two_times or kind.every_level:
        assert kind in EXACT, f"say in EXACT what the student of {kind.__name__} is where its loss is least"
    else:
        assert kind not in EXACT


def slope(method: Method, role: str, nets: dict[str, Denoiser]) -> float:
    """The largest entry of the loss's gradient in an affine change of what the network of ``role`` says."""
    shift, gain = torch.zeros(2).double().requires_grad_(), torch.zeros(2, 2).double().requires_grad_()
    (turn,) = (turn for turn in method.turns(method.least_steps - 1) if turn.role == role)

    def tilted(network, x, label, cond):
        return network(x, label, **cond) + shift + x @ gain

    learns = {**nets, role: replace(nets[role], call=tilted), "still": nets[role]}
    loss = turn.loss(learns, Batch(NOISE, memory={})).value
    return max(part.abs().max().item() for part in torch.autograd.grad(loss, (shift, gain)))


CELLS = [(kind, name, target) for kind in KINDS for name in PROCESSES for target in kind.targets]


@pytest.mark.parametrize(("kind", "name", "target"), CELLS)
def test_every_method_stands_still_at_its_exact_student_and_nowhere_beside(monkeypatch, kind, name, target):
    monkeypatch.setattr(torch, "randn_like", lambda like: EPS[: len(like)])
    process = PROCESSES[name]
    method = settled(kind, process)
    teacher, other = (law.denoiser(process, target) for law in (LAW, OTHER))
    method.check(teacher)
    nets = {"teacher": teacher, **dict.fromkeys((*method.roles, *method.frozen_roles), teacher)}
    nets["student"] = exact_student(method, process, target)
    made = method.sampler(process)(nets["student"], NOISE)
    own = gaussian(made.mean(0), made.T.cov(correction=0)).denoiser(process, target)
    for role, right, wrong in (("student", {}, {"teacher": other}), *((r, {r: own}, {r: other}) for r in method.roles)):
        for nearby, least, most in ((right, 0, 1e-8), (wrong, 1e-3, 1e3)):
            torch.manual_seed(0)
            assert least <= slope(method, role, {**nets, **nearby}) < most, role
