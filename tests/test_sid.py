"""SiD's equations against their closed forms on Gaussians, its memory, and its gradients' destinations."""

import copy
import weakref

import pytest
import torch
from oracles import SIGMA_DATA, TARGETS, Mixture, Targeted, call, cubature, gaussian
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepdistill.denoiser import Denoiser
from stepdistill.methods import Batch, SiD
from stepdistill.methods._shared import LogNormalTimes, RampTimes, UniformTimes, denoising_loss
from stepdistill.methods.sid import identity_loss
from stepdistill.process import VE, VP, Flow, Trig

EYE = torch.eye(3, dtype=torch.float64)
MEAN = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
COV = torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.3]], dtype=torch.float64)
SHIFT = torch.tensor([-0.3, 0.5, 0.9], dtype=torch.float64)
GAIN = torch.tensor([[0.6, 0.3, -0.1], [0.0, 0.9, 0.2], [0.1, -0.2, 0.4]], dtype=torch.float64)
LEVELS = {
    "vp": (VP(torch.tensor([0.99, 0.5, 0.1], dtype=torch.float64)), 0.6),
    "flow": (Flow(), 0.45),
    "ve": (VE(sigma_min=0.05, sigma_max=10.0), 0.5),
    "trig": (Trig(0.5), 0.7),
}
ALPHAS = (0.0, 0.5, 1.0, 1.2)

every_level = pytest.mark.parametrize(("process", "t"), LEVELS.values(), ids=LEVELS)
every_target = pytest.mark.parametrize("target", TARGETS)


def at(t: float) -> UniformTimes:
    """All times at ``t``, to nine digits."""
    return UniformTimes(low=t, high=t + 1e-10)


def level(process, t: float) -> tuple[float, float]:
    time = torch.tensor([t], dtype=torch.float64)
    return process.alpha(time).item(), process.sigma(time).item()


def expected_gradient(monkeypatch, method, process, teacher, student, critic=None):
    """The exact expectations of ``dL/db``, ``dL/dA`` and the logs for the generator ``A z + b``.

    The gradient is of second order in ``(z, eps)``, so a batch with exact moments has no sampling error.
    """
    gain, shift = student
    dim = len(shift)
    z, eps = cubature(2 * dim).split(dim, dim=1)
    critic = critic or gaussian(shift, gain @ gain.T)
    nets = {"teacher": teacher.denoiser(process), "fake": critic.denoiser(process)}
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    gradient, log = method.gradient(nets, z @ gain.T + shift, {})
    return gradient.sum(0), gradient.T @ z, log


def precisions(a, s, cov, gain):
    """``P`` and ``R``, the inverse covariances of the noised teacher and student."""
    eye = torch.eye(len(cov), dtype=torch.float64)
    return torch.linalg.inv(a**2 * cov + s**2 * eye), torch.linalg.inv(a**2 * gain @ gain.T + s**2 * eye)


@every_level
@every_target
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_on_gaussians_is_the_closed_form(monkeypatch, process, t, target, alpha):
    a, s = level(process, t)
    p, r = precisions(a, s, COV, GAIN)
    method = SiD(alpha=alpha, weight="one", student_times=at(t))
    teacher, critic = Targeted(gaussian(MEAN, COV), target), Targeted(gaussian(SHIFT, GAIN @ GAIN.T), target)
    grad_b, grad_a, log = expected_gradient(monkeypatch, method, process, teacher, (GAIN, SHIFT), critic)

    gap = SHIFT - MEAN
    torch.testing.assert_close(grad_b, s**4 * ((2 * alpha - 1) * r + 2 * (1 - alpha) * p) @ p @ gap)
    bracket = (r - p) @ p + p @ (r - p) + 2 * alpha * (r - p) @ (r - p)
    torch.testing.assert_close(grad_a, -(s**4) * bracket @ GAIN)
    c_f = torch.linalg.inv(r)
    fisher = s**4 * (p @ gap).square().sum() + (s**4 / a**2) * ((r - p) @ c_f @ (r - p)).trace()
    torch.testing.assert_close(log["score_gap"] * 3, fisher)
    torch.testing.assert_close(log["loss"], (1 - alpha) * fisher)


