"""DisBack: the recorded path, who teaches when, and that a switch really switches."""

import copy
import shutil
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast, get_args, get_type_hints

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import tiny_unet
from oracles import PROCESSES, call, cubature, gaussian
from safetensors.torch import load_file
from test_learning import FLOW, MLP
from test_score_methods import LABELLED, SCORE, constants
from test_sid import at
from test_trainer import weights
from torch import nn

from stepdistill.backbones import unet2d
from stepdistill.config import Config, Optimizer, Training
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods import DMD, AnyMethod, Batch, DisBack, SiD, SwiftBrush
from stepdistill.methods._score import ScoreDistillation
from stepdistill.process import VE
from stepdistill.recipe import parse
from stepdistill.snapshots import OnDisk, Remembered
from stepdistill.trainer import Trainer

SHORT = DisBack(record_steps=8, points=4, switch_every=3)
"""Recorded at 2, 4 and 6; points 3, 2, 1 teach for three steps each from 8 on, the teacher from 17 on."""
PATH = [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3


# The schedule


def test_every_method_of_the_family_may_follow_the_path():
    family = {kind for kind in get_args(AnyMethod) if issubclass(kind, ScoreDistillation)}
    assert set(get_args(get_type_hints(DisBack)["method"])) == family


def test_points_teach_from_the_student_back_to_the_teacher():
    assert [SHORT.target(step) for step in range(8, 20)] == PATH
    assert [DisBack().target(step) for step in (0, 99, 100, 199, 200, 499, 500, 10**6)] == [4, 4, 4, 4, 3, 1, 0, 0]


@pytest.mark.parametrize("inner", [DMD(fake_updates=2), SiD(), SwiftBrush(steps=2)])
def test_the_student_has_no_turn_while_the_path_is_recorded(inner):
    method = replace(SHORT, method=inner)
    for step in range(25):
        roles = [turn.role for turn in method.turns(step)]
        assert roles == ["fake"] * inner.fake_updates + (["student"] if step >= 8 else [])


def test_everything_else_is_the_methods_own():
    inner, process = DMD(steps=3, init_ratio=1.0), PROCESSES["flow"]
    assert replace(SHORT, method=inner).sampler(process) == inner.sampler(process)
    with pytest.raises(ValueError, match=r"data\.null_label"):
        replace(SHORT, method=DMD(eval_guidance=2.0)).check(gaussian(torch.zeros(1), torch.eye(1)).denoiser(process))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, r"points must be at least 2 .*, got 1"),
        ({"record_steps": 7}, "record_steps must be a positive multiple of points = 5, got 7"),
        ({"record_steps": 0}, "record_steps must be a positive multiple of points = 5, got 0"),
        ({"switch_every": 0}, "switch_every must be at least 1, got 0"),
    ],
)
def test_settings_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DisBack(**options)


# The path


