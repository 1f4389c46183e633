"""Small students learn: BOOT the map of a one-dimensional mixture, every method the law of a two-dimensional one."""

import copy
import math
from itertools import pairwise
from typing import Any, NamedTuple, cast, get_args

import pytest
import torch
from accelerate import Accelerator
from oracles import Mixture, call, monotone_map
from torch import Tensor, nn

from stepdistill.config import Optimizer, Training
from stepdistill.denoiser import Denoiser
from stepdistill.methods import BOOT, TBCM, TSCD, AnyMethod, Batch, DisBack, FreeFlow, Method, SiD
from stepdistill.methods._score import ScoreDistillation
from stepdistill.process import Flow, NoiseProcess
from stepdistill.trainer import Trainer

FLOW = Flow(label_scale=1.0)


class MLP(nn.Module):
    """A network of the state, its label in [0, 1] and, where there is one, the target label."""

    def __init__(self, dim: int, width: int, times: int = 1) -> None:
        super().__init__()
        widths = [dim + 5 * times, width, width, width]
        layers = [layer for m, n in pairwise(widths) for layer in (nn.Linear(m, n), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, label: Tensor, target_label: Tensor | None = None) -> Tensor:
        labels = [each.to(x.dtype)[:, None] for each in (label, target_label) if each is not None]
        waves = [wave(k * math.pi * each) for each in labels for k in (1, 2) for wave in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, *labels, *waves], 1))


def learn(method: Method, nets: dict[str, Denoiser], steps: int, batch: int, dim: int, rate: float) -> None:
    """The algorithm box of ``method`` by hand: Adam at a rate that falls to zero as a cosine."""
    learners = ("student", *method.roles)
    adam = {role: torch.optim.Adam(nets[role].network.parameters(), lr=rate, betas=(0.0, 0.999)) for role in learners}
    memory: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for role, loss, _ in method.turns(step):
            adam[role].param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            adam[role].zero_grad()
            loss(nets, Batch(torch.randn(batch, dim), memory=memory)).value.backward()
            adam[role].step()


@pytest.mark.slow
def test_boot_learns_the_map_of_a_mixture():
    """The exact map of one-dimensional noise keeps quantiles; the error is averaged over the noise."""
    torch.manual_seed(0)
    variances = torch.tensor([0.2, 0.5]).square().reshape(2, 1, 1)
    law = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), variances)
    student = Denoiser(MLP(1, 64, times=2), FLOW, "x0", call)
    method = BOOT(teacher_steps=32)
    learn(method, {"teacher": law.denoiser(FLOW), "student": student}, 2500, 256, 1, 2e-3)
    noise = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    exact = monotone_map(law.double(), FLOW, noise, torch.ones(2000), torch.zeros(2000))
    with torch.no_grad():
        found = method.sampler(FLOW)(student, noise.float())
    error = (found - exact).square().mean().sqrt()
    assert error < 0.25


