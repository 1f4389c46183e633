"""The one place where images may enter: the adversarial term, off unless a run asks for it."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_unet
from diffusers import AutoModel
from families import build
from oracles import PROCESSES, call
from test_distill import metrics, run
from torch import nn

from stepdistill.backbones import unet2d
from stepdistill.config import Config
from stepdistill.denoiser import Denoiser
from stepdistill.distill import Run
from stepdistill.errors import UserError
from stepdistill.methods import DMD, AnyMethod, Batch, DisBack, SiD, SwiftBrush
from stepdistill.methods._adversarial import Adversarial, adversarial_gradient, judging_loss
from stepdistill.process import VE, Flow
from stepdistill.teacher import settings_of


class Judge(nn.Module):
    """A network whose bottleneck is a linear map of its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x, label):
        return self.outer(self.inner(x))


def judge(process=None) -> Denoiser:
    return Denoiser(Judge(), process or Flow(), "flow", call, bottleneck=lambda network: network.get_submodule("inner"))


TIMES = torch.tensor([0.3, 0.6], dtype=torch.float64)


def by_hand(fake, x, eps, t, goal):
    """Cross-entropy of the bottleneck's channel mean, times the four pixels, averaged over the batch."""
    logit = fake.network.get_submodule("inner")(fake.process.add_noise(x, eps, t)).mean(1)
    signed = logit if goal else -logit
    return -4 * nn.functional.logsigmoid(signed).mean()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_losses_of_both_sides_are_those_by_hand(process, monkeypatch):
    fake = judge(process)
    x_g, real, eps = torch.randn(3, 2, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda like: eps)
    loss, entropy = judging_loss(fake, x_g, real, TIMES, {})
    made, taken = by_hand(fake, x_g, eps, TIMES, 0), by_hand(fake, real, eps, TIMES, 1)
    torch.testing.assert_close(entropy, 0.5 * (made + taken))
    from stepdistill.methods._shared import denoising_loss

    torch.testing.assert_close(loss, denoising_loss(fake, x_g, TIMES, {}))
    gradient, value = adversarial_gradient(fake, x_g, TIMES, {})
    leaf = x_g.clone().requires_grad_()
    expected = by_hand(fake, leaf, eps, TIMES, 1)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_an_undecided_judge_costs_ln_2_a_pixel():
    fake = judge()
    for parameter in fake.network.get_submodule("inner").parameters():
        nn.init.zeros_(parameter)
    samples = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(judging_loss(fake, samples, samples, TIMES, {})[1].item(), 4 * math.log(2))


def test_a_wrapped_unet_is_judged_by_its_middle_block():
    network = tiny_unet()
    wrapped = nn.Sequential()
    wrapped.add_module("module", network)
    assert unet2d.bottleneck(network) is network.mid_block
    assert unet2d.bottleneck(wrapped) is network.mid_block


@pytest.mark.parametrize("method", [SiD, DMD, SwiftBrush], ids=lambda kind: kind.__name__)
def test_the_student_is_judged_from_the_start_it_is_given(method):
    nets = {role: judge() for role in ("teacher", "student", "fake")}
    for role in ("teacher", "fake"):
        nets[role].network.requires_grad_(False)
    batch = Batch(torch.randn(2, 4, dtype=torch.float64), real=torch.randn(2, 4, dtype=torch.float64))
    asked = method(adversarial=Adversarial(start=3), init_ratio=2.0)
    for step in (2, 3):
        *_, (role, loss, _) = asked.turns(step)
        assert role == "student"
        assert ("looks_real" in loss(nets, batch).log) == (step == 3)


def test_its_gradient_adds_to_the_students_and_reaches_nobody_else():
    torch.manual_seed(0)
    nets = {role: judge() for role in ("teacher", "student", "fake")}
    nets["fake"] = copy.deepcopy(nets["teacher"])  # no score gradient: what arrives is the judge's
    for role in ("teacher", "fake"):
        nets[role].network.requires_grad_(False)
    batch = Batch(torch.randn(2, 4, dtype=torch.float64))
    found = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(1)
        method = DMD(adversarial=Adversarial(student_weight=weight), init_ratio=2.0)
        method.student_loss(nets, batch, judged=True).value.backward()
        found[weight] = [p.grad.clone() for p in nets["student"].network.parameters() if p.grad is not None]
        nets["student"].network.zero_grad()
        assert all(p.grad is None for role in ("teacher", "fake") for p in nets[role].network.parameters())
    assert all(not grad.any() for grad in found[0.0])
    assert any(grad.any() for grad in found[1.0])
    for half, whole in zip(found[0.5], found[1.0], strict=True):
        torch.testing.assert_close(2 * half, whole)


