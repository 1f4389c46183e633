"""TSCD's equations on Gaussians, where every jump is known; its trajectories in memory; small students learn."""

import math
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler
from oracles import PROCESSES, TARGETS, Mixture, call, cubature, flow_map, gaussian, monotone_map
from safetensors.torch import load_file, save_file
from test_learning import FLOW, MLP
from torch import nn

from stepdistill.backbones import unet2d
from stepdistill.config import Config
from stepdistill.denoiser import Denoiser
from stepdistill.export import export, export_error
from stepdistill.hosting import plan
from stepdistill.methods import DMD, TSCD, Batch, SiD, SwiftBrush
from stepdistill.methods._grid import Grid, solver_grid
from stepdistill.process import VE, VP, Flow, Trig
from stepdistill.recipe import parse
from stepdistill.samplers import ode_steps, teacher_grid
from stepdistill.snapshots import Remembered

LINE = gaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64))
SPACE = gaussian(
    torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64),
    torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 0.8]], dtype=torch.float64),
)
STANDARD = gaussian(torch.zeros(1).double(), torch.eye(1).double())
LINEAR = VP(DDPMScheduler().alphas_cumprod.double())
SCALED = VP(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double())

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_target = pytest.mark.parametrize("target", TARGETS)
every_law = pytest.mark.parametrize("law", [LINE, SPACE], ids=["1d", "3d"])


def method_for(process, **options) -> TSCD:
    """Eight teacher steps from a level that every target can read."""
    settings = {"teacher_steps": 8, "init_ratio": 6.0, "input": "sigma" if isinstance(process, VE) else "unit"}
    return TSCD(**{**settings, **options})


def grid_of(method: TSCD, process) -> Grid:
    return solver_grid(process, method.init_ratio, method.teacher_steps, torch.device("cpu"))


def shifted(network: nn.Module, x, label, cond):
    """A network that is told a number to add."""
    return network(x, label) + cond["shift"][:, None]


def draw(rows: int, law: Mixture) -> torch.Tensor:
    return torch.randn(rows, law.means.shape[1], dtype=torch.float64)


def roles(teacher: Denoiser, student: Denoiser) -> dict[str, Denoiser]:
    return {"teacher": teacher, "student": student, "still": student}