class Mean(nn.Module):
    """``D(x) = mu s^2 / V + (v / V) x`` with ``v = s = 1``: a denoiser whose mean alone can learn."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([mu], dtype=torch.float64))

    def forward(self, x, label):
        return 0.5 * self.mu + 0.5 * x


def test_the_recorded_path_is_geometric_towards_the_student(monkeypatch):
    """Gradient descent by .2 shrinks ``mu - b`` by ``1 - 2 * .2 * (s^2 / V)^2 = .9`` a step."""
    process, b = VE(sigma_min=0.1, sigma_max=5.0), 0.5
    one = process.time_at_log_snr(torch.zeros(1, dtype=torch.float64)).item()
    method = DisBack(record_steps=10, points=5, method=DMD(fake_times=at(one), fake_updates=1))
    z, eps = cubature(2).split(1, dim=1)
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    means = {role: Mean(2.0 + b) for role in ("teacher", "fake", "target")}
    nets = {role: Denoiser(network, process, "x0", call) for role, network in means.items()}
    student = Denoiser(Mean(0.0), process, "x0", lambda network, x, label, cond: b + z)
    kept, mu = Remembered(), means["fake"].mu
    for step in range(10):
        method.prepare(step, nets, kept)
        for role, loss, _ in method.turns(step):
            assert role == "fake"
            (slope,) = torch.autograd.grad(loss({**nets, "student": student}, Batch(z)).value, mu)
            mu.data -= 0.2 * slope
    path = [2.0, *(kept.kept[f"target_{k}"]["mu"].item() - b for k in range(1, 5)), mu.item() - b]
    assert path == pytest.approx([2.0 * 0.81**k for k in range(6)], rel=1e-6)

    # right after a switch the student still equals the last target: the mismatch is (s^2 / V) |mu_i - mu_(i + 1)|
    method.prepare(10, nets, kept)
    led = replace(method, method=DMD(weight="one", student_times=at(one)))
    mu.data[:] = means["target"].mu + 0.3
    (turn,) = (turn for turn in led.turns(10) if turn.role == "student")
    gap = turn.loss({**nets, "student": student}, Batch(z)).log["score_gap"]
    assert gap.sqrt().item() == pytest.approx(0.5 * 0.3)


def test_a_recorded_network_teaches_under_the_guidance_it_was_recorded_with():
    """Its null branch is not on the path, so the teacher's own scale would leave it."""
    inner = DMD(weight="one", fake_guidance=1.0, eval_guidance=1.0)
    method, seen = replace(SHORT, method=inner), {}
    for step in (8, 17):
        nets = {"teacher": constants([0.1, 0.7], 3.0), "student": constants([0.0, 0.3])}
        nets |= {"fake": constants([0.2, 0.5]), "target": constants([0.15, 0.6])}
        (turn,) = (turn for turn in method.turns(step) if turn.role == "student")
        seen[step] = turn.loss(nets, Batch(torch.randn(4, 2, dtype=torch.float64), LABELLED)).log["score_gap"].item()
    assert seen[8] == pytest.approx((0.5 - 0.6) ** 2)
    assert seen[17] == pytest.approx((0.5 - (0.1 + 3 * 0.6)) ** 2)


# In the trainer


def build(method, folder=None, *, seed=0, network=None, size=4, **training):
    """A trainer on small networks of eight numbers; ``folder`` keeps the path on disk."""
    torch.manual_seed(5)
    network = network or MLP(8, 16)
    accelerator = Accelerator(cpu=True)
    teacher = Denoiser(network, FLOW, "flow", call)
    torch.manual_seed(seed)
    return Trainer(
        method,
        teacher,
        {role: copy.deepcopy(network).requires_grad_(True) for role in ("student", *method.roles)},
        Training(batch_size=size, **{"optimizer": Optimizer(lr=1e-2), "ema_halflife_images": 100.0, **training}),
        steps=20,
        batches=lambda count: Batch(torch.randn(count, 8)),
        accelerator=accelerator,
        snapshots=OnDisk(folder, accelerator) if folder else None,
    )


PROBE = torch.linspace(-1, 1, 24).view(3, 8)


def said(net: Denoiser) -> torch.Tensor:
    with torch.no_grad():
        return net(PROBE, torch.full((3,), 0.4, dtype=torch.float64)).x0


def taught(trainer: Trainer, steps: int, monkeypatch) -> list[Any]:
    """What the teacher of the student's turn says on a probe batch, step by step."""
    found: list[Any] = []

    def spy(method, nets, x_g, cond):
        found[-1] = said(nets["teacher"])
        return original(method, nets, x_g, cond)

    inner = cast(DisBack, trainer.method).method
    original = type(inner).gradient
    monkeypatch.setattr(type(inner), "gradient", spy)
    for _ in range(steps):
        found.append(None)
        trainer.step()
    return found


@pytest.mark.parametrize("kind", SCORE)
def test_every_switch_changes_the_teacher_to_the_recorded_network_and_ends_with_the_teacher(
    kind, monkeypatch, tmp_path
):
    trainer = build(replace(SHORT, method=kind(fake_updates=1)), tmp_path / "snapshots")
    found = taught(trainer, 20, monkeypatch)
    assert found[:8] == [None] * 8
    outputs = found[8:]
    stays = [torch.equal(before, after) for before, after in pairwise(outputs)]
    assert stays == [before == after for before, after in pairwise(PATH)], "the output changes at switches alone"
    fresh = Denoiser(MLP(8, 16), FLOW, "flow", call)
    for point, output in zip(PATH, outputs, strict=True):
        if point:
            fresh.network.load_state_dict(load_file(tmp_path / f"snapshots/target_{point}.safetensors"))
            assert torch.equal(output, said(fresh)), "the target is the checkpoint"
        else:
            assert torch.equal(output, said(trainer.frozen["teacher"]))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == SHORT.points


