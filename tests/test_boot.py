"""BOOT's equations on Gaussians, where the signal is known, and the target time of its student network."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DModel
from oracles import PROCESSES, Told, call, flow_map, gaussian
from torch import nn

from stepdistill.backbones import conditioned, unet2d
from stepdistill.denoiser import Denoiser, Target
from stepdistill.methods import BOOT, Batch
from stepdistill.methods.boot import signal_step
from stepdistill.process import VE, VP, Flow, InputScale, NoiseProcess, Trig
from stepdistill.samplers import ode_steps

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LAW = gaussian(MEAN, COV)
LINE_MEAN, LINE_VARIANCE = 0.7, 0.3
LINE = gaussian(*(torch.tensor(value, dtype=torch.float64) for value in ([LINE_MEAN], [[LINE_VARIANCE]])))

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_solver = pytest.mark.parametrize("solver", ["ddim", "heun"])
every_target = pytest.mark.parametrize("target", BOOT.targets)


def times(t: float, like: torch.Tensor) -> torch.Tensor:
    return like.new_full((len(like),), t)


def exact_signal(law, process: NoiseProcess, noise, start, t, scale: InputScale = "unit"):
    """``y_t = (x_t - sigma_t eps) / alpha_t`` of the ODE that leaves ``D(eps, start)`` at time ``start``."""
    first = law.denoiser(process)(process.student_input(noise, start, scale), start).x0
    x_t = flow_map(law, process, process.add_noise(first, noise, start), start, t)
    alpha, sigma = process.coefficients(t, noise)
    return (x_t - sigma * noise) / alpha


def log_ratio(process: NoiseProcess, t):
    return -0.5 * process.log_snr(t)


@every_process
def test_exact_signal_is_affine_in_the_noise_with_the_known_coefficients(process):
    """Per eigenvalue ``l``: ``B = ((v_t / v_T)(alpha_T b0 c + sigma_T) - sigma_t) / alpha_t``.

    Here ``b0 = alpha_T l / v_T^2`` and ``c`` is the scale of the first call's input: 1, or sigma_T for a VE teacher.
    """
    torch.manual_seed(0)
    scale = "sigma" if isinstance(process, VE) else "unit"
    noise = torch.randn(5, 2, dtype=torch.float64)
    start, t = times(0.98, noise), torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    (a_end, s_end), (a, s) = process.coefficients(start, noise), process.coefficients(t, noise)
    spread, axes = torch.linalg.eigh(COV)
    growth = ((a.square() * spread + s.square()) / (a_end.square() * spread + s_end.square())).sqrt()
    b0 = a_end * spread / (a_end.square() * spread + s_end.square())
    slope = (growth * (a_end * b0 * (s_end if scale == "sigma" else 1) + s_end) - s) / a
    offset = MEAN @ axes - growth * a_end.square() * b0 * (MEAN @ axes) / a
    expected = (offset + slope * (noise @ axes)) @ axes.T
    torch.testing.assert_close(exact_signal(LAW, process, noise, start, t, scale), expected, rtol=1e-10, atol=1e-10)


@every_process
@every_target
def test_signal_step_moves_along_the_signal_ode(process, target):
    """``signal_step`` is ``y - (1 - rho)(y - D)``, and ``y - D`` is the slope of the exact signal in ``lambda``."""
    torch.manual_seed(0)
    noise = torch.randn(5, 2, dtype=torch.float64)
    start, t = times(0.98, noise), torch.linspace(0.11, 0.93, 5, dtype=torch.float64)
    s, t_leaf = t - 0.02, t.clone().requires_grad_()
    y = exact_signal(LAW, process, noise, start, t_leaf)
    slope = torch.stack([torch.autograd.grad(y[:, k].sum(), t_leaf, retain_graph=True)[0] for k in (0, 1)], 1)
    by_lambda = slope / torch.autograd.grad(log_ratio(process, t_leaf).sum(), t_leaf)[0][:, None]
    step = signal_step(LAW.denoiser(process, target), y.detach(), noise, t, s, {}, "ddim")
    kept = (log_ratio(process, s) - log_ratio(process, t)).exp()[:, None]
    torch.testing.assert_close((y.detach() - step) / (1 - kept), by_lambda, rtol=1e-8, atol=1e-8)


@every_process
def test_ddim_step_of_the_signal_is_the_ddim_step_of_the_state(process):
    torch.manual_seed(0)
    noise, y = torch.randn(2, 4, 2, dtype=torch.float64)
    teacher, t, s = LAW.denoiser(process), 0.8, 0.55
    y_s = signal_step(teacher, y, noise, times(t, y), times(s, y), {}, "ddim")
    (step,) = ode_steps(teacher, process.add_noise(y, noise, times(t, y)), [t], end=s)
    torch.testing.assert_close(process.add_noise(y_s, noise, times(s, y)), step.x, rtol=1e-12, atol=1e-12)


def squared_residual(process: NoiseProcess, t: float, delta: float, solver, target: Target = "x0") -> float:
    """``E |y_s - step(y_t)|^2`` at the exact signal of the line; linear in the noise, so two points are the mean."""
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    start, now, then = times(0.98, noise), times(t, noise), times(t - delta, noise)
    y_t, y_s = (exact_signal(LINE, process, noise, start, time) for time in (now, then))
    step = signal_step(LINE.denoiser(process, target), y_t, noise, now, then, {}, solver)
    return (y_s - step).square().mean().item()


def leading_residual(process: NoiseProcess, t: float, delta: float, solver) -> float:
    """The same to leading order in ``h = d lambda``, for ``D(lambda)`` along the exact trajectory.

    DDIM: ``h^2 / 2 D'``.  Heun, whose second call is at a state ``h^2 / 2 D'`` off, where D has the slope
    ``k = l / (l + e^{2 lambda})``:  ``h^3 / 12 ((1 + 3 k) D' + D'')``.  Here ``D' = -l e^{2 lambda} / (l + e^{2
    lambda})^{3/2} xi`` and ``xi = (x_t - alpha_t m) / v_t``, constant along the trajectory.
    """
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    start, now = times(0.98, noise), times(t, noise)
    a, s = process.coefficients(now, noise)
    x_t = process.add_noise(exact_signal(LINE, process, noise, start, now), noise, now)
    xi = (x_t - a * LINE_MEAN) / (a.square() * LINE_VARIANCE + s.square()).sqrt()
    ends = log_ratio(process, torch.tensor([t, t - delta], dtype=torch.float64))
    h, level = (ends[0] - ends[1]).item(), ends[0].clone().requires_grad_()
    total = LINE_VARIANCE + (2 * level).exp()
    slope = -LINE_VARIANCE * (2 * level).exp() / total**1.5
    (bend,) = torch.autograd.grad(slope, level)
    share = LINE_VARIANCE / total
    residual = h**2 / 2 * slope if solver == "ddim" else h**3 / 12 * ((1 + 3 * share) * slope + bend)
    return (residual.square() * xi.square().mean()).item()


@every_process
@every_target
@every_solver
def test_floor_at_the_exact_signal_is_the_formula(process, target, solver):
    found = squared_residual(process, 0.61, 0.005, solver, target)
    assert found == pytest.approx(leading_residual(process, 0.61, 0.005, solver), rel=0.1, abs=0)


@pytest.mark.parametrize(
    ("solver", "floors"), [("ddim", (8.9e-5, 3.45e-4, 1.31e-3)), ("heun", (1.9e-9, 3.2e-8, 5.4e-7))]
)
def test_floors_of_the_cosine_process_are_the_specifications(solver, floors):
    """Of N(0.7, 0.3) from 0.98 at 0.6, over ``delta^2``, for delta = 0.01, 0.02 and 0.04."""
    for delta, known in zip((0.01, 0.02, 0.04), floors, strict=True):
        assert squared_residual(Trig(), 0.6, delta, solver) / delta**2 == pytest.approx(known, rel=0.03, abs=0)


@every_process
@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
def test_local_error_of_a_signal_step_has_the_order_of_its_solver(process, solver, order):
    coarse, fine = (squared_residual(process, 0.61, delta, solver) for delta in (0.02, 0.01))
    assert math.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.15)


TABLE = {"ddim": (0.456, 0.499, 0.522, 0.533), "heun": (0.500, 0.530, 0.540, 0.544)}


def chain_by_hand(steps: int, solver: str, start: float, end: float) -> float:
    """Standard deviation of the signal after ``steps`` steps for ``alpha = cos``, ``sigma = sin``, in plain numbers."""

    def level(t: float) -> tuple[float, float, float]:
        a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        return a, s, a * LINE_VARIANCE / (a * a * LINE_VARIANCE + s * s)

    std, t = level(start)[2], start
    for _ in range(steps):
        (a, s, slope), (a_next, s_next, slope_next) = level(t), level(t - (start - end) / steps)
        kept = s_next / a_next / (s / a)
        denoised = slope * (a * std + s)
        moved = kept * std + (1 - kept) * denoised
        ahead = slope_next * (a_next * moved + s_next)
        std = moved if solver == "ddim" else kept * std + (1 - kept) * (denoised + ahead) / 2
        t -= (start - end) / steps
    return std


@every_solver
@every_target
def test_chains_of_the_cosine_process_lose_the_known_spread(solver, target):
    """The specification's table for N(0.7, 0.3): 8, 16, 32 and 64 steps, whose limit is the exact 0.5455."""
    process, start, end = Trig(), 0.98, 0.0015
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    exact = exact_signal(LINE, process, noise, times(start, noise), times(end, noise))
    exact_std = ((exact[0] - exact[1]) / 2).item()
    teacher, errors = LINE.denoiser(process, target), []
    for steps, known in zip((8, 16, 32, 64), TABLE[solver], strict=True):
        grid = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        y = teacher(noise, times(start, noise)).x0
        for t, s in pairwise(grid):
            y = signal_step(teacher, y, noise, t.expand(2), s.expand(2), {}, solver)
        std = ((y[0] - y[1]) / 2).item()
        assert std == pytest.approx(chain_by_hand(steps, solver, start, end), abs=1e-11)
        assert std == pytest.approx(known, abs=1e-3)
        errors.append(exact_std - std)
    assert exact_std == pytest.approx(0.5455, abs=5e-4)
    assert math.log2(errors[2] / errors[3]) == pytest.approx({"ddim": 1, "heun": 2}[solver], abs=0.35)


class Chain(Told):
    """The discrete fixed point of BOOT: the teacher's own chain, from any time of the first interval downwards."""

    def __init__(self, method: BOOT, teacher: Denoiser) -> None:
        super().__init__()
        self.method, self.teacher = method, teacher

    def expectations(self, x, a, s, then):
        """The signal at time ``then`` as ``x0``, whatever the state."""
        method, (first,) = self.method, self.method.sampler(self.teacher.process).times
        start, noise = torch.full_like(then, first), x / s if method.input == "sigma" else x
        count = ((start - then) / method.delta).floor()
        now = then + count * method.delta
        y = signal_step(self.teacher, self.teacher(x, start).x0, noise, start, now, {}, method.solver)
        for k in range(int(count.max())):
            moved = signal_step(self.teacher, y, noise, now, (now - method.delta).clamp_min(0), {}, method.solver)
            on = k < count
            y, now = torch.where(on[:, None], moved, y), torch.where(on, now - method.delta, now)
        return y, (x - a * y) / s


@every_process
@every_solver
@pytest.mark.parametrize(
    ("target", "t_min", "t_max"),
    [("v", 0.0, 1.0), ("v", 0.06, 1.0), *((target, 0.0, 0.9) for target in BOOT.targets)],
)
def test_the_teachers_chain_is_a_fixed_point_with_zero_loss(process, solver, target, t_min, t_max):
    """Also where ``t_max`` lies between two entries of a DDPM table and the chain starts at the nearest one."""
    torch.manual_seed(0)
    scale = "sigma" if isinstance(process, VE) else "unit"
    method = BOOT(teacher_steps=7, solver=solver, t_min=t_min, t_max=t_max, input=scale)
    teacher = LAW.denoiser(process, target)
    nets = {"teacher": teacher, "student": Chain(method, teacher).denoiser(process, target)}
    batch = Batch(torch.randn(256, 2, dtype=torch.float64))
    assert method.student_loss(nets, batch).value < 1e-20
    nets["student"] = Chain(replace(method, teacher_steps=14), teacher).denoiser(process, target)
    assert method.student_loss(nets, batch).value > 1e-6


class TwoTimes(nn.Module):
    """A small network of the state, its label and the target label."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x, label, target_label):
        return self.layers(torch.cat([x, label[:, None] / 1000, target_label[:, None] / 1000], 1))


def test_loss_and_gradient_are_the_papers_equations_written_plainly():
    torch.manual_seed(0)
    method = BOOT(teacher_steps=8, boundary_weight=0.3, t_max=0.95)
    teacher, noise = LAW.denoiser(Flow(), "v"), torch.randn(12, 2, dtype=torch.float64)
    net = TwoTimes()
    nets = {"teacher": teacher, "student": Denoiser(net, Flow(), "flow", call)}
    torch.manual_seed(1)
    loss = method.student_loss(nets, Batch(noise)).value
    found = torch.autograd.grad(loss, list(net.parameters()))

    def student(z, t):
        start = torch.full_like(t, 0.95)
        return z - 0.95 * net(z, 1000 * start, 1000 * t)

    def denoise(x, t):
        return LAW.expectations(x, 1 - t[:, None], t[:, None])[0]

    def step(y, z, t, s):
        rho = (s * (1 - t) / (t * (1 - s)))[:, None]
        return rho * y + (1 - rho) * denoise((1 - t[:, None]) * y + t[:, None] * z, t)

    torch.manual_seed(1)
    delta = 0.95 / 8
    t = delta + (0.95 - delta) * torch.rand(12, dtype=torch.float64)
    residual = student(noise, t - delta) - step(student(noise, t), noise, t, t - delta).detach()
    z, start = noise[:3], torch.full((3,), 0.95, dtype=torch.float64)
    t_edge = (torch.full((12,), 0.95, dtype=torch.float64) - delta * torch.rand(12, dtype=torch.float64))[:3]
    edge = student(z, t_edge) - step(denoise(z, start), z, start, t_edge)
    plain = residual.square().mean() + 0.3 * edge.square().mean()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, list(net.parameters())))


def test_check_names_what_a_teacher_lacks():
    method = BOOT()
    method.check(LAW.denoiser(PROCESSES["vp"], "eps"))
    method.check(LAW.denoiser(Flow(), "flow"))
    with pytest.raises(ValueError, match="consistency function is not a posterior mean"):
        method.check(LAW.denoiser(Flow(), "consistency"))
    with pytest.raises(ValueError, match=r"set method\.input=sigma"):
        method.check(LAW.denoiser(PROCESSES["ve"], "edm"))
    BOOT(input="sigma").check(LAW.denoiser(PROCESSES["ve"], "edm"))


@pytest.mark.parametrize("process", [Flow(), Flow(shift=3.0), Trig()])
def test_check_of_an_eps_teacher_proposes_a_time_that_passes(process):
    teacher = LAW.denoiser(process, "eps")
    with pytest.raises(ValueError, match=r"set method\.t_max=0\.\d+ or less") as refused:
        BOOT().check(teacher)
    BOOT(t_max=float(str(refused.value).split("t_max=")[1].split()[0])).check(teacher)


@pytest.mark.parametrize(
    "values", [{"t_min": 0.5, "t_max": 0.5}, {"t_max": 1.1}, {"teacher_steps": 0}, {"boundary_fraction": 0.0}]
)
def test_impossible_hyper_parameters_are_refused(values):
    with pytest.raises(ValueError, match="|".join(values)):
        BOOT(**values)


def tiny_unet(classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()


CLASSES = pytest.mark.parametrize("classes", [None, 10])


def condition(classes: int | None, count: int) -> dict[str, torch.Tensor]:
    return {} if classes is None else {"class_labels": torch.arange(count) % classes}


@CLASSES
def test_target_time_network_starts_as_the_teacher(classes):
    torch.manual_seed(0)
    unet, cond = tiny_unet(classes), condition(classes, 4)
    student = conditioned.Conditioned(copy.deepcopy(unet))
    x, label = torch.randn(4, 1, 8, 8), torch.full((4,), 999.0)
    with torch.no_grad():
        told = unet2d.call(student, x, label, {**cond, "target_label": torch.tensor([0.0, 10.0, 500.0, 999.0])})
        torch.testing.assert_close(told, unet2d.call(unet, x, label, cond), rtol=0, atol=0)


ZERO_SNR = VP(torch.linspace(0.999, 0.0, 50, dtype=torch.float64))


@pytest.mark.parametrize(("process", "target"), [(Flow(), "flow"), (Flow(), "x0"), (Trig(), "v"), (ZERO_SNR, "v")])
def test_boundary_loss_is_zero_at_the_start_where_the_process_ends_in_pure_noise(process, target):
    torch.manual_seed(0)
    unet = tiny_unet()
    teacher = Denoiser(unet, process, target, unet2d.call)
    student = Denoiser(conditioned.Conditioned(copy.deepcopy(unet)), process, target, unet2d.call)
    log = BOOT().student_loss({"teacher": teacher, "student": student}, Batch(torch.randn(8, 1, 8, 8))).log
    assert log["boundary"] < 1e-11
    assert log["bootstrap"] > 1e-6


def trained_student(classes: int | None = None) -> conditioned.Conditioned:
    """A target-time network after a few BOOT steps under a flow."""
    torch.manual_seed(0)
    unet = tiny_unet(classes)
    network = conditioned.Conditioned(copy.deepcopy(unet))
    roles = {"teacher": unet, "student": network}
    nets = {role: Denoiser(net, Flow(), "flow", unet2d.call) for role, net in roles.items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        BOOT(teacher_steps=4).student_loss(nets, Batch(torch.randn(8, 1, 8, 8), condition(classes, 8))).value.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@CLASSES
def test_trained_network_hears_its_target_time_and_folds_into_a_stock_network(classes):
    network, cond = trained_student(classes), condition(classes, 4)
    x, label = torch.randn(4, 1, 8, 8), torch.full((4,), 1000.0)
    outputs = {}
    for target in (0.0, 700.0):
        outputs[target] = unet2d.call(network, x, label, {**cond, "target_label": torch.full((4,), target)})
        folded = network.folded(target)
        assert type(folded) is UNet2DModel
        assert folded.state_dict().keys() == tiny_unet(classes).state_dict().keys()
        torch.testing.assert_close(unet2d.call(folded, x, label, cond), outputs[target], rtol=1e-5, atol=1e-5)
    assert (outputs[0.0] - outputs[700.0]).abs().max() > 1e-3


def test_a_deep_copy_of_the_target_time_network_stands_alone():
    network = trained_student()
    twin = copy.deepcopy(network)
    x, label, cond = torch.randn(2, 1, 8, 8), torch.full((2,), 1000.0), {"target_label": torch.tensor([0.0, 600.0])}
    before = unet2d.call(network, x, label, cond)
    torch.testing.assert_close(unet2d.call(twin, x, label, cond), before, rtol=0, atol=0)
    for parameter in twin.parameters():
        parameter.add_(0.1)
    torch.testing.assert_close(unet2d.call(network, x, label, cond), before, rtol=0, atol=0)
    assert (unet2d.call(twin, x, label, cond) - before).abs().max() > 1e-3
    moved = {"target_label": torch.tensor([600.0, 0.0])}
    assert (unet2d.call(twin, x, label, moved) - unet2d.call(twin, x, label, cond)).abs().max() > 1e-4
