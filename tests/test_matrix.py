"""Every family by every method, whole networks and adapters: trained, resumed, exported, drawn without stepdistill."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import BUILD
from torch import nn

from stepdistill import outcome
from stepdistill.config import Config
from stepdistill.decoder import Decoder
from stepdistill.distill import Run
from stepdistill.errors import UserError
from stepdistill.methods import AnyMethod, Method
from stepdistill.process import VE, Flow
from stepdistill.report import grid
from stepdistill.sample import Sampling, sample
from stepdistill.teacher import Teacher, load_teacher

UNETS = {"unet-eps": "ddpm", "unet-v": "v", "unet-x0": "x0", "unet-flow": "flow", "unet-edm": "edm"}
UNETS |= {"unet-classes": "consistency", "unet-consistency": "cm"}
"""``UNet2DModel`` by what it predicts, under its name in ``conftest``."""
METHODS: dict[str, type[Method]] = {kind().name: kind for kind in get_args(AnyMethod)}
INF = float("inf")
SHORT: dict[str, Any] = {
    "teacher_steps": 4,
    "fake_updates": 1,
    "record_steps": 2,
    "points": 2,
    "switch_every": 1,
    "route_points": 3,
    "jvp": "finite",
    "segments": [2, 1],
    "stage_steps": [1],
}
"""What makes a method's phases short, by the name of the field in any method."""
SIZES = {"flux": 16, "flux-schnell": 16, "pixart-alpha": 16, "sana": 32}
"""Pixels of the pictures of those whose own are large."""


def settings(method: type[Method], teacher: Teacher, steps: int) -> dict[str, Any]:
    """Fields of ``method`` that are short, and that begin where ``teacher`` can."""
    target, fields = teacher.denoiser.target, {field.name for field in dataclasses.fields(method)}
    told = SHORT | {"steps": steps, "input": "sigma" if target == "edm" else "unit"}  # whose noise is louder than 1
    told |= dict.fromkeys(("init_ratio", "start_ratio"), 5.0 if target in ("eps", "v", "x0") else INF)
    told |= {"t_max": 0.7 if target == "eps" else 1.0}
    if "method" in fields:
        told["method"] = settings(METHODS["sid"], teacher, 1) | {"name": "sid"}
    return {key: value for key, value in told.items() if key in fields}


def config(teacher: Teacher, method: str, out: Path, steps: int, roles: tuple[str, ...]) -> Config:
    """Two updates of every role; those in ``roles`` learn adapters."""
    data: dict[str, Any] = {"resolution": SIZES.get(Path(teacher.source).name)}
    if teacher.family.encode is not None:
        data["prompts"] = ["a cat", "two dogs"]
    elif teacher.classes:
        data["class_labels"] = [1, 3]
    training = {"batch_size": 2, "checkpoint_every": 1, "log_every": 1, "trackers": [], "optimizer": {"lr": 1e-2}}
    training["lora"] = {role: {"rank": 2, "alpha": 4} for role in roles}
    told = {"name": method, **settings(METHODS[method], teacher, steps)}
    values = {"teacher": teacher.source, "output_dir": str(out), "method": told, "data": data, "training": training}
    made = Config.model_validate({**values, "steps": 1, "export": {"check": False}})
    return Config.model_validate({**made.dump(), "steps": made.plan[0].method.least_steps + 1})


def roles_of(method: type[Method]) -> tuple[str, ...]:
    """Those that can learn adapters: all but a student with an embedding of its own."""
    return (*(() if method.two_times else ("student",)), *method().roles)


