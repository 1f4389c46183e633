"""Roles that are adapters on the teacher's weights: who moves, what is shared, what is saved."""

import copy
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler
from families import BUILD
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_export import SCALED, SHAPE
from torch import nn

from stepdistill.backbones import unet2d
from stepdistill.backbones.conditioned import Conditioned
from stepdistill.config import Lora, Optimizer, Training
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.export import export, export_error
from stepdistill.hosting import plan
from stepdistill.lora import add_lora, check_lora, merged, plain_weights
from stepdistill.methods import AnyMethod, Batch, DisBack, Method, SiD, SwiftBrush
from stepdistill.methods._score import ScoreDistillation
from stepdistill.process import VE, VP, Flow
from stepdistill.snapshots import OnDisk
from stepdistill.trainer import Trainer

PROCESS = VP(DDPMScheduler().alphas_cumprod.double())
LORA = Lora(rank=4, alpha=8.0)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SCORE = [kind for kind in get_args(AnyMethod) if issubclass(kind, ScoreDistillation)]


def adapted(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A teacher and an adapted network whose adapters are not zero."""
    teacher = tiny_unet()
    network = add_lora(teacher, LORA, "fake")
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return teacher, network


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def said(network: nn.Module) -> torch.Tensor:
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.tensor([10.0, 400.0, 900.0]), return_dict=False)[0]


def build(method: Method, roles: tuple[str, ...], teacher=None, **options):
    """A trainer on a tiny UNet, ``roles`` of which are adapters."""
    teacher = teacher or Denoiser(tiny_unet(), PROCESS, "eps", unet2d.call)
    networks = {
        role: add_lora(teacher.network, LORA, role) if role in roles else copy.deepcopy(teacher.network)
        for role in ("student", *method.roles)
    }
    torch.manual_seed(0)
    return Trainer(
        method,
        teacher,
        networks,
        Training(batch_size=2, optimizer=Optimizer(lr=1e-2), ema_halflife_images=100.0),
        steps=20,
        batches=lambda size: Batch(torch.randn(size, *SHAPE)),
        accelerator=Accelerator(cpu=True),
        **options,
    )


def test_an_adapted_network_starts_as_the_teacher_in_the_teachers_memory():
    teacher = tiny_unet().requires_grad_(False)
    network = add_lora(teacher, LORA, "fake")
    assert torch.equal(said(network), said(teacher))
    mine = dict(network.named_parameters())
    shared = {name.replace(".base_layer", ""): p for name, p in mine.items() if "lora_" not in name}
    theirs = dict(teacher.named_parameters())
    assert shared.keys() == theirs.keys()
    for name, parameter in shared.items():
        assert parameter.data_ptr() == theirs[name].data_ptr()
        assert not parameter.requires_grad
    adapters = {name for name in mine if "lora_" in name}
    assert adapters
    assert all(mine[name].requires_grad for name in adapters)
    layers = {name.split(".lora_")[0] for name in adapters}
    wanted = {name.removesuffix(".weight") for name in theirs if name.removesuffix(".weight").endswith(ATTENTION)}
    assert layers == wanted
    assert len(layers) == 4 * 4, "every projection of the four attention layers"


def test_the_teacher_has_no_adapters_and_does_not_feel_those_of_others():
    teacher = tiny_unet()
    before, keys = said(teacher), list(teacher.state_dict())
    network = add_lora(teacher, LORA, "fake")
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    assert list(teacher.state_dict()) == keys
    assert torch.equal(said(teacher), before)
    assert not torch.allclose(said(network), before)


def test_only_adapters_receive_gradients():
    _, network = adapted()
    x = torch.randn(2, *SHAPE)
    network(x, torch.tensor([10.0, 400.0]), return_dict=False)[0].square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_the_adapters_count_alpha_over_rank():
    teacher, network = adapted()
    name, layer = next((name, module) for name, module in network.named_modules() if name.endswith("to_q"))
    layer, base = cast(Any, layer), cast(nn.Linear, teacher.get_submodule(name)).weight
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    x = torch.randn(5, base.shape[1])
    expected = x @ (base + 8.0 / 4 * b @ a).T + layer.get_base_layer().bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SCORE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("roles", [("fake",), ("fake", "student")], ids=str)
def test_steps_move_the_right_weights_and_leave_the_teacher_bit_identical(kind, roles):
    trainer = build(kind(init_ratio=1.0), roles)
    teacher = trainer.frozen["teacher"].network
    weights, output = state(teacher), said(teacher)
    before = {role: state(trainer.learners[role]) for role in ("student", "fake")}
    for _ in range(10 if kind is SwiftBrush else 2):
        trainer.step()
    assert same(state(teacher), weights)
    assert torch.equal(said(teacher), output)
    for role, learner in trainer.learners.items():
        moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[role][name])}
        if role in roles:
            assert moved == {name for name in before[role] if "lora_" in name}
        else:
            assert {name.split(".")[0] for name in moved} >= {"conv_in", "mid_block", "conv_out"}
        assert same(state(learner), state(trainer.frozen[role].network)), "the frozen twin follows"


@pytest.mark.parametrize("kind", SCORE, ids=lambda kind: kind.__name__)
def test_adapters_at_zero_give_no_gradient(kind):
    trainer = build(kind(init_ratio=1.0), ("fake",))
    loss = kind(init_ratio=1.0).student_loss(trainer.nets["student"], trainer.batches(2))
    loss.value.backward()
    grads = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    assert grads
    assert loss.log["score_gap"] == 0
    # SiD differentiates the two networks, whose passes backward round differently.
    assert max(grad.abs().max() for grad in grads) <= (1e-5 if kind is SiD else 0)


def test_an_adapter_that_moved_gives_a_gradient():
    trainer = build(SwiftBrush(init_ratio=1.0), ("fake",))
    trainer.step()
    loss = SwiftBrush(init_ratio=1.0).student_loss(trainer.nets["student"], trainer.batches(2))
    loss.value.backward()
    assert loss.log["score_gap"] > 0
    assert any(p.grad is not None and p.grad.count_nonzero() for p in trainer.student.parameters())


def test_one_copy_of_the_teacher_is_resident():
    """Teacher, adapter and the adapter's frozen twin are one memory; the student has its own, with its twin."""
    trainer = build(SwiftBrush(init_ratio=1.0), ("fake",))
    trainer.step()
    networks = [trainer.frozen["teacher"].network, trainer.learners["fake"], trainer.frozen["fake"].network]
    plain = [p for network in networks for name, p in network.named_parameters() if "lora_" not in name]
    size = sum(p.numel() for p in networks[0].parameters())
    assert sum(p.numel() for p in plain) == 3 * size
    assert sum({p.data_ptr(): p.numel() for p in plain}.values()) == size
    everything = {p.data_ptr(): p.numel() for net in trainer.frozen.values() for p in net.network.parameters()}
    adapters = sum(p.numel() for name, p in networks[1].named_parameters() if "lora_" in name)
    assert sum(everything.values()) == 2 * size + adapters
    optimizer = trainer.optimizers["fake"]
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == adapters


def test_no_weight_is_copied_on_the_way():
    teacher, copies = tiny_unet(), []
    original = copy.deepcopy

    def watched(value, *rest):
        found = original(value, *rest)
        if isinstance(found, nn.Module):
            copies.extend(p.data_ptr() for p in found.parameters())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "deepcopy", watched)
        network = add_lora(teacher, LORA, "fake")
    assert set(copies) == {p.data_ptr() for p in teacher.parameters()}
    assert said(network).shape == (3, *SHAPE)


