"""An exported student is its sampler, in plain diffusers."""

import json
from typing import Any, cast

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from stepdistill.backbones import conditioned, unet2d
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.export import export, export_error
from stepdistill.hosting import one_step_map, plan
from stepdistill.methods import BOOT, SiD
from stepdistill.process import VE, VP, Flow, Trig
from stepdistill.samplers import StudentSampler

LINEAR = VP(DDPMScheduler().alphas_cumprod.double())
SCALED = VP(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double())
SHAPE = (1, 8, 8)

CASES = [
    (LINEAR, "eps"),
    (SCALED, "eps"),
    (SCALED, "v"),
    (SCALED, "x0"),
    (Flow(), "flow"),
    (Flow(shift=3.0), "flow"),
    (Flow(label_scale=1.0, reversed_label=True), "flow"),
    (VE(), "edm"),
    (VE(label_scale=250.0), "edm"),
    (Trig(), "v"),
]


def student(process, target, **options):
    network = tiny_unet(seed=3, **options)
    with torch.no_grad():  # move away from initial zeros so that every folded term matters
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Denoiser(network, process, target, unet2d.call, negated=process == Flow(1.0, 1.0, True))


@pytest.mark.parametrize(("process", "target"), CASES)
@pytest.mark.parametrize("scale", ["sigma", "unit"])
def test_exported_sid_student_is_its_sampler_for_every_process_and_target(process, target, scale, tmp_path):
    denoiser = student(process, target)
    sampler = SiD(input=scale).sampler(process)
    hosted = plan(denoiser, sampler, classes=None)
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond={}) < 1e-5


@pytest.mark.parametrize(
    ("process", "target", "t_max"),
    [(LINEAR, "eps", 0.7), (SCALED, "eps", 1.0), (SCALED, "v", 1.0), (Flow(), "flow", 1.0)],
)
def test_exported_boot_student_is_its_sampler_with_the_target_time_folded(process, target, t_max, tmp_path):
    denoiser = student(process, target)
    network = conditioned.Conditioned(cast(UNet2DModel, denoiser.network))
    torch.nn.init.normal_(cast(Any, network.embeddings["target_label"]).linear_2.weight, std=0.3)
    denoiser = Denoiser(network.eval(), process, target, unet2d.call)
    sampler = BOOT(t_max=t_max).sampler(process)
    hosted = plan(denoiser, sampler, classes=None)
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond={})
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond={}) < 1e-5


def test_class_conditional_student_is_its_sampler(tmp_path):
    denoiser = student(SCALED, "eps", num_class_embeds=4)
    sampler = SiD().sampler(SCALED)
    cond = {"class_labels": torch.tensor([0, 1, 2, 3])}
    hosted = plan(denoiser, sampler, classes=4)
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond=cond)
    assert export_error(denoiser, sampler, tmp_path / "student", shape=SHAPE, cond=cond) < 1e-5


def test_unit_input_keeps_the_teachers_table_and_the_weights(tmp_path):
    denoiser = student(SCALED, "eps")
    sampler = SiD(input="unit").sampler(SCALED)
    hosted = plan(denoiser, sampler, classes=None)
    assert hosted.label == 625
    export(denoiser, sampler, hosted, tmp_path / "student", shape=SHAPE, cond={})
    scheduler = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    betas = torch.tensor(scheduler["trained_betas"])
    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas[:626]
    torch.testing.assert_close(betas, expected, atol=2e-7, rtol=0)
    saved = load_file(tmp_path / "student/unet/diffusion_pytorch_model.safetensors")
    for name, weight in denoiser.network.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=1e-6, rtol=1e-5)


def test_one_step_map_of_sid_on_stable_diffusions_table():
    sampler = SiD().sampler(SCALED)
    a, s = (f(torch.tensor(sampler.times)).item() for f in (SCALED.alpha, SCALED.sigma))
    found = one_step_map(student(SCALED, "eps"), sampler)
    # x = s n, x0 = (x - s out) / a
    assert (found.direct, found.output, found.input, round(found.label)) == pytest.approx((s / a, -s / a, s, 625))


def test_the_check_of_the_export_can_fail(tmp_path):
    denoiser = student(SCALED, "eps")
    sampler = SiD().sampler(SCALED)
    export(denoiser, sampler, plan(denoiser, sampler, classes=None), tmp_path / "a", shape=SHAPE, cond={})
    other = StudentSampler(times=(0.5,))
    assert export_error(denoiser, other, tmp_path / "a", shape=SHAPE, cond={}) > 1e-2


def test_a_student_that_stock_diffusers_cannot_host_is_refused_before_training():
    denoiser = student(Flow(), "flow", num_class_embeds=4)
    with pytest.raises(UserError, match="class-conditional flow"):
        plan(denoiser, BOOT().sampler(Flow()), classes=4)
    with pytest.raises(UserError, match="2 steps"):
        plan(denoiser, StudentSampler(times=(0.9, 0.5)), classes=None)
