"""Memory and speed settings: they do what they say and change no value."""

import copy
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import UserCpuOffloadHook
from conftest import tiny_unet
from diffusers import DDPMScheduler
from families import BUILD, build
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.__main__ import main
from stepdistill.backbones import FAMILIES, unet2d
from stepdistill.backbones.conditioned import Conditioned
from stepdistill.bundled import bundled_configs
from stepdistill.config import Optimizer, Training
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.learners import check_learners, optimizer_of, tune
from stepdistill.methods import Batch, DisBack, SiD
from stepdistill.process import VP
from stepdistill.teacher import load_teacher
from stepdistill.trainer import Trainer

OTHERS = ("_long", "_text_", "_then_")
RECIPES = [name for name in bundled_configs() if name.startswith("digits_") and not any(o in name for o in OTHERS)]
SMALL = [
    "training.batch_size=4",
    "training.trackers=[]",
    "training.checkpoint_every=1",
    "evaluate=null",
    "training.preview_every=0",
]
LENGTHS = {
    "digits_tscd": ["steps=2", "method.segments=[2,1]", "method.stage_steps=[1]"],
    "digits_disback_sid": ["steps=4", "method.record_steps=2", "method.points=2", "method.switch_every=1"],
    "digits_disback_dmd": ["steps=4", "method.record_steps=2", "method.points=2", "method.switch_every=1"],
}


def student(folder, recipe, *overrides):
    """Weights of the student of a short run of the bundled ``recipe``."""
    length = LENGTHS.get(recipe, ["steps=2"])
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "distill",
                "--config",
                recipe,
                *SMALL,
                *length,
                f"output_dir={folder}",
                "training.preview_every=0",
                *overrides,
            ]
        )
    assert stopped.value.code == 0
    return load_file(folder / "student/unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_setting_of_memory_changes_a_method(recipe, teachers, tmp_path):
    compare(recipe, teachers("ddpm"), tmp_path, "training.gradient_checkpointing=true", "training.channels_last=true")


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_networks_are_the_same_networks(backend, teachers, tmp_path):
    compare("digits_sid", teachers("ddpm"), tmp_path, f"training.compile={backend}")


@pytest.mark.parametrize(
    ("setting", "roles"),
    [
        (None, set()),
        ("eager", {"teacher", "student", "fake", "target"}),
        ({"teacher": "eager"}, {"teacher"}),
        ({"fake": "eager", "target": "eager"}, {"fake", "target"}),
    ],
)
def test_the_roles_that_are_named_are_compiled_and_no_others(setting, roles, monkeypatch):
    """Both faces of a role that learns: the network that learns and its frozen twin."""
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, backend: seen.append((network, backend)))
    method = DisBack(method=SiD())
    assert {*method.roles, *method.frozen_roles} == {"fake", "target"}
    learners: dict[str, nn.Module] = {role: tiny_unet() for role in ("student", *method.roles)}
    teacher = Denoiser(tiny_unet(), VP(DDPMScheduler().alphas_cumprod), "eps", unet2d.call)
    told = Training.model_validate({"compile": setting})
    batches, accelerator = (lambda count: Batch(torch.randn(count, 1, 8, 8))), Accelerator(cpu=True)
    trainer = Trainer(method, teacher, learners, told, steps=1, batches=batches, accelerator=accelerator)
    faces = {role: {id(denoiser.network)} for role, denoiser in trainer.frozen.items()}
    for role, network in learners.items():
        faces[role].add(id(network))
    assert {id(network) for network, _ in seen} == set().union(*(faces[role] for role in roles))
    assert {backend for _, backend in seen} <= {"eager"}


def test_roles_to_compile_that_a_method_has_not_are_refused(teachers, tmp_path, capsys):
    told = [f"teacher={teachers('ddpm')}", f"output_dir={tmp_path / 'run'}", *SMALL]
    with pytest.raises(SystemExit):
        main(["distill", "--config", "digits_tbcm", *told, "training.compile={fake: inductor}"])
    assert "training.compile names ['fake']; the roles are ['student', 'teacher']" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def compare(recipe, teacher, folder, *settings):
    # Adam would make rounding noise of tiny gradients as large as any step.
    told = [
        f"teacher={teacher}",
        "training.optimizer={name: torch.optim.SGD, lr: 3.0e-3}",
        "training.role_optimizers={}",
    ]
    told += ["training.lr_schedule=constant", "training.lr_warmup_steps=0"]
    plain, tuned = student(folder / "plain", recipe, *told), student(folder / "tuned", recipe, *told, *settings)
    start = load_file(teacher / "unet/diffusion_pytorch_model.safetensors")
    moved = max((plain[key] - start[key]).abs().max().item() for key in start)
    assert moved > 1e-6
    for key in plain:
        torch.testing.assert_close(tuned[key], plain[key], atol=max(1e-6, 2e-3 * moved), rtol=0)