def sliced_w1(x: Tensor, y: Tensor, directions: int = 128) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projections of equally many points."""
    angle = torch.rand(directions) * math.pi
    across = torch.stack([angle.cos(), angle.sin()])
    return ((x @ across).sort(0).values - (y @ across).sort(0).values).abs().mean().item()


def ring() -> Mixture:
    """Eight Gaussians of standard deviation 0.15 on a circle of radius 1.5."""
    angle = torch.arange(8) * math.pi / 4
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.full((8,), 1 / 8), means, 0.15**2 * torch.eye(2).repeat(8, 1, 1))


def distilled_onto(law: Mixture, process: NoiseProcess, steps: int) -> Denoiser:
    """A teacher network fitted to the law's exact velocity."""
    teacher, exact = Denoiser(MLP(2, 128), process, "flow", call), law.denoiser(process, "flow")
    adam = torch.optim.Adam(teacher.network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        t = torch.rand(512, dtype=torch.float64).clamp_min(0.01)
        x_t = process.add_noise(law.sample(512), torch.randn(512, 2), t)
        with torch.no_grad():
            wanted = exact(x_t, t)
        adam.zero_grad()
        found = teacher(x_t, t)
        (found.eps - found.x0 - (wanted.eps - wanted.x0)).square().mean().backward()
        adam.step()
        schedule.step()
    return teacher


def with_target_time(network: MLP) -> MLP:
    """A two-time copy of ``network`` that does not listen to the target label yet."""
    first, wider = cast(nn.Linear, network.layers[0]), MLP(2, 128, times=2)
    with torch.no_grad():
        for mine, theirs in zip(list(wider.parameters())[1:], list(network.parameters())[1:], strict=True):
            mine.copy_(theirs)
        weight = cast(nn.Linear, wider.layers[0]).weight.zero_()
        weight[:, [0, 1, 2, 4, 5, 6, 7]] = first.weight
    return wider


class Case(NamedTuple):
    """How a method learns the ring."""

    settings: dict[str, Any] = {}  # noqa: RUF012
    steps: int = 500
    batch: int = 256
    rate: float = 1e-3


CASES = {
    BOOT: Case({"teacher_steps": 16, "solver": "heun"}, 1500, rate=2e-3),
    DisBack: Case({"record_steps": 60, "points": 5, "switch_every": 30}, 600),
    FreeFlow: Case({}, 600),
    SiD: Case({"low_memory": False}, 700),
    TBCM: Case({"warmup_steps": 75, "jvp": "finite"}, 300, batch=32),
    TSCD: Case(
        {"teacher_steps": 16, "segments": (4, 2, 1), "stage_steps": (400, 400), "distance": "l2"}, 1600, rate=2e-3
    ),
}
"""Of methods that need other settings than most."""
SCORE = [kind for kind in get_args(AnyMethod) if issubclass(kind, ScoreDistillation)]
ALL: list[tuple[type, dict[str, Any]]] = [
    *((kind, {}) for kind in get_args(AnyMethod) if kind is not DisBack),
    *((DisBack, {"method": kind(fake_updates=2)}) for kind in SCORE),
    *((kind, {"steps": 2}) for kind in get_args(AnyMethod) if "steps" in kind.__dataclass_fields__),
]
"""Every method of the package in one call, and in two where it has them."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "told"), ALL, ids=lambda each: getattr(each, "__name__", None) or str(each)[:24])
def test_every_method_turns_a_network_into_a_generator_each_of_whose_calls_has_every_mode(kind, told):
    """Two sets of 4,096 exact samples are 0.03 apart; the teacher's fifty Heun steps are 0.065 away, one step 0.9."""
    torch.manual_seed(0)
    law, case = ring(), CASES.get(kind, Case({"fake_updates": 2} if kind in SCORE else {}))
    teacher, method = distilled_onto(law, FLOW, 700), kind(**{**case.settings, **told})
    networks = {role: copy.deepcopy(teacher.network) for role in ("student", *method.roles)}
    if kind.two_times:
        networks["student"] = with_target_time(cast(MLP, teacher.network))
    noise, truth = torch.randn(4096, 2), law.sample(4096)
    training = Training(
        batch_size=case.batch, optimizer=Optimizer(lr=case.rate), lr_schedule="cosine", ema_halflife_images=None
    )

    def batches(count: int) -> Batch:
        return Batch(torch.randn(count, 2))

    trainer = Trainer(
        method, teacher, networks, training, steps=case.steps, batches=batches, accelerator=Accelerator(cpu=True)
    )
    sampler, student = method.sampler(FLOW), trainer.frozen["student"]
    with torch.no_grad():
        assert sliced_w1(sampler(student, noise), truth) > 0.2
    assert list(trainer.run(case.steps))[-1] == case.steps
    with torch.no_grad():
        found = [prediction.x0 for prediction in sampler.trace(student, noise)]
    assert len(found) == len(sampler.times)
    for x_g in found:
        assert sliced_w1(x_g, truth) <= 0.12
        share = torch.cdist(x_g, law.means).argmin(1).bincount(minlength=8) / len(x_g)
        assert share.min() > 0.05