def weights(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    networks: dict[str, nn.Module] = {"teacher": run.teacher.network, **run.trainer.learners}
    return {
        role: {name: value.detach().clone() for name, value in network.named_parameters()}
        for role, network in networks.items()
    }


@pytest.fixture
def plain_picture(monkeypatch):
    """Without axes and curves, which take as long as a short run."""

    def picture(path: Path, taught: torch.Tensor, learned: torch.Tensor, *rest: Any, **told: Any) -> None:
        grid(torch.cat([taught, learned])).save(path)

    monkeypatch.setattr(outcome, "picture", picture)


def card(folder: Path) -> str:
    """The lines of a card, for pictures as numbers."""
    (lines,) = re.findall(r"^## Use\n\n```python\n(.*?)\n```", (folder / "README.md").read_text(), re.M | re.S)
    lines = lines.replace(outcome.PLACE, str(folder)).replace(").images[0]", ', output_type="np").images[0]')
    return lines.replace('image.save("sample.png")', "")


def drawn(run: Run) -> torch.Tensor:
    """What the sampler of the training makes of the noise that the lines of a card draw from seed 1."""
    teacher = run.teacher
    torch.manual_seed(1)
    with torch.no_grad(), run.trainer.averaged_weights() as student:
        noise, cond = torch.randn(1, *teacher.sample_shape), run.data.cond([0])

        def later() -> torch.Tensor:
            return teacher.family.later_noise(torch.randn(1, *teacher.sample_shape))

        made = run.sampler(student, noise, cond, renoise=later)
    return (Decoder(teacher)(made) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


@pytest.fixture(scope="module")
def settings_of(folders, teachers, cache):
    """``settings_of(name)`` is the teacher of that name without its weights, read once."""
    read: dict[str, Teacher] = {}

    def get(name: str) -> Teacher:
        if name not in read:
            folder = teachers(UNETS[name]) if name in UNETS else folders(name)
            read[name] = load_teacher(str(folder), resolution=SIZES.get(name), weights=False)
        return read[name]

    return get


NAMES = [*BUILD, *UNETS]
ALIKE = {"sd-v", "sd3-without-t5", "pixart-alpha", "flux-schnell", "unet-v", "unet-x0", "unet-flow", "unet-classes"}
"""Of a network that another of these families has too, and of its way to load adapters, which are tested with it."""
ALL = [
    pytest.param(
        name,
        method,
        adapted,
        id=f"{name}-{method}{'-lora' * adapted}",
        marks=[pytest.mark.slow] if adapted and name in ALIKE else [],
    )
    for name in NAMES
    for method, kind in METHODS.items()
    for adapted in (False, True)
    if not adapted or roles_of(kind)
]


@pytest.mark.parametrize(("name", "method", "adapted"), ALL)
def test_a_student_of_every_family_by_every_method(
    name, method, adapted, settings_of, plain_picture, elsewhere, tmp_path
):
    """Adapters make two calls where the family hosts them, whole networks one.

    What cannot be is refused before anything is written.
    """
    teacher, kind = settings_of(name), METHODS[method]
    class_flow = bool(teacher.classes) and isinstance(teacher.denoiser.process, Flow)
    steps = 2 if adapted and not class_flow and not isinstance(teacher.denoiser.process, VE) else 1
    roles = roles_of(kind) if adapted else ()
    told = config(teacher, method, tmp_path / "run", steps, roles)
    if teacher.denoiser.target not in kind.targets:
        with pytest.raises(UserError, match=f"needs .*{teacher.denoiser.target}"):
            Run(told)
        assert not (tmp_path / "run").exists()
        return
    run = Run(told)
    before = weights(run)
    run.begin()
    run.train()
    ended = weights(run)
    check_moves(before, ended, roles)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == told.plan[0].steps
    assert all(math.isfinite(value) for row in rows for value in row.values())

    shutil.rmtree(sorted((tmp_path / "run/checkpoints").glob("step_*"))[-1])
    resumed = Run(told.model_copy(update={"resume": True}))
    resumed.resume()
    assert resumed.trainer.progress.step == told.plan[0].steps - 1
    resumed.train()
    for role, values in weights(resumed).items():
        assert all(torch.equal(value, ended[role][key]) for key, value in values.items()), role

    folder, expected = resumed.finish(), drawn(run)
    assert expected.std() > 0.01
    adapters = folder.with_name("student_lora")
    for place in (folder, adapters) if adapters.is_dir() else (folder,):
        torch.testing.assert_close(elsewhere(card(place), seed=1), expected, atol=1e-5, rtol=0)
    if not adapted and list(METHODS).index(method) == NAMES.index(name) % len(METHODS):  # once for every family
        sample(Sampling(source=str(folder)), tmp_path / "images", count=1)
        assert (tmp_path / "images/000000.png").is_file()


def check_moves(
    before: dict[str, dict[str, torch.Tensor]], after: dict[str, dict[str, torch.Tensor]], adapted: tuple[str, ...]
) -> None:
    """The teacher stays, of adapted roles all but the adapters, and every learner moves."""
    for role, values in before.items():
        still = {key: torch.equal(value, after[role][key]) for key, value in values.items()}
        if role == "teacher":
            assert all(still.values())
            continue
        assert not all(still.values()), role
        if role in adapted:
            assert all(same for key, same in still.items() if "lora_" not in key), role
