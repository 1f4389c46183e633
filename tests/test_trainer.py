"""The trainer: who moves, who does not, and that nothing is lost or silently wrong."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.backbones import conditioned, unet2d
from stepdistill.config import Optimizer, Training
from stepdistill.denoiser import Denoiser
from stepdistill.methods import BOOT, DMD, AnyMethod, Batch, FreeFlow, Loss, Method, SiD, Turn
from stepdistill.process import VP
from stepdistill.samplers import StudentSampler
from stepdistill.trainer import Diverged, Trainer

PROCESS = VP(DDPMScheduler().alphas_cumprod.double())
FRUGAL: dict[str, dict[str, Any]] = {
    "dmd": {"fake_updates": 1},
    "disback": {"record_steps": 2, "points": 2, "switch_every": 1, "method": DMD(fake_updates=1)},
    "boot": {"teacher_steps": 8},
    "tbcm": {"route_points": 3, "jvp": "finite", "warmup_steps": 0},
    "tscd": {"segments": (2, 1), "stage_steps": (1,), "teacher_steps": 4},
}
"""Of methods whose default takes many calls or steps, or begins slowly; the teacher predicts v, as suits them all."""
METHODS = [*(kind(**FRUGAL.get(kind().name, {})) for kind in get_args(AnyMethod)), SiD(low_memory=False)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def build(method, *, seed=0, steps=10, watch=lambda step, log: None, network=tiny_unet, **training):
    options = {"batch_size": 4, "optimizer": Optimizer(lr=1e-3), "ema_halflife_images": None, **training}
    teacher = Denoiser(network(), PROCESS, "v", unet2d.call)
    if not isinstance(method, Regression):
        method.check(teacher)
    networks = {role: copy.deepcopy(teacher.network) for role in ("student", *method.roles)}
    if method.two_times:
        networks["student"] = conditioned.Conditioned(network())
    torch.manual_seed(seed)
    return Trainer(
        method,
        teacher,
        networks,
        Training(**options),
        steps=steps,
        batches=lambda size: Batch(torch.randn(size, 1, 8, 8)),
        accelerator=Accelerator(cpu=True),
        watch=watch,
    )


def weights(module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


@pytest.mark.parametrize("method", [BOOT(t_max=0.7), FreeFlow(init_ratio=9.0)], ids=["boot", "freeflow"])
def test_a_student_that_is_told_a_target_time_learns_from_one_level_alone(method):
    """Jumps of theirs begin where noise enters and nowhere else, so there is no grid to run them on, see DESIGN.md."""
    trainer, begun, told = build(method), set(), set()

    def note(network, args, kwargs):
        begun.update(args[1].tolist())
        told.update(kwargs["target_label"].tolist())

    for network in (trainer.student, trainer.frozen["student"].network):
        network.register_forward_pre_hook(note, with_kwargs=True)
    trainer.step()
    start = torch.tensor(method.sampler(PROCESS).times)
    assert begun == {PROCESS.label(start).float().item()}
    assert len(told) > 4


def shadow(trainer):
    assert trainer.ema is not None
    return trainer.ema.shadow_params


@every_method
def test_frozen_roles_do_not_move_and_learners_do(method):
    trainer = build(method)
    teacher = weights(trainer.frozen["teacher"].network)
    for turn in method.turns(0):
        before = {role: weights(learner) for role, learner in trainer.learners.items()}
        value, _ = turn.loss(trainer.nets[turn.role], trainer.batches(4))
        value.backward()
        trainer._update(turn.role)
        # SiD's first student turn has fake = teacher, hence no gradient by definition; the fake turn ends that.
        for role, learner in trainer.learners.items():
            moved = not torch.equal(weights(learner), before[role])
            assert moved == (role == turn.role), f"{role} in the turn of {turn.role}"
    assert torch.equal(weights(trainer.frozen["teacher"].network), teacher)


@every_method
def test_frozen_twins_are_the_learners_memory_and_never_ask_for_gradients(method):
    trainer = build(method)
    trainer.step()
    for role, learner in trainer.learners.items():
        twin = trainer.frozen[role].network
        assert torch.equal(weights(twin), weights(learner))
        for mine, theirs in zip(twin.parameters(), learner.parameters(), strict=True):
            assert mine.data_ptr() == theirs.data_ptr()
            assert not mine.requires_grad
            assert theirs.requires_grad
            assert theirs.grad is None, "gradients are cleared after the turn"


def test_dropout_never_acts():
    trainer = build(SiD(), network=lambda: tiny_unet(dropout=0.5))
    modules = [net.network for nets in trainer.nets.values() for net in nets.values()]
    assert not any(module.training for network in modules for module in network.modules())


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """Student output at the batch's noise must be zero: deterministic given the batch."""

    paper: ClassVar = "none"
    name: Literal["regression"] = "regression"
    poison_step: int = -1

    def turns(self, step: int) -> Iterator[Turn]:
        def loss(nets, batch):
            t = torch.full((len(batch.noise),), 0.5, dtype=torch.float64)
            value = nets["student"](batch.noise, t).x0.square().mean()
            value = value * float("nan") if step == self.poison_step else value
            return Loss(value, {"regression": value.detach()})

        yield Turn("student", loss)

    def sampler(self, process):
        return StudentSampler(times=(0.5,))