@pytest.mark.parametrize("targets", [ATTENTION, ("conv1", "time_emb_proj"), ("conv_in", "to_q")], ids=str)
def test_a_merged_network_is_stock_and_computes_the_same(targets):
    teacher = tiny_unet()
    network = add_lora(teacher, Lora(rank=4, alpha=8.0, targets=targets), "fake")
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    before, weights = state(network), state(teacher)
    stock = merged(network)
    assert list(stock.state_dict()) == list(teacher.state_dict())
    assert [type(m) for m in stock.modules()] == [type(m) for m in teacher.modules()]
    torch.testing.assert_close(said(stock), said(network), atol=1e-5, rtol=1e-4)
    assert (said(stock) - said(teacher)).abs().max() > 1e-2
    assert same(state(network), before)
    assert same(state(teacher), weights)
    assert same(plain_weights(network), state(stock))


def test_a_network_without_adapters_is_merged_to_a_copy():
    network = tiny_unet()
    stock = merged(network)
    assert same(state(stock), state(network))
    assert not {p.data_ptr() for p in stock.parameters()} & {p.data_ptr() for p in network.parameters()}
    assert same(plain_weights(network), state(network))


def test_targets_that_name_no_layer_are_refused_with_those_that_exist():
    with pytest.raises(UserError) as caught:
        add_lora(tiny_unet(), Lora(targets=("to_q", "to_qkv", "nothing")), "fake")
    message = str(caught.value)
    assert message.startswith("training.lora.fake.targets: to_qkv, nothing matches no layer; the network has ")
    for layer in ("conv1", "conv_in", "linear_1", "time_emb_proj", "to_k", "to_out.0", "to_q", "to_v"):
        assert layer in message
    check_lora(tiny_unet(), Lora(targets=("attentions.0.to_q",)), "fake")
    with pytest.raises(UserError, match="o_q matches no layer"):
        check_lora(tiny_unet(), Lora(targets=("o_q",)), "fake")


