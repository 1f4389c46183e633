"""A teacher on a device of its own, on tensors that know their device and have no numbers."""

from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepdistill.__main__ import main
from stepdistill.backbones import unet2d
from stepdistill.backbones.conditioned import Conditioned
from stepdistill.config import Stage, Training
from stepdistill.denoiser import Denoiser, Guidance
from stepdistill.errors import UserError
from stepdistill.learners import check_machine
from stepdistill.methods import TBCM, AnyMethod, Batch, SiD
from stepdistill.preflight import check_teacher_device
from stepdistill.process import VP
from stepdistill.trainer import Trainer

PROCESS = VP(DDPMScheduler().alphas_cumprod)


def losses(kind, elsewhere=None, *, told=True):
    """Of a late step whose guided teacher is on another device, and is told so."""
    # Forward mode does not know on which device its tensors without numbers are.
    method = kind(jvp="finite") if kind is TBCM else kind()
    classes = {"class_labels": torch.ones(4, dtype=torch.long)}
    guidance = Guidance(2.0, {"class_labels": torch.zeros(1, dtype=torch.long)})
    with torch.device(elsewhere or "cpu"):
        network = tiny_unet(num_class_embeds=3)
    device = elsewhere if told else None
    teacher = Denoiser(network, PROCESS, "eps", unet2d.call, guidance=guidance, device=device)
    learners: dict[str, nn.Module] = {role: tiny_unet(num_class_embeds=3) for role in ("student", *method.roles)}
    if method.two_times:
        learners["student"] = Conditioned(learners["student"])
    batches, accelerator = (lambda count: Batch(torch.randn(count, 1, 8, 8), classes)), Accelerator(cpu=True)
    training = Training(batch_size=4)
    trainer = Trainer(method, teacher, learners, training, steps=10, batches=batches, accelerator=accelerator)
    return [loss(trainer.nets[role], batches(4)).value for role, loss, _ in method.turns(method.least_steps)]


@pytest.mark.parametrize("kind", get_args(AnyMethod), ids=lambda kind: kind.__name__)
def test_every_method_learns_from_a_teacher_on_another_device(kind, monkeypatch):
    losses(kind)  # what a method computes only once takes numbers
    monkeypatch.setattr(torch, "randperm", np.arange)  # drawn on the host
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert {loss.device.type for loss in losses(kind, "meta")} == {"cpu"}
        with pytest.raises(RuntimeError, match="same device"):
            losses(kind, "meta", told=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.teacher_device=cuda:99"], "training.teacher_device=cuda:99: "),
        (["training.teacher_device=gpu"], "training.teacher_device=gpu: "),
        (["training.teacher_device=cpu", "training.offload_teacher=true"], "remove it, or training.offload_teacher"),
        (["training.teacher_device=cpu", "training.lora.fake={}"], "adapters rest on it: remove training.lora of fake"),
    ],
)
def test_a_device_that_cannot_be_the_teachers_is_refused(settings, message, teachers, tmp_path, capsys):
    told = [f"teacher={teachers('ddpm')}", f"output_dir={tmp_path / 'run'}", "evaluate=null", *settings]
    with pytest.raises(SystemExit):
        main(["distill", "--config", "digits_sid", *told])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_have_a_teacher_each():
    with pytest.raises(UserError, match="a run of one process"):
        check_teacher_device("cpu", 2)
    check_teacher_device("cpu", 1)


def machine(**settings):
    """What ``check_machine`` says to one stage on the CPU."""
    check_machine([Stage(method=SiD(), steps=1, training=Training(**settings))], torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flex"}, "training.attention=flex does not work on this machine: FlexAttention"),
        ({"attention": "_native_cudnn"}, "training.attention=_native_cudnn does not work on this machine: No viable"),
        ({"compile": "openxla"}, "training.compile=openxla does not work on this machine: .*torch_xla"),
        ({"compile": {"fake": "openxla"}}, "training.compile=openxla does not work on this machine: .*torch_xla"),
    ],
)
def test_attention_and_compilers_that_cannot_run_here_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        machine(**settings)
    machine(attention="_native_math", compile={"teacher": "eager"})