def test_accumulated_micro_batches_are_one_large_batch():
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    # With a large eps Adam's first step is proportional to the gradient, rounding noise stays noise.
    plain = Optimizer(lr=1.0, eps=1.0)
    large, small = build(Regression(), optimizer=plain), build(Regression(), optimizer=plain, gradient_accumulation=4)
    start = weights(large.student)
    parts = iter(noise.split(2))
    large.batches, small.batches = lambda _: Batch(noise), lambda _: Batch(next(parts))
    large.step()
    small.step()
    moved = weights(large.student) - start
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(weights(small.student) - start, moved, atol=1e-5, rtol=1e-3)
    assert small.images_per_step == 16


@every_method
def test_frozen_networks_in_parts_teach_the_same(method):
    plain = Optimizer(lr=0.1, eps=1.0)
    whole, parts = build(method, optimizer=plain), build(method, optimizer=plain, frozen_batch_size=3)
    rows = []
    for role in parts.frozen:
        parts.frozen[role].network.register_forward_pre_hook(lambda network, given: rows.append(len(given[0])))
    start = weights(whole.student)
    for trainer in (whole, parts):
        torch.manual_seed(1)
        for _ in range(max(2, method.least_steps)):
            trainer.step()
    moved = weights(whole.student) - start
    assert moved.abs().max() > 1e-4
    assert max(rows) == 3
    assert (weights(parts.student) - weights(whole.student)).norm() < 1e-3 * moved.norm()