def kept(call):
    """What ``call`` gives, and the bytes that its graph keeps for the way back beside parameters."""
    seen = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            seen[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = call()
    return output, sum(seen.values())


def test_checkpointing_keeps_less_than_half_and_gives_the_same_gradients():
    plain, light = tiny_unet(), tiny_unet()
    tune(light, Training(gradient_checkpointing=True))
    x = torch.randn(16, 1, 8, 8)
    (one, much), (two, little) = (
        kept(lambda net=net: unet2d.call(net, x, torch.full((16,), 300.0), {})) for net in (plain, light)
    )
    assert little < much / 2
    one.sum().backward()
    two.sum().backward()
    for mine, theirs in zip(light.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILD)
def test_checkpointing_keeps_less_of_every_family_and_changes_no_value(name):
    torch.manual_seed(0)
    pipeline = BUILD[name]()
    kind = {"lcm": "StableDiffusionPipeline"}.get(name, type(pipeline).__name__)  # LCM's student, and its network
    family = next(family for family in FAMILIES if kind in family.pipelines)
    plain = pipeline.components[family.component]
    light = copy.deepcopy(plain)
    tune(light, Training(gradient_checkpointing=True))
    cond = told(family, plain)
    if family.embeds_guidance(plain.config):
        cond["guidance"] = torch.full((2,), 2.0)
    if family.classes(plain.config):
        cond["class_labels"] = torch.tensor([1, 2])
    channels, *_ = family.shape(plain.config)
    x, label = torch.randn(2, channels, 8, 8), torch.tensor([0.3, 0.8])
    (one, much), (two, little) = (kept(lambda net=net: family.call(net, x, label, cond)) for net in (plain, light))
    assert little < 0.8 * much
    torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)
    one.square().sum().backward()
    two.square().sum().backward()
    assert any(value.grad is not None and value.grad.any() for value in plain.parameters())
    for mine, theirs in zip(light.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "sd"])
def test_checkpointing_keeps_a_second_time_also_where_every_block_embeds_it(name):
    """BOOT's and FreeFlow's students; of copies too, and of the numbers of the call in progress."""
    torch.manual_seed(0)
    pipeline = BUILD[name]()
    family = next(family for family in FAMILIES if type(pipeline).__name__ in family.pipelines)
    plain = Conditioned(pipeline.components[family.component])
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    light = copy.deepcopy(plain)
    tune(light, Training(gradient_checkpointing=True))
    light = copy.deepcopy(light)
    cond = told(family, plain.network) | ({"class_labels": torch.tensor([1, 2])} if name == "dit" else {})
    x, label, target = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([100.0, 900.0])

    def call(network, shift=0.0):
        return family.call(network, x, label, {**cond, "target_label": target + shift})

    (one, much), (two, little) = (kept(lambda net=net: call(net)) for net in (plain, light))
    assert little < 0.8 * much
    torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)
    call(light, -50.0).sum()  # another call before the way back of this one
    one.square().sum().backward()
    two.square().sum().backward()
    for mine, theirs in zip(light.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    grads = {key: weight.grad for key, weight in light.named_parameters()}
    assert cast(Tensor, grads["embeddings.target_label.linear_2.weight"]).any()
    torch.testing.assert_close(
        family.call(light.folded(900.0), x, label, cond)[1], two[1].detach(), atol=1e-5, rtol=1e-4
    )


def test_convolutions_are_in_channels_last_order_also_behind_a_second_time():
    network = Conditioned(tiny_unet())
    tune(network, Training(channels_last=True, gradient_checkpointing=True))
    stock: Any = network.network
    assert stock.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert stock.mid_block.gradient_checkpointing


def test_an_optimizer_is_found_by_its_dotted_name_and_given_what_it_knows():
    network = tiny_unet()
    sgd = optimizer_of(Optimizer(name="torch.optim.SGD", lr=0.1, options={"momentum": 0.5}), network)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.1, 0.5)
    adam = optimizer_of(Optimizer(name="torch.optim.NAdam", betas=(0.3, 0.4), eps=1e-4), network)
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.3, 0.4), 1e-4)