@pytest.mark.parametrize("roles", [("fake",), ("fake", "student")], ids=str)
def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(roles, tmp_path):
    method = SwiftBrush(init_ratio=1.0)
    whole = build(method, roles)
    for step in range(4):
        if step == 2:
            whole.save(tmp_path)
        whole.step()
    resumed = build(method, roles)
    teacher = state(resumed.frozen["teacher"].network)
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.step()
    for role in ("student", "fake"):
        assert same(state(resumed.learners[role]), state(whole.learners[role]))
    assert same(state(resumed.frozen["teacher"].network), teacher)
    assert resumed.ema is not None
    assert whole.ema is not None
    assert all(map(torch.equal, resumed.ema.shadow_params, whole.ema.shadow_params))


def test_an_adapted_student_is_exported_as_a_stock_network(tmp_path):
    teacher, network = adapted()
    denoiser = Denoiser(network, SCALED, "eps", unet2d.call)
    sampler = SiD().sampler(SCALED)
    export(denoiser, sampler, plan(denoiser, sampler, classes=None), tmp_path / "student", shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond={}) < 1e-5
    saved = load_file(tmp_path / "student/unet/diffusion_pytorch_model.safetensors")
    assert saved.keys() == teacher.state_dict().keys()
    plain = replace(denoiser, network=teacher)
    assert export_error(plain, sampler, tmp_path / "student", shape=SHAPE, cond={}) > 1e-3


def test_a_path_of_adapters_is_kept_as_whole_networks(tmp_path):
    """DisBack's target is a plain network; what the adapted fake network was goes into it."""
    method = DisBack(record_steps=2, points=2, switch_every=1, method=SwiftBrush(init_ratio=1.0))
    trainer = build(method, ("fake",), snapshots=OnDisk(tmp_path, Accelerator(cpu=True)))
    trainer.step()
    recorded = said(trainer.frozen["fake"].network)
    for _ in range(3):
        trainer.step()
    target = trainer.frozen["target"].network
    assert load_file(tmp_path / "target_1.safetensors").keys() == target.state_dict().keys()
    torch.testing.assert_close(said(target), recorded, atol=1e-5, rtol=1e-4)
    assert not torch.equal(said(target), said(trainer.frozen["teacher"].network))


# Every method


TEACHERS = [
    Denoiser(tiny_unet(), SCALED, "eps", unet2d.call),
    Denoiser(tiny_unet(), SCALED, "v", unet2d.call),
    Denoiser(tiny_unet(), Flow(), "flow", unet2d.call),
    Denoiser(tiny_unet(), VE(), "edm", unet2d.call),
]