@every_level
def test_half_is_half_the_gradient_of_the_fisher_divergence(monkeypatch, process, t):
    a, s = level(process, t)
    p, _ = precisions(a, s, COV, GAIN)
    gain, shift = GAIN.clone().requires_grad_(), SHIFT.clone().requires_grad_()
    c_f = a**2 * gain @ gain.T + s**2 * EYE
    difference = torch.linalg.inv(c_f) - p
    fisher = s**4 * (p @ (shift - MEAN)).square().sum() + s**4 / a**2 * (difference @ c_f @ difference).trace()
    whole = torch.autograd.grad(fisher, (shift, gain))

    method = SiD(alpha=0.5, weight="one", student_times=at(t))
    grad_b, grad_a, _ = expected_gradient(monkeypatch, method, process, gaussian(MEAN, COV), (GAIN, SHIFT))
    torch.testing.assert_close((grad_b, grad_a), (whole[0] / 2, whole[1] / 2))


@every_level
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_vanishes_when_the_student_has_the_teachers_law(monkeypatch, process, t, alpha):
    gain = torch.linalg.cholesky(COV)
    method = SiD(alpha=alpha, weight="one", student_times=at(t))
    grad_b, grad_a, log = expected_gradient(monkeypatch, method, process, gaussian(MEAN, COV), (gain, MEAN))
    torch.testing.assert_close(grad_b, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_a, torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert log["score_gap"] < 1e-20


@pytest.mark.parametrize("alpha", ALPHAS)
def test_detached_networks_turn_sid_into_dmd_with_its_closed_form(alpha):
    process, t = LEVELS["trig"]
    a, s = level(process, t)
    p, r = precisions(a, s, COV, GAIN)
    z, eps = cubature(6).split(3, dim=1)
    x_g = (z @ GAIN.T + SHIFT).requires_grad_()
    x_t, a_s = a * x_g.detach() + s * eps, (torch.full((len(z), 1), value, dtype=torch.float64) for value in (a, s))
    a_s = tuple(a_s)
    real = gaussian(MEAN, COV).expectations(x_t, *a_s)[0]
    fake = gaussian(SHIFT, GAIN @ GAIN.T).expectations(x_t, *a_s)[0]
    (gradient,) = torch.autograd.grad(identity_loss(x_g, real, fake, alpha).sum(), x_g)
    torch.testing.assert_close(gradient, fake - real)
    torch.testing.assert_close(gradient.mean(0), s**2 * p @ (SHIFT - MEAN))
    torch.testing.assert_close(gradient.T @ z / len(z), s**2 * (p - r) @ GAIN)


def test_half_is_the_difference_of_two_errors_for_any_tensors():
    torch.manual_seed(0)
    x_g, real, fake = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    errors = [(prediction - x_g).square().sum((1, 2, 3)) for prediction in (real, fake)]
    torch.testing.assert_close(2 * identity_loss(x_g, real, fake, 0.5), errors[0] - errors[1])


class Constant(nn.Module):
    """A network that says the same of every state."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x, label):
        return self.value + 0 * x


@pytest.mark.parametrize(("alpha", "gap_terms"), [(0.0, 0.42), (0.5, 0.215), (1.0, 0.01), (1.2, -0.072)])
def test_single_sample_by_hand(monkeypatch, alpha, gap_terms):
    """``delta = (-.4, .5)`` and ``D_phi - x_g = (-.3, .6)``: .12 + .30 - alpha (.16 + .25), over mean|.| = .45."""
    process, t = Trig(), float(torch.asin(torch.tensor(0.6, dtype=torch.float64)) / (torch.pi / 2))
    x_g, eps, real, fake = torch.tensor([[[0.5, -1.0]], [[1.0, 0.25]], [[0.2, -0.4]], [[0.6, -0.9]]]).double()
    times = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(process.add_noise(x_g, eps, times), torch.tensor([[1.0, -0.65]]).double())
    nets = {
        role: Denoiser(Constant(value), process, "x0", call) for role, value in {"teacher": real, "fake": fake}.items()
    }
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    gradient, log = SiD(alpha=alpha, student_times=at(t)).gradient(nets, x_g, {})
    torch.testing.assert_close(log["loss"].item(), gap_terms / 0.45)
    torch.testing.assert_close(gradient, torch.tensor([[0.4, -0.5]]).double() / 0.45)


@pytest.mark.parametrize(("alpha", "turns_at"), [(1.2, 6.0), (1.5, 3.0)])
def test_spread_is_repelled_only_above_alpha_one_and_far_from_the_teacher(monkeypatch, alpha, turns_at):
    """In one dimension the gradient has the sign of ``(1 - alpha) / V_r + alpha / V_f`` where ``V_f > V_r``."""
    process, t = LEVELS["ve"]
    _, s = level(process, t)
    assert turns_at == pytest.approx(alpha / (alpha - 1))
    mean, v_r = torch.zeros(1, dtype=torch.float64), 1.5 * s**2

    def pull(weight, ratio):
        gain = torch.tensor([[(ratio * v_r - s**2) ** 0.5]], dtype=torch.float64)
        method = SiD(alpha=weight, weight="one", student_times=at(t))
        teacher = gaussian(mean, torch.tensor([[v_r - s**2]], dtype=torch.float64))
        return expected_gradient(monkeypatch, method, process, teacher, (gain, mean))[1].item()

    assert pull(alpha, 0.98 * turns_at) > 0 > pull(alpha, 1.02 * turns_at)
    assert pull(1.0, 1.02 * turns_at) > 0
    assert pull(1.0, 20.0) > 0


def test_mean_is_repelled_above_three_and_a_half_times_the_teachers_variance(monkeypatch):
    process, t = LEVELS["ve"]
    _, s = level(process, t)
    v_r, shift = 1.5 * s**2, torch.ones(1, dtype=torch.float64)
    teacher = gaussian(0 * shift, torch.tensor([[v_r - s**2]], dtype=torch.float64))

    def pull(alpha, ratio):
        gain = torch.tensor([[(ratio * v_r - s**2) ** 0.5]], dtype=torch.float64)
        method = SiD(alpha=alpha, weight="one", student_times=at(t))
        return expected_gradient(monkeypatch, method, process, teacher, (gain, shift))[0].item()

    assert pull(1.2, 3.43) > 0 > pull(1.2, 3.57)
    assert pull(1.0, 3.57) > 0


@every_level
def test_optimal_critic_of_a_gaussian_student_is_the_affine_one_and_least_squares_finds_it(process, t):
    """``K = a Q R``, ``c = s^2 R b``; least squares asks for second moments alone, which a cubature has exactly."""
    a, s = level(process, t)
    _, r = precisions(a, s, COV, GAIN)
    q, (z, eps) = GAIN @ GAIN.T, cubature(6).split(3, dim=1)
    x_g = z @ GAIN.T + SHIFT
    x_t = a * x_g + s * eps
    affine = torch.cat([a * q @ r, (s**2 * r @ SHIFT)[:, None]], 1)
    told = torch.cat([x_t, torch.ones(12, 1, dtype=torch.float64)], 1)
    critic = gaussian(SHIFT, q).denoiser(process)(x_t, torch.full((12,), t, dtype=torch.float64)).x0
    torch.testing.assert_close(critic, told @ affine.T)
    torch.testing.assert_close(torch.linalg.lstsq(told, x_g).solution.T, affine, rtol=0, atol=1e-10)


def test_residual_of_the_optimal_critic_is_uncorrelated_with_any_function_of_the_state():
    torch.manual_seed(0)
    law = Mixture(torch.tensor([0.3, 0.7]).double(), torch.stack([MEAN, SHIFT]), torch.stack([0.2 * COV, 0.4 * COV]))
    x_g = law.sample(200_000)
    x_t = 0.8 * x_g + 0.6 * torch.randn_like(x_g)
    levels = [torch.full((1, 1), value, dtype=torch.float64) for value in (0.8, 0.6)]
    probe = x_t.sin() + x_t.square()

    def mean_and_bound(critic):
        product = probe * (x_g - critic)
        return product.mean(0).abs(), 5 * product.std(0) / len(product) ** 0.5

    mean, bound = mean_and_bound(law.expectations(x_t, *levels)[0])
    assert bool((mean < bound).all())
    mean, bound = mean_and_bound(gaussian(SHIFT, 0.4 * COV).expectations(x_t, *levels)[0])
    assert bool((mean > bound).any())


class Table(nn.Module):
    """One affine network per level: the family that holds the optimal critic of a Gaussian student."""

    def __init__(self, labels: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.labels = labels
        self.weight = nn.Parameter(torch.zeros(len(labels), dim, dim + 1, dtype=torch.float64))

    def forward(self, x, label):
        weight = self.weight[(label[:, None] - self.labels).abs().argmin(1)]
        return torch.einsum("bij,bj->bi", weight, torch.cat([x, torch.ones_like(x[:, :1])], 1))


def minimise(loss: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Newton's step, which ends at the least value of a loss that is quadratic in ``weights``."""
    slope = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in slope]
    curvature = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    step = torch.linalg.solve(curvature, slope.detach()).split([weight.numel() for weight in weights])
    with torch.no_grad():
        for weight, part in zip(weights, step, strict=True):
            weight -= part.view_as(weight)