def test_an_eight_bit_optimizer_learns_with_moments_of_a_byte_each():
    pytest.importorskip("bitsandbytes")
    network = nn.Linear(128, 64)
    before, adam = network.weight.detach().clone(), Optimizer(name="bitsandbytes.optim.AdamW8bit", lr=1e-2)
    optimizer = optimizer_of(adam, network)
    network(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    state = optimizer.state[network.weight]
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}
    torch.testing.assert_close(network.weight.detach(), before - 1e-2, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"name": "adamm"}}, "cannot import 'adamm'.*give adam, adamw or the dotted name"),
        ({"optimizer": {"name": "no.such.Adam"}}, "cannot import 'no.such.Adam'"),
        ({"role_optimizers": {"fake": {"name": "torch.nn.Linear"}}}, "no subclass of torch.optim.Optimizer"),
        ({"compile": "indctor"}, "no backend 'indctor'; there are .*inductor"),
        ({"compile": {"student": "inductor", "fake": "indctor"}}, "no backend 'indctor'; there are .*inductor"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_learners(tiny_unet(), Training.model_validate(settings), conditioned=False)


def test_an_optimizer_that_does_not_take_its_options_says_so():
    with pytest.raises(UserError, match=r"torch.optim.SGD does not take \{'momentun': 0.5\}"):
        optimizer_of(Optimizer(name="torch.optim.SGD", options={"momentun": 0.5}), tiny_unet())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_halves_its_memory_alone(dtype, teachers, tmp_path):
    """The student learns in float32 and ends near that of a teacher in float32; adapters are float32 too."""
    told = [f"teacher={teachers('ddpm')}", "training.lora.fake={rank: 2, targets: [to_q]}"]
    plain = student(tmp_path / "plain", "digits_sid", *told)
    half = student(tmp_path / "half", "digits_sid", *told, f"training.teacher_dtype={dtype}")
    apart = torch.cat([(half[key] - plain[key]).flatten() for key in plain]).abs()
    assert 0 < apart.max() < 2e-2
    assert all(value.dtype == torch.float32 for value in half.values())


@pytest.mark.parametrize("recipe", ["digits_sid", "digits_boot"])
def test_a_teacher_that_waits_on_the_cpu_gives_the_same_student(recipe, teachers, tmp_path, monkeypatch):
    sent, offload = [], UserCpuOffloadHook.offload
    monkeypatch.setattr(UserCpuOffloadHook, "offload", lambda hook: (sent.append(1), offload(hook)))
    compare(recipe, teachers("ddpm"), tmp_path, "training.offload_teacher=true")
    assert len(sent) == {"digits_sid": 4, "digits_boot": 2}[recipe], "after every turn"


def told(family, network):
    """Something to read of full length for two samples, all of it to be looked at."""
    shapes = family.told(network.config)
    return {key: torch.ones(2, *shape) if "mask" in key else torch.randn(2, *shape) for key, shape in shapes.items()}


def test_an_attention_backend_that_computes_the_same_changes_nothing(tmp_path):
    folder = build("flux", tmp_path / "flux")
    plain, other = (load_teacher(str(folder), resolution=16) for _ in range(2))
    check_learners(other.network, Training(attention="_native_math"), conditioned=False)
    tune(other.network, Training(attention="_native_math"))
    kinds = {
        str(module.processor._attention_backend) for module in other.network.modules() if "processor" in vars(module)
    }
    assert kinds == {"AttentionBackendName._NATIVE_MATH"}
    torch.manual_seed(0)
    x, t, cond = (
        torch.randn(2, *plain.sample_shape),
        torch.tensor([0.3, 0.8]),
        told(plain.family, plain.network) | {"guidance": torch.ones(2)},
    )
    torch.testing.assert_close(plain.denoiser(x, t, cond).x0, other.denoiser(x, t, cond).x0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flsh"}, "no backend 'flsh'; there are .*flash"),
        ({"attention": "flash"}, "UNet2DModel leaves no choice of attention"),
        ({"quantize_teacher": "int8", "lora": {"fake": {}}}, "adapters rest on it: remove training.lora of fake"),
        ({"offload_teacher": True, "lora": {"fake": {}}}, "need a teacher whose memory nobody shares"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_learners(tiny_unet(), Training.model_validate(settings), conditioned=False)