def test_gradient_is_clipped_to_the_global_norm():
    trainer = build(Regression(), max_grad_norm=1e-3, optimizer=Optimizer(lr=1.0))
    norms = []
    optimizer = trainer.optimizers["student"]
    step = optimizer.step
    optimizer.step = lambda: (
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.student.parameters()])),
        step(),
    )
    trainer.step()
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_average_has_the_half_life_asked_for_and_ramps_up():
    trainer = build(Regression(), ema_halflife_images=2.0, batch_size=4, steps=400)
    expected = None
    for step in range(1, 21):
        trainer.step()
        beta = 0.5 ** (4 / min(2.0, 0.05 * 4 * step))
        now = weights(trainer.student).double()
        # diffusers' EMAModel takes the weights as they are on its first step
        expected = now if expected is None else beta * expected + (1 - beta) * now
    averaged = torch.cat([p.flatten() for p in shadow(trainer)]).double()
    torch.testing.assert_close(averaged, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(averaged, weights(trainer.student).double())


def test_averaged_weights_are_lent_and_the_trained_ones_return_exactly():
    trainer = build(Regression(), ema_halflife_images=1000.0)
    for _ in range(5):
        trainer.step()
    before = weights(trainer.student)
    with trainer.averaged_weights() as student:
        assert torch.equal(weights(student.network), torch.cat([p.flatten() for p in shadow(trainer)]))
    assert torch.equal(weights(trainer.student), before)


@every_method
def test_resume_equals_the_uninterrupted_run_bit_for_bit(method, tmp_path):
    options = {"ema_halflife_images": 100.0, "lr_schedule": "cosine", "lr_warmup_steps": 2, "steps": 6}
    whole = build(method, **options)
    for step in range(5):
        if step == 3:
            whole.save(tmp_path)
        whole.step()
    after = torch.randn(3)
    resumed = build(method, seed=99, **options)
    resumed.load(tmp_path)
    assert resumed.progress.step == 3
    for _ in range(2):
        resumed.step()
    for role, learner in whole.learners.items():
        assert torch.equal(weights(resumed.learners[role]), weights(learner)), role
        assert torch.equal(weights(resumed.frozen[role].network), weights(learner)), role
        assert resumed.schedules[role].get_last_lr() == whole.schedules[role].get_last_lr()
        states = (t.optimizers[role].state_dict()["state"] for t in (resumed, whole))
        for mine, theirs in zip(*(state.values() for state in states), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for mine, theirs in zip(shadow(resumed), shadow(whole), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(torch.randn(3), after), "the random state continues too"


def test_n_steps_are_n_updates():
    seen = []
    trainer = build(Regression(), watch=lambda step, log: seen.append(step))
    assert list(trainer.run(7)) == list(range(1, 8))
    assert seen == list(range(1, 8))
    assert trainer.progress.step == 7


def test_nan_stops_at_its_step_and_names_the_term():
    seen = []
    trainer = build(Regression(poison_step=3), watch=lambda step, log: seen.append(step))
    with pytest.raises(Diverged, match=r"step 4: student/regression is nan"):
        list(trainer.run(10))
    assert seen == [1, 2, 3]


def test_weights_that_are_not_finite_are_seen_before_a_checkpoint():
    trainer = build(Regression())
    trainer.step()
    next(trainer.student.parameters()).data[0] = float("inf")
    with pytest.raises(Diverged, match="weights of student"):
        trainer.settle()


def test_a_request_to_stop_ends_after_the_step():
    trainer = build(Regression())
    for step in trainer.run(10):
        trainer.stop_requested = step == 2
    assert trainer.progress.step == 3


class _NoHostReads(TorchDispatchMode):
    """Fails where a device would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name, "a training step read a number on the host"
        assert "nonzero" not in name, name
        return func(*args, **(kwargs or {}))


@every_method
def test_a_training_step_never_waits_for_the_device(method):
    trainer = build(method, ema_halflife_images=100.0, max_grad_norm=1.0)
    trainer.step()
    with _NoHostReads():
        trainer.step()
    with pytest.raises(AssertionError, match="read a number"), _NoHostReads():
        torch.ones(1).item()


def test_every_role_may_have_its_own_optimizer():
    trainer = build(SiD(), role_optimizers={"fake": Optimizer(name="adamw", lr=5e-4, betas=(0.9, 0.99))})
    fake, student = (trainer.optimizers[role].optimizer for role in ("fake", "student"))
    assert isinstance(fake, torch.optim.AdamW)
    assert fake.defaults["lr"] == 5e-4
    assert not isinstance(student, torch.optim.AdamW)


def test_learning_rate_warms_up_and_decays():
    trainer = build(Regression(), lr_schedule="linear", lr_warmup_steps=2, steps=4)
    rates = []
    for _ in range(4):
        rates.append(trainer.schedules["student"].get_last_lr()[0])
        trainer.step()
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


def test_learning_rate_counts_steps_and_not_updates():
    trainer = build(SiD(fake_updates=3), lr_schedule="linear", steps=4)
    for _ in range(2):
        trainer.step()
    assert [trainer.schedules[role].get_last_lr()[0] for role in ("fake", "student")] == pytest.approx([5e-4, 5e-4])


def test_a_role_may_have_a_schedule_of_its_own():
    fake = Optimizer(lr=1e-3, lr_schedule="constant")
    trainer = build(SiD(), lr_schedule="linear", steps=4, role_optimizers={"fake": fake})
    for _ in range(2):
        trainer.step()
    assert [trainer.schedules[role].get_last_lr()[0] for role in ("fake", "student")] == pytest.approx([1e-3, 5e-4])


def test_every_micro_batch_and_repeated_turn_is_watched():
    values = iter([1.0, float("nan"), 3.0, 4.0])
    trainer = build(Regression(), gradient_accumulation=4)
    trainer.batches = lambda size: Batch(torch.full((size, 1, 8, 8), next(values)))
    with pytest.raises(Diverged, match="step 1: student/regression is nan"):
        list(trainer.run(1))


def test_bf16_runs_and_keeps_weights_and_losses_in_float32():
    logs = []
    teacher = Denoiser(tiny_unet(), PROCESS, "eps", unet2d.call)
    method = SiD()
    networks = {role: copy.deepcopy(teacher.network) for role in ("student", "fake")}
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(
        method,
        teacher,
        networks,
        Training(batch_size=4, mixed_precision="bf16"),
        steps=2,
        batches=lambda size: Batch(torch.randn(size, 1, 8, 8)),
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        watch=lambda step, log: logs.append(log),
    )
    kinds = set()
    trainer.student.conv_in.register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    before = weights(trainer.student)
    list(trainer.run(2))
    assert not torch.equal(weights(trainer.student), before)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert kinds == {torch.bfloat16}
    assert len(logs) == 2
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