def accepted(method: Method) -> list[Denoiser]:
    """The teachers that a method can learn from."""
    found = []
    for teacher in TEACHERS:
        try:
            method.check(teacher)
        except ValueError:
            continue
        found.append(teacher)
    return found


class Memory(SiD):
    """SiD that counts its steps, and keeps a view that is not contiguous, in its memory."""

    def student_loss(self, nets, batch, *rest, **options):
        batch.memory["count"] = batch.memory.get("count", torch.zeros(())) + 1
        batch.memory["state"] = batch.memory.get("state", torch.ones(2, 3).T) + batch.noise.mean()
        return super().student_loss(nets, batch, *rest, **options)


@pytest.mark.parametrize("kind", get_args(AnyMethod), ids=lambda kind: kind.__name__)
def test_a_step_of_every_method_moves_its_learners_only(kind):
    method = kind()
    teachers = accepted(method)
    assert teachers, "no teacher pleases this method"
    for teacher in teachers[:: max(1, len(teachers) - 1)]:
        teacher = replace(teacher, network=copy.deepcopy(teacher.network))
        trainer = trainer_of(method, teacher)
        before = {role: state(net.network) for role, net in trainer.frozen.items()}
        learned = {turn.role for turn in method.turns(0)}
        trainer.step()
        for role, net in trainer.frozen.items():
            assert same(state(net.network), before[role]) == (role not in learned), f"{role}, {teacher.target}"
        trainer.settle()


def trainer_of(method: Method, teacher: Denoiser) -> Trainer:
    networks = {role: copy.deepcopy(teacher.network) for role in ("student", *method.roles)}
    if method.two_times:
        networks["student"] = Conditioned(tiny_unet())
    torch.manual_seed(0)
    return Trainer(
        method,
        teacher,
        networks,
        Training(batch_size=4, optimizer=Optimizer(lr=1e-3)),
        steps=10,
        batches=lambda size: Batch(torch.randn(size, *SHAPE)),
        accelerator=Accelerator(cpu=True),
    )


def test_memory_of_a_method_is_part_of_a_checkpoint(tmp_path):
    whole = trainer_of(Memory(), copy.deepcopy(TEACHERS[2]))
    for step in range(4):
        if step == 2:
            whole.save(tmp_path)
        whole.step()
    resumed = trainer_of(Memory(), copy.deepcopy(TEACHERS[2]))
    resumed.load(tmp_path)
    assert resumed.memory["count"] == 2
    for _ in range(2):
        resumed.step()
    assert resumed.memory["count"] == 4
    assert same(resumed.memory, whole.memory)
    assert same(state(resumed.student), state(whole.student))


def test_a_method_without_memory_writes_none(tmp_path):
    trainer = trainer_of(SiD(), copy.deepcopy(TEACHERS[2]))
    trainer.step()
    trainer.save(tmp_path)
    assert trainer.memory == {}
    assert not list(tmp_path.glob("memory*"))


def test_adapters_count_once_unless_alpha_says_otherwise():
    teacher = tiny_unet()
    for alpha, scale in ((None, 1.0), (12.0, 3.0)):
        network = add_lora(teacher, Lora(rank=4, alpha=alpha), "fake")
        layers: list[Any] = [module for module in network.modules() if tuner(module)]
        assert {layer.scaling["default"] for layer in layers} == {scale}


@pytest.mark.parametrize(
    ("family", "text"),
    [("sd3", {"add_q_proj", "add_k_proj", "add_v_proj"}), ("flux", {"add_q_proj", "to_add_out"}), ("sdxl", set())],
)
def test_without_targets_every_attention_is_adapted_that_of_the_text_too(family, text):
    network = BUILD[family]().components["unet" if family == "sdxl" else "transformer"]
    adapted = {name for name, module in add_lora(network, Lora(rank=2), "fake").named_modules() if tuner(module)}
    ends = {name.rpartition(".")[2] for name in adapted}
    assert ends >= {"to_q", "to_k", "to_v"} | text
    attention = [name for name, module in network.named_modules() if name.endswith(("to_q", "add_q_proj"))]
    assert set(attention) <= adapted
    assert not any("norm" in name or "ff" in name or "proj_in" in name for name in adapted)


def tuner(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)