def test_methods_are_data_free_unless_asked():
    assert not any(kind().takes_images for kind in (SiD, DMD, SwiftBrush, DisBack))
    assert DisBack(method=SiD(adversarial=Adversarial())).takes_images
    with pytest.raises(ValueError, match="one pass to judge by"):
        SiD(adversarial=Adversarial(), fake_guidance=2.0).check(judge())
    with pytest.raises(ValueError, match="by which layer of the network to judge"):
        SiD(adversarial=Adversarial()).check(Denoiser(Judge(), VE(), "edm", call))


NAMES = [kind().name for kind in get_args(AnyMethod)]
DIGITS = {"images": "builtin:digits"}


def recipe(path, teacher, **settings):
    values = {"teacher": str(teacher), "output_dir": str(path / "run"), "steps": 2, **settings}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(path / "recipe.yaml")


def test_a_run_with_images_learns_from_both_sides(teachers, tmp_path):
    method = {"name": "sid", "adversarial": {"start": 1}}
    assert run(config=recipe(tmp_path, teachers(), method=method, real_data={"images": "builtin:digits"})) == 0
    first, second = metrics(tmp_path / "run")
    assert "fake/judging" in first
    assert "student/looks_real" not in first
    assert "student/looks_real" in second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"name": "sid", "adversarial": {}}}, "needs real_data.images"),
        *(({"method": {"name": name}, "real_data": DIGITS}, f"{name} takes no images") for name in NAMES),
        ({"method": {"name": "sid", "adversarial": {}}, "real_data": {"images": "wrong.npz"}}, "1x4x4"),
        ({"method": {"name": "sid", "adversarial": {}}, "real_data": {"images": "nowhere"}}, "nowhere"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_written(
    settings, message, teachers, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.savez("wrong.npz", np.zeros((5, 4, 4), dtype=np.uint8))
    assert run("steps=9999", config=recipe(tmp_path, teachers("v"), **settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


JUDGING = {"name": "dmd", "fake_updates": 1, "fake_guidance": 0, "adversarial": {}, "input": "unit"}


def guided(name: str, folder, out, file) -> dict:
    told = (
        {"class_labels": [3, 7], "null_label": 1000}
        if name in ("dit", "sit")
        else {"prompts": ["a cat", "a dog"], "negative_prompt": ""}
    )
    return {
        "teacher": str(folder),
        "output_dir": str(out),
        "steps": 2,
        "method": {**JUDGING, "init_ratio": 2.5},
        "data": told | ({"resolution": 32} if name == "sana" else {}),
        "real_data": {"images": str(file)},
        "training": {"batch_size": 2, "trackers": [], "log_every": 1},
        "export": {"check": False},
    }


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sana", "pixart", "dit", "sit"])
def test_students_of_latents_are_judged_beside_encoded_images_without_their_conditions(name, tmp_path):
    """By the middle block of a UNet, and by the layer before the output of a transformer."""
    folder = build(name, tmp_path / "teacher")
    config = Config.model_validate(guided(name, folder, tmp_path / "run", tmp_path / "images.npz"))
    size = settings_of(config).picture_size
    pictures = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pictures)
    made = Run(config)
    teacher = made.teacher
    vae = AutoModel.from_pretrained(str(teacher.folder), subfolder="vae").eval()
    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
        latents = encoded.latent if "latent" in encoded else encoded.latent_dist.mode()
    expected = (latents - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]
    torch.testing.assert_close(made.data.images, expected, atol=1e-4, rtol=1e-3)
    assert made.data.images is not None
    assert made.data.images.shape[1:] == teacher.sample_shape
    log = made.trainer.step()
    assert log["fake/judging"] > 0
    assert log["student/looks_real"] > 0


def test_images_have_no_prompts_to_be_judged_by(tmp_path):
    folder = build("sd", tmp_path / "teacher")
    settings = guided("sd", folder, tmp_path / "run", tmp_path / "images.npz")
    settings["method"]["fake_guidance"] = 1
    np.savez(tmp_path / "images.npz", np.zeros((2, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"images without prompts: let dmd judge them without, by fake_guidance=0"):
        Run(Config.model_validate(settings))