@every_level
@every_target
def test_denoising_loss_teaches_the_optimal_critic_through_every_target(monkeypatch, process, t, target):
    """The loss is quadratic in the table, so one Newton step from zero ends at its minimiser."""
    levels = torch.tensor([0.5 * t, t, 1.2 * t], dtype=torch.float64)
    z, eps = cubature(6).repeat(3, 1).split(3, dim=1)
    times, x_g = levels.repeat_interleave(12), z @ GAIN.T + SHIFT
    table = Table(process.label(levels), 3)
    fake = Denoiser(table, process, target, call, sigma_data=SIGMA_DATA)
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)

    minimise(denoising_loss(fake, x_g, times, {}), [table.weight])

    x_t = process.add_noise(x_g, eps, times)
    critic = gaussian(SHIFT, GAIN @ GAIN.T).denoiser(process)(x_t, times)
    torch.testing.assert_close(fake(x_t, times).x0, critic.x0, rtol=1e-8, atol=1e-8)


def networks(hidden: int = 16, depth: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Denoiser]:
    """A teacher and two different networks of its size, all trainable, under a rectified flow."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [layer for _ in range(depth) for layer in (nn.Linear(hidden, hidden), nn.Tanh())]
            self.layers = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), *layers, nn.Linear(hidden, 8))

        def forward(self, x, label):
            return self.layers(x + (label / 1000).to(x.dtype)[:, None])

    return {role: Denoiser(Net().to(dtype), Flow(), "flow", call) for role in ("teacher", "student", "fake")}


@pytest.mark.parametrize("process", [process for process, _ in LEVELS.values()], ids=LEVELS)
@pytest.mark.parametrize("law", ["uniform", "normal", "ramp"])
def test_times_of_a_batch_are_evenly_spread_quantiles_of_their_law(process, law):
    laws = {
        "uniform": UniformTimes(low=0.2, high=0.7),
        "normal": LogNormalTimes(mean=0.3, std=0.2),
        "ramp": RampTimes(low_ratio=0.5, high_ratio=2.5),
    }
    torch.manual_seed(0)
    t = laws[law].draw(process, torch.zeros(50, 2))
    ratio = process.sigma(t) / process.alpha(t)
    share = {
        "uniform": (t - 0.2) / 0.5,
        "normal": torch.special.ndtr((ratio.log() - 0.3) / 0.2),
        "ramp": (ratio ** (1 / 7) - 0.5 ** (1 / 7)) / (2.5 ** (1 / 7) - 0.5 ** (1 / 7)),
    }[law].sort()
    torch.testing.assert_close(share.values.diff(), torch.full((49,), 1 / 50, dtype=torch.float64))
    assert 0 <= share.values[0] < 1 / 50


def test_ramp_of_the_paper_ends_at_its_t_max():
    """Karras' ramp from 0.002 to 80 at 0.8 is 24.408, the highest level of SiD's generator."""
    ramp, paper = VE(), RampTimes(low_ratio=0.002, high_ratio=24.408)
    torch.manual_seed(0)
    t = paper.draw(ramp, torch.zeros(10_000, 2))
    torch.testing.assert_close(t.sort().values.diff(), torch.full((9_999,), 0.8e-4).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_turns_end_with_the_student_after_the_updates_of_the_fake_network(count):
    assert [role for role, *_ in SiD(fake_updates=count).turns(0)] == ["fake"] * count + ["student"]


def gradients(net: Denoiser) -> list[torch.Tensor]:
    """The gradients that have arrived at a network, cleared."""
    found = [parameter.grad for parameter in net.network.parameters() if parameter.grad is not None]
    net.network.zero_grad()
    return found


@pytest.mark.parametrize("weight", ["adaptive", "snr", "clean", "one"])
def test_two_phases_give_the_gradient_of_one_joint_backward_pass(weight):
    torch.manual_seed(0)
    nets, batch = networks(), Batch(torch.randn(16, 8, dtype=torch.float64))
    found = []
    for low_memory in (True, False):
        torch.manual_seed(1)
        loss = SiD(alpha=1.2, weight=weight, low_memory=low_memory).student_loss(nets, batch)
        loss.value.backward()
        found.append((loss.value.detach(), gradients(nets["student"])))

    torch.manual_seed(1)
    sigma = 0.714  # 2.5 / 3.5 at the nearest whole label
    level = torch.full((16,), sigma, dtype=torch.float64)
    x_g = sigma * batch.noise - sigma * nets["student"].network(sigma * batch.noise, 1000 * level)
    t = 0.02 + 0.96 * ((torch.arange(16, dtype=torch.float64) / 16 + torch.rand((), dtype=torch.float64)) % 1)
    x_t = (1 - t[:, None]) * x_g + t[:, None] * torch.randn_like(x_g)
    real, fake = (x_t - t[:, None] * nets[role].network(x_t, 1000 * t) for role in ("teacher", "fake"))
    weights = {
        "adaptive": 1 / (x_g - real).abs().mean(1, keepdim=True).detach(),
        "snr": (((1 - t) / t).square() + 1 / 0.5**2).sqrt()[:, None],
        "clean": (1 - t)[:, None],
        "one": 1.0,
    }
    loss = (weights[weight] * (real - fake) * (real - x_g - 1.2 * (real - fake))).sum(1).mean()
    loss.backward()
    joint = loss.detach(), gradients(nets["student"])
    torch.testing.assert_close(found[0], joint)
    torch.testing.assert_close(found[1], joint)


@pytest.mark.parametrize("low_memory", [True, False])
def test_each_loss_reaches_only_its_learner(low_memory):
    torch.manual_seed(0)
    method, nets, batch = SiD(low_memory=low_memory), networks(), Batch(torch.randn(4, 8, dtype=torch.float64))
    for role, loss, _ in method.turns(0):
        loss(nets, batch).value.backward()
        arrived = {other: gradients(net) for other, net in nets.items()}
        assert len(arrived.pop(role)) == len(list(nets[role].network.parameters()))
        assert not any(arrived.values())


def test_gradients_are_zero_until_the_critic_has_moved():
    torch.manual_seed(0)
    nets = networks()
    nets["fake"] = copy.deepcopy(nets["teacher"])
    SiD().student_loss(nets, Batch(torch.randn(4, 8, dtype=torch.float64))).value.backward()
    arrived = gradients(nets["student"])
    assert arrived
    for grad in arrived:
        torch.testing.assert_close(grad, torch.zeros_like(grad))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block, and so neither weights nor inputs, held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.update(self.storages((args, kwargs)))
        result = func(*args, **kwargs)
        for storage in self.storages(result):
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def storages(self, tree) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def release(self, count: int) -> None:
        self.live -= count


@pytest.mark.parametrize(("low_memory", "at_least", "at_most"), [(True, 0.9, 1.15), (False, 1.8, 3.3)])
def test_low_memory_holds_the_activations_of_one_network(low_memory, at_least, at_most):
    torch.manual_seed(0)
    nets, batch = networks(64, 40, torch.float32), Batch(torch.randn(1024, 8))
    for role in ("teacher", "fake"):
        nets[role].network.requires_grad_(False)
    with LiveBytes() as alone:
        t = torch.full((1024,), 0.5, dtype=torch.float64)
        nets["student"](batch.noise, t).x0.sum().backward()
    nets["student"].network.zero_grad()
    with LiveBytes() as step:
        SiD(low_memory=low_memory).student_loss(nets, batch).value.backward()
    assert at_least < step.peak / alone.peak < at_most