class Jumps(Mixture):
    """A network whose jump from grid point ``k`` to the end of its segment is ``move(x, k, end)``."""

    def __init__(self, grid: Grid, segments: int, move) -> None:
        nn.Module.__init__(self)
        self.grid, self.move, self.length = grid, move, (len(grid.times) - 1) // segments

    def expectations(self, x, a, s):
        """The ``x0`` and ``eps`` with ``x = a x0 + s eps`` and ``move(x) = a_end x0 + s_end eps``."""
        angles = torch.atan2(self.grid.sigma, self.grid.alpha)[:-1]
        k = (torch.atan2(s, a) - angles).abs().argmin(1)
        end = (k // self.length + 1) * self.length
        moved, a_end, s_end = self.move(x, k, end), self.grid.alpha[end, None], self.grid.sigma[end, None]
        return (s * moved - s_end * x) / (s * a_end - s_end * a), (a_end * x - a * moved) / (s * a_end - s_end * a)


def exact_jumps(grid: Grid, segments: int, law: Mixture) -> Jumps:
    """The probability-flow ODE's own jumps; the end of the grid is the clean sample."""
    (mean,), (spread,), (axes,) = law.means, law.spreads, law.axes

    def move(x, k, end):
        v_k, v_end = ((grid.alpha[i, None].square() * spread + grid.sigma[i, None].square()).sqrt() for i in (k, end))
        return grid.alpha[end, None] * mean + ((x - grid.alpha[k, None] * mean) @ axes * (v_end / v_k)) @ axes.T

    return Jumps(grid, segments, move)


def chained_jumps(grid: Grid, segments: int, teacher: Denoiser) -> Jumps:
    """The teacher's DDIM steps one after another, by ``ode_steps``; rows that have not begun or are done wait."""
    times = grid.times.tolist()[:-1]

    def move(x, k, end):
        for j, (now, then) in enumerate(zip(times, [*times[1:], None], strict=True)):
            (step,) = ode_steps(teacher, x, [now], end=then)
            x = torch.where(((k <= j) & (j < end))[:, None], step.x, x)
        return x

    return Jumps(grid, segments, move)


@every_process
@every_target
@every_law
def test_exact_jumps_and_an_exact_one_step_teacher_have_zero_loss(process, target, law):
    torch.manual_seed(0)
    method = method_for(process)
    grid = grid_of(method, process)
    teacher, *students = (exact_jumps(grid, m, law).denoiser(process, target) for m in (8, 4, 2, 1))
    for segments, student in zip((4, 2, 1), students, strict=True):
        memory: dict[str, torch.Tensor] = {}
        for _ in range(2):
            loss = method.student_loss(roles(teacher, student), Batch(draw(16, law), memory=memory), segments)
            assert loss.log["residual"] < 1e-20
            assert loss.value < 1e-16
        wrong = method.student_loss(roles(teacher, student), Batch(draw(16, law), memory=memory), 2 * segments)
        assert wrong.log["residual"] > 1e-6


@every_process
@every_target
def test_the_oracles_jumps_are_the_ones_of_the_ode(process, target):
    """``Jumps`` read through a network and ``Grid.arrive`` against ``flow_map``."""
    torch.manual_seed(0)
    grid = grid_of(method_for(process), process)
    x, k = draw(8, SPACE), torch.arange(8) % 4
    jump = exact_jumps(grid, 2, SPACE).denoiser(process, target)(x, grid.times[k])
    expected = flow_map(SPACE, process, x, grid.times[k], grid.times[4].expand(8))
    torch.testing.assert_close(grid.arrive(jump, torch.full_like(k, 4)), expected, rtol=1e-9, atol=1e-9)


@every_process
@every_target
@pytest.mark.parametrize("segments", [4, 2, 1])
def test_ddim_floor_of_exact_jumps_is_the_formula(process, target, segments):
    """``(v_n / v_{k+1}) (a_k - v_{k+1} / v_k) (x_k - alpha_k m)``, at every index at once."""
    torch.manual_seed(0)
    method, memory = method_for(process, distance="l2"), {}
    (mean,), (spread,), (axes,) = SPACE.means, SPACE.spreads, SPACE.axes
    grid = grid_of(method, process)
    nets = roles(SPACE.denoiser(process, target), exact_jumps(grid, segments, SPACE).denoiser(process, target))
    method.student_loss(nets, Batch(draw(16, SPACE), memory=memory), segments)
    x, k = memory["tscd_x"], memory["tscd_k"]
    found = method.student_loss(nets, Batch(draw(16, SPACE), memory=memory), segments).value
    n = (k * segments // 8 + 1) * 8 // segments

    def level(i):
        a, s = grid.alpha[i, None], grid.sigma[i, None]
        return a, s, (a * a * spread + s * s).sqrt()

    (a, s, v), (a_next, s_next, v_next), (_, _, v_end) = level(k), level(k + 1), level(n)
    step = s_next / s + (a_next - a * s_next / s) * a * spread / v**2
    residual = (v_end / v_next) * (step - v_next / v) * ((x - a * mean) @ axes)
    assert found.item() == pytest.approx(residual.square().mean().item(), rel=1e-9)
    assert found > 1e-8


@every_process
@every_target
@every_law
def test_the_teachers_own_chain_is_a_fixed_point_and_samples_its_endpoint(process, target, law):
    torch.manual_seed(0)
    for segments in (4, 1):
        method = method_for(process, segments=(segments,), stage_steps=())
        grid, teacher, noise = grid_of(method, process), law.denoiser(process, target), draw(8, law)
        student = chained_jumps(grid, segments, teacher).denoiser(process, target)
        (turn,) = method.turns(0)
        assert turn.loss(roles(teacher, student), Batch(noise, memory={})).log["residual"] < 1e-20
        sampler, times = method.sampler(process), grid.times[:-1]
        assert len(sampler.times) == segments
        x = process.student_input(noise, times[:1].expand(8), method.input)
        *_, last = ode_steps(teacher, x, times.tolist())
        torch.testing.assert_close(sampler(student, noise), last.x, rtol=1e-8, atol=1e-8)


def test_at_the_end_of_a_segment_the_target_is_the_teachers_state_and_the_student_is_not_asked():
    """With as many segments as steps a useless frozen student changes nothing; with fewer it does."""
    torch.manual_seed(0)
    method, noise = method_for(Flow(), distance="l2"), draw(8, LINE)
    teacher, useless = LINE.denoiser(Flow()), gaussian(torch.full((1,), 9.0).double(), torch.eye(1).double())
    nets = {**roles(teacher, teacher), "still": useless.denoiser(Flow())}
    assert method.student_loss(nets, Batch(noise, memory={}), 8).value < 1e-24
    assert method.student_loss(nets, Batch(noise, memory={}), 4).value > 0.1


def test_huber_distance_is_the_formula():
    """One teacher step from ``sigma = alpha = 1/2``: the residual is a difference of two denoisers."""
    torch.manual_seed(0)
    teacher, student, noise = LINE.denoiser(Flow()), STANDARD.denoiser(Flow()), draw(8, LINE)
    method = method_for(Flow(), huber_c=0.3, teacher_steps=1, segments=(1,), stage_steps=(), init_ratio=1.0)
    half = torch.full((8,), 0.5, dtype=torch.float64)
    residual = student(noise, half).x0 - teacher(noise, half).x0
    found = method.student_loss(roles(teacher, student), Batch(noise, memory={}), 1).value
    torch.testing.assert_close(found, ((residual**2 + 0.09).sqrt() - 0.3).mean())


@pytest.mark.parametrize(("rows", "steps"), [(8, 8), (24, 8), (4, 8), (6, 4), (64, 1)])
def test_trajectories_cover_the_grid_evenly_at_every_step(rows, steps):
    method, memory = method_for(Flow(), teacher_steps=steps, segments=(1,), stage_steps=()), {}
    seen = []
    for _ in range(2 * steps):
        k = method.pairs(LINE.denoiser(Flow()), Batch(torch.randn(rows, 1, dtype=torch.float64), memory=memory)).k
        seen.append(k)
        count = k.bincount(minlength=steps)
        assert count.max() - count.min() <= 1
    assert (torch.stack(seen[:steps]).sort(0).values == torch.arange(steps)[:, None]).all(), "every row visits every k"
    assert torch.equal(seen[0], seen[steps])


@every_process
def test_a_row_is_one_teacher_trajectory_with_its_own_condition_until_it_begins_again(process):
    """Against ``ode_steps`` from the noise and the condition that the row was given."""
    torch.manual_seed(0)
    method, memory = method_for(process), {}
    teacher = replace(SPACE.denoiser(process), call=shifted)
    times = grid_of(method, process).times[:-1]
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    expected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for turn in range(17):
        noise, shift = draw(4, SPACE), torch.randn(4, dtype=torch.float64)
        pair = method.pairs(teacher, Batch(noise, {"shift": shift}, memory=memory))
        for j, k in enumerate(pair.k.tolist()):
            if turn == 0 or k == 0:
                given, told = known.get(j, (noise[j : j + 1], shift[j : j + 1]))
                x = process.student_input(given, times[:1], method.input)
                steps = ode_steps(teacher, x, times.tolist(), {"shift": told})
                states = torch.cat([x, *(step.x for step in steps)])
                expected[j] = states, told
            states, told = expected[j]
            assert pair.cond["shift"][j] == told[0]
            torch.testing.assert_close(pair.x[j], states[k], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(pair.ahead[j], states[k + 1], rtol=1e-9, atol=1e-9)
            known[j] = noise[j : j + 1], shift[j : j + 1]


@pytest.mark.parametrize("process", [Flow(), Trig(), SCALED, VE(sigma_max=40.0)], ids=["flow", "trig", "vp", "ve"])
def test_the_states_have_the_marginal_variance_up_to_the_solvers_error(process):
    """The noise of every index is a cubature, so the variance is exact; a DDIM trajectory's error is first order."""
    law = gaussian(torch.zeros(3).double(), SPACE.spreads[0].diag())

    def error(steps: int) -> float:
        options = {"teacher_steps": steps, "segments": (1,), "stage_steps": (), "init_ratio": math.inf}
        method = method_for(process, **options)
        noise = cubature(3).repeat(steps, 1)
        pair = method.pairs(law.denoiser(process, "v"), Batch(noise, memory={}))
        grid = solver_grid(process, math.inf, steps, noise.device)
        k = torch.arange(steps)
        variance = pair.x.reshape(steps, 6, 3).square().mean(1)
        exact = grid.alpha[k, None].square() * law.spreads[0] + grid.sigma[k, None].square()
        return (variance / exact - 1).abs().max().item()

    coarse, fine = error(40), error(80)
    assert fine < 0.1
    assert coarse / fine == pytest.approx(2, abs=0.5)


def test_a_saved_and_reloaded_memory_gives_the_same_next_losses(tmp_path):
    torch.manual_seed(0)
    method, cond = method_for(Flow()), {"shift": torch.arange(12) % 4}
    nets = roles(LINE.denoiser(Flow()), STANDARD.denoiser(Flow()))
    nets, memory = {role: replace(net, call=shifted) for role, net in nets.items()}, {}
    batches = [Batch(draw(12, LINE), cond) for _ in range(12)]
    for batch in batches[:4]:
        method.student_loss(nets, replace(batch, memory=memory), 2)
    assert set(memory) == {"tscd_x", "tscd_k", "tscd_cond_shift"}
    save_file(memory, tmp_path / "memory.safetensors")
    again = load_file(tmp_path / "memory.safetensors")
    for batch in batches[4:]:
        values = [method.student_loss(nets, replace(batch, memory=kept), 2).value for kept in (memory, again)]
        assert values[0] == values[1] > 0


def test_gradients_reach_only_the_learner():
    torch.manual_seed(0)
    names = ("teacher", "student", "still")
    nets = {role: Denoiser(MLP(1, 16).double(), FLOW, "flow", call) for role in names}
    memory: dict[str, torch.Tensor] = {}
    loss = method_for(FLOW).student_loss(nets, Batch(draw(8, LINE), memory=memory), 2)
    assert not any(kept.requires_grad for kept in [*memory.values(), *loss.log.values()])
    loss.value.backward()
    reached = {role: [weight.grad is not None for weight in nets[role].network.parameters()] for role in names}
    assert all(reached["student"])
    assert not any(reached["teacher"] + reached["still"])


every_score = pytest.mark.parametrize("score", [DMD(), SiD(low_memory=False), SwiftBrush()], ids=lambda s: s.name)


@every_process
@every_score
def test_a_score_distillation_adds_its_own_gradient_per_pixel_in_the_last_stage(score, process):
    """Of one step, the student of the score distillation alone is the same network at the same level."""
    torch.manual_seed(0)
    method = method_for(process, segments=(2, 1), stage_steps=(1,), score=score, score_weight=3.0)
    alone = replace(score, init_ratio=method.init_ratio, input=method.input)
    nets = {role: Denoiser(MLP(3, 8).double(), process, "flow", call) for role in ("student", "fake")}
    nets |= {"teacher": SPACE.denoiser(process), "still": nets["student"]}
    batch, found = Batch(draw(6, SPACE)), {}
    for name, loss in {
        "jumps": partial(method.jump_loss, segments=1),
        "both": partial(method.student_loss, segments=1, scored=True),
        "score": alone.student_loss,
    }.items():
        torch.manual_seed(1)
        value = loss(nets, replace(batch, memory={})).value
        found[name] = value, torch.autograd.grad(value, list(nets["student"].network.parameters()))
    torch.testing.assert_close(found["both"][0], found["jumps"][0] + 3 * found["score"][0])
    for both, jumps, scored in zip(*(found[name][1] for name in ("both", "jumps", "score")), strict=True):
        torch.testing.assert_close(both - jumps, scored)  # 3 times it, over three pixels
        assert scored.abs().max() > 0


@every_score
def test_the_fake_network_learns_the_students_samples_by_the_score_distillations_own_loss(score):
    torch.manual_seed(0)
    method = method_for(FLOW, segments=(2, 1), stage_steps=(1,), score=score)
    alone = replace(score, init_ratio=method.init_ratio, input=method.input)
    nets = {role: Denoiser(MLP(3, 8).double(), FLOW, "flow", call) for role in ("student", "fake")}
    nets |= {"teacher": SPACE.denoiser(FLOW)}
    batch, values = Batch(draw(6, SPACE)), []
    for loss in (method.fake_loss, alone.fake_loss):
        torch.manual_seed(1)
        values.append(loss(nets, batch).value)
    torch.testing.assert_close(*values)
    assert len(torch.autograd.grad(values[0], list(nets["fake"].network.parameters()))) > 0


def test_a_score_distillation_has_its_turns_in_the_last_stage_alone():
    assert TSCD().roles == ()
    method = TSCD(stage_steps=(3, 2, 4), score=DMD(fake_updates=2))
    assert method.roles == ("fake",)
    turns = [[turn.role for turn in method.turns(step)] for step in range(12)]
    assert turns == [["student"]] * 9 + [["fake", "fake", "student"]] * 3
    asked = [cast(partial, list(method.turns(step))[-1].loss).keywords["scored"] for step in (8, 9)]
    assert asked == [False, True]


@pytest.mark.parametrize("foreign", [{"steps": 2}, {"init_ratio": 3.0}, {"clip_sample": True}, {"renoising": "ddim"}])
@pytest.mark.parametrize("kind", [DMD, SwiftBrush])
def test_what_the_score_distillation_has_no_say_in_is_refused(kind, foreign):
    (name,) = foreign
    with pytest.raises(ValueError, match=f"remove {name} from it"):
        TSCD(score=kind(**foreign))


def test_a_recipe_may_ask_for_a_score_distillation_in_the_last_stage():
    config = parse(Config, "digits_tscd", ["method.score={name: dmd, fake_updates: 2}", "method.score_weight=0.5"])
    assert isinstance(config.method, TSCD)
    assert (config.method.score, config.method.score_weight) == (DMD(fake_updates=2), 0.5)


def test_stages_follow_one_another_and_their_students_are_kept():
    method, kept = TSCD(stage_steps=(3, 2, 4)), []

    class Names(Remembered):
        def publish(self, name, net, sampler):
            kept.append((step, name, len(sampler.times)))

    nets, counts = {role: LINE.denoiser(Flow()) for role in ("student", "teacher")}, []
    for step in range(11):
        method.prepare(step, nets, Names())
        (turn,) = method.turns(step)
        counts.append(cast(partial, turn.loss).keywords["segments"])
    assert counts == [8] * 3 + [4] * 2 + [2] * 4 + [1] * 2
    assert kept == [(3, "segments_8", 8), (5, "segments_4", 4), (9, "segments_2", 2)]


@pytest.mark.parametrize("steps", [40, 16])
def test_students_of_a_table_call_the_network_where_the_trailing_ddim_of_the_teacher_does(steps):
    method = TSCD(teacher_steps=steps, segments=(8, 4), stage_steps=(1,))
    entries = [round(t * 999) for t in method.sampler(SCALED).times]
    stride = round(1000 / steps)
    assert entries == [stride * steps * k // 4 - 1 for k in (4, 3, 2, 1)]
    if steps == 40:
        assert entries == [round(t * 999) for t in teacher_grid(SCALED, 4)]


@pytest.mark.parametrize(
    ("process", "target", "ratio"), [(LINEAR, "eps", 12.0), (SCALED, "v", math.inf), (Flow(), "flow", math.inf)]
)
@pytest.mark.parametrize("segments", [4, 2, 1])
def test_exported_student_is_its_sampler(process, target, ratio, segments, tmp_path):
    network = tiny_unet(seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    denoiser = Denoiser(network, process, target, unet2d.call)
    method = TSCD(teacher_steps=16, segments=(segments,), stage_steps=(), init_ratio=ratio)
    method.check(denoiser)
    sampler = method.sampler(process)
    hosted = plan(denoiser, sampler, classes=None)
    assert hosted.steps == segments
    export(denoiser, sampler, hosted, tmp_path / "student", shape=(1, 8, 8), cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=(1, 8, 8), cond={}) < 1e-5


def test_check_names_what_a_teacher_lacks():
    TSCD().check(LINE.denoiser(Flow(), "flow"))
    TSCD(teacher_steps=8).check(LINE.denoiser(PROCESSES["vp"], "eps"))
    TSCD(input="sigma").check(LINE.denoiser(VE(), "edm"))
    with pytest.raises(ValueError, match="consistency function is not a posterior mean"):
        TSCD().check(LINE.denoiser(Flow(), "consistency"))
    with pytest.raises(ValueError, match=r"set method\.input=sigma"):
        TSCD().check(LINE.denoiser(VE(), "edm"))
    with pytest.raises(ValueError, match="at most the 9 entries"):
        TSCD().check(LINE.denoiser(PROCESSES["vp"], "eps"))


@pytest.mark.parametrize("process", [LINEAR, Flow(), Flow(shift=3.0), Trig()])
def test_check_of_an_eps_teacher_proposes_a_level_that_passes(process):
    with pytest.raises(ValueError, match=r"set method\.init_ratio=20 or less"):
        TSCD().check(LINE.denoiser(process, "eps"))
    TSCD(init_ratio=20.0).check(LINE.denoiser(process, "eps"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("segments", {"segments": (4, 4), "stage_steps": (1,)}),
        ("segments", {"segments": (2, 4), "stage_steps": (1,)}),
        ("segments", {"segments": ()}),
        ("segments", {"segments": (0,), "stage_steps": ()}),
        ("teacher_steps", {"teacher_steps": 36}),
        ("teacher_steps", {"teacher_steps": 0}),
        ("stage_steps", {"stage_steps": (100, 100)}),
        ("stage_steps", {"stage_steps": (100, 0, 100)}),
        ("init_ratio", {"init_ratio": 0.0}),
        ("huber_c", {"huber_c": 0.0}),
    ],
)
def test_impossible_hyper_parameters_are_refused(field, values):
    with pytest.raises(ValueError, match=field):
        TSCD(**values)


def learn(method: TSCD, nets: dict[str, Denoiser], steps: int, batch: int, dim: int, rate: float) -> None:
    """Adam at a rate that falls to zero as a cosine; the trainer's roles and memory by hand."""
    nets, memory = {**nets, "still": nets["student"]}, {}
    adam = torch.optim.Adam(nets["student"].network.parameters(), lr=rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for turn in method.turns(step):
            adam.zero_grad()
            turn.loss(nets, Batch(torch.randn(batch, dim), memory=memory)).value.backward()
            adam.step()


@pytest.mark.slow
def test_tscd_learns_the_map_of_a_mixture():
    """The exact map of one-dimensional noise keeps quantiles; the error is averaged over the noise."""
    torch.manual_seed(0)
    variances = torch.tensor([0.2, 0.5]).square().reshape(2, 1, 1)
    law = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), variances)
    student = Denoiser(MLP(1, 64), FLOW, "flow", call)
    method = TSCD(teacher_steps=32, segments=(4, 2, 1), stage_steps=(500, 500))
    learn(method, {"teacher": law.denoiser(FLOW), "student": student}, 2000, 256, 1, 3e-3)
    noise = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    exact = monotone_map(law.double(), FLOW, noise, torch.ones(2000), torch.zeros(2000))
    with torch.no_grad():
        found = method.sampler(FLOW)(student, noise.float())
    error = (found - exact).square().mean().sqrt()
    assert error < 0.25