def test_targets_are_the_fake_networks_of_the_recorded_steps(tmp_path):
    trainer = build(SHORT, tmp_path / "snapshots")
    seen = {}
    for step in range(20):
        seen[step] = said(trainer.frozen["fake"])
        trainer.step()
    fresh = Denoiser(MLP(8, 16), FLOW, "flow", call)
    for point, step in ((1, 2), (2, 4), (3, 6)):
        fresh.network.load_state_dict(load_file(tmp_path / f"snapshots/target_{point}.safetensors"))
        assert torch.equal(said(fresh), seen[step])
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [
        f"target_{k}.safetensors" for k in (1, 2, 3)
    ]


def test_the_student_does_not_move_while_the_path_is_recorded_and_the_fake_network_does(tmp_path):
    trainer = build(SHORT, tmp_path / "snapshots")
    student, fake = (weights(trainer.learners[role]) for role in ("student", "fake"))
    teacher, target = (weights(trainer.frozen[role].network) for role in ("teacher", "target"))
    for _ in range(8):
        trainer.step()
    assert torch.equal(weights(trainer.student), student)
    assert not trainer.optimizers["student"].state
    assert not torch.equal(weights(trainer.learners["fake"]), fake)
    assert torch.equal(weights(trainer.frozen["target"].network), target)
    for _ in range(12):
        trainer.step()
    assert not torch.equal(weights(trainer.student), student)
    assert not torch.equal(weights(trainer.frozen["target"].network), target)
    assert torch.equal(weights(trainer.frozen["teacher"].network), teacher)
    assert not any(p.requires_grad for p in trainer.frozen["target"].network.parameters())


@pytest.mark.parametrize(
    ("inner", "at_step"), [(DMD(steps=2, fake_updates=1), k) for k in (2, 5, 8, 12, 18)] + [(SiD(), 12)]
)
def test_a_resumed_run_goes_back_along_the_same_path_bit_for_bit(inner, at_step, tmp_path):
    """Before, at the end of and after the recording, within a target and after the last one."""
    method = replace(SHORT, method=inner)
    whole = build(method, tmp_path / "whole")
    for step in range(20):
        if step == at_step:
            whole.save(tmp_path / "checkpoint")
            if (tmp_path / "whole").is_dir():
                shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        whole.step()
    resumed = build(method, tmp_path / "resumed", seed=99)
    resumed.load(tmp_path / "checkpoint")
    for _ in range(at_step, 20):
        resumed.step()
    for role in ("student", "fake"):
        assert torch.equal(weights(resumed.learners[role]), weights(whole.learners[role])), role
    if at_step < 17:  # later the teacher itself teaches, and no target is read again
        assert torch.equal(weights(resumed.frozen["target"].network), weights(whole.frozen["target"].network))


def test_a_network_that_holds_the_snapshot_is_not_read_again(tmp_path):
    kept, net = OnDisk(tmp_path, Accelerator(cpu=True)), Denoiser(MLP(8, 16), FLOW, "flow", call)
    kept.keep("a", net)
    kept.keep("b", replace(net, network=MLP(8, 16)))
    kept.put("b", net)
    first = weights(net.network)
    (tmp_path / "b.safetensors").unlink()
    kept.put("b", net)  # nothing to do
    assert torch.equal(weights(net.network), first)
    kept.put("a", net)
    assert not torch.equal(weights(net.network), first)
    with pytest.raises(UserError, match=r"cannot continue: .*b\.safetensors, a network that this run kept, is missing"):
        kept.put("b", net)


@pytest.mark.parametrize("disk", [True, False])
def test_a_snapshot_is_a_copy_and_every_weight_of_it_counts(disk, tmp_path):
    kept = OnDisk(tmp_path, Accelerator(cpu=True)) if disk else Remembered()
    net, other = (Denoiser(MLP(8, 16), FLOW, "flow", call) for _ in range(2))
    kept.keep("a", net)
    wanted = weights(net.network)
    for parameter in net.network.parameters():
        parameter.data.zero_()
    kept.put("a", other)
    assert torch.equal(weights(other.network), wanted)
    fewer, more = MLP(8, 16), MLP(8, 16)
    del fewer.layers[-1]
    more.layers.append(nn.Linear(8, 8))
    for network, reason in ((fewer, "Unexpected key"), (more, "Missing key"), (MLP(8, 17), "size mismatch")):
        with pytest.raises(RuntimeError, match=reason):
            kept.put("a", replace(net, network=network))


def test_a_missing_target_stops_the_run_with_its_file(tmp_path):
    trainer = build(SHORT, tmp_path / "snapshots")
    for _ in range(11):
        trainer.step()
    (tmp_path / "snapshots/target_2.safetensors").unlink()
    with pytest.raises(UserError, match=r"target_2\.safetensors"):
        trainer.step()


def test_a_path_of_unets_is_recorded_and_followed(tmp_path):
    torch.manual_seed(0)
    network, accelerator = tiny_unet(), Accelerator(cpu=True)
    method = DisBack(record_steps=2, points=2, switch_every=1, method=DMD(init_ratio=1.0, fake_updates=1))
    trainer = Trainer(
        method,
        Denoiser(network, FLOW, "flow", unet2d.call),
        {role: copy.deepcopy(network) for role in ("student", "fake")},
        Training(batch_size=2, optimizer=Optimizer(lr=1e-3)),
        steps=4,
        batches=lambda count: Batch(torch.randn(count, 1, 8, 8)),
        accelerator=accelerator,
        snapshots=OnDisk(tmp_path, accelerator),
    )
    assert list(trainer.run(4)) == [1, 2, 3, 4]
    saved = load_file(tmp_path / "target_1.safetensors")
    held = trainer.frozen["target"].network.state_dict()
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[key], held[key]) for key in saved)


# Configuration


def test_a_recipe_may_ask_for_disback_round_another_method(tmp_path):
    nested = "method={name: disback, points: 4, record_steps: 8, method: {name: sid, alpha: 1.2, steps: 2}}"
    config = parse(Config, "digits_sid", [nested])
    assert config.method == DisBack(points=4, record_steps=8, method=SiD(alpha=1.2, steps=2))
    config = parse(Config, "digits_sid", ["method={name: disback}", "method.method.name=swiftbrush"])
    assert config.method == DisBack(method=SwiftBrush())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.dump()))
    assert parse(Config, str(tmp_path / "again.yaml"), []) == config


def test_settings_without_a_name_are_those_of_the_default_method():
    config = parse(Config, "digits_sid", ["method={name: disback, method: {steps: 2}}"])
    assert config.method == DisBack(method=DMD(steps=2))


def test_settings_left_over_from_another_method_are_named():
    with pytest.raises(UserError) as caught:
        parse(Config, "digits_sid", ["method.name=disback", "method.method.name=dmd"])
    message = str(caught.value)
    assert "method.disback.alpha: unexpected key" in message
    assert "method.disback.low_memory: unexpected key" in message


@pytest.mark.parametrize(
    ("nested", "line"),
    [
        ("{name: dmd, eval_guidnce: 2}", "eval_guidnce: unexpected key, got 2; did you mean eval_guidance?"),
        ("{name: sid, alhpa: 1}", "alhpa: unexpected key, got 1; did you mean alpha?"),
        ("{name: swiftbrush, stpes: 2}", "stpes: unexpected key, got 2; did you mean steps?"),
        ("{name: dmd, steps: 0}", "steps must be at least 1, got 0"),
        ("{name: dmd, weight: vsd}", "must be 'adaptive', 'kl' or 'one', got 'vsd'"),
    ],
)
def test_a_mistake_in_the_nested_method_is_one_line_about_that_method(nested, line):
    with pytest.raises(UserError) as caught:
        parse(Config, "digits_sid", [f"method={{name: disback, method: {nested}}}"])
    message = str(caught.value)
    assert "1 invalid value\n" in message, message
    assert line in message


def test_an_unknown_nested_method_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        parse(Config, "digits_sid", ["method={name: disback, method: {name: boot}}"])
    assert "'boot'" in str(caught.value)
    assert any(name in str(caught.value) for name in ("'dmd'", "'sid'", "'swiftbrush'"))


INFINITE = ["{name: swiftbrush}", "{name: sid, init_ratio: .inf}", "{name: disback, method: {name: swiftbrush}}"]


@pytest.mark.parametrize("method", INFINITE)
def test_an_infinite_ratio_survives_the_dump(method, tmp_path):
    config = parse(Config, "digits_sid", [f"method={method}"])
    text = yaml.safe_dump(config.dump())
    assert "init_ratio: .inf" in text
    (tmp_path / "again.yaml").write_text(text)
    assert parse(Config, str(tmp_path / "again.yaml"), []) == config
