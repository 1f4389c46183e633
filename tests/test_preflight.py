"""What a run is refused for before anything is written, tried on the real networks."""

from pathlib import Path

import pytest
import torch
import yaml
from plain_teachers import TABLE, Timed
from test_distill import run

from stepdistill import Plain

TBCM = {"name": "tbcm", "start_ratio": 5.0, "route_points": 2}
FREEFLOW = {"name": "freeflow", "init_ratio": 5.0}


class Unforward(torch.autograd.Function):
    """An operation with a backward but no forward mode, like a fused attention kernel."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0]


class Fused(Timed):
    def forward(self, x, label, class_labels=None):
        return Unforward.apply(super().forward(x, label, class_labels))


def teacher(network: type[Timed]) -> Plain:
    torch.manual_seed(6)
    return Plain(network(), process=TABLE, target="eps", shape=(1, 8, 8))


def fused() -> Plain:
    return teacher(Fused)


def timed() -> Plain:
    return teacher(Timed)


def recipe(folder: Path, kind: str, *methods, **training) -> str:
    values = {
        "teacher": f"python:{__file__}:{kind}",
        "output_dir": str(folder / "run"),
        "stages": [{"method": method, "steps": 1} for method in methods],
        "training": training,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("methods", "setting"),
    [
        ([{**TBCM, "jvp": "exact"}], "method.jvp=finite"),
        ([{**FREEFLOW, "derivative": "exact"}], "method.derivative=finite"),
        ([{**FREEFLOW, "input": "sigma"}, {**TBCM, "jvp": "exact"}], "method.jvp=finite"),
    ],
    ids=["tbcm", "freeflow", "a later stage"],
)
def test_a_network_without_forward_mode_is_refused_with_the_setting_that_helps(methods, setting, tmp_path, capsys):
    assert run(config=recipe(tmp_path, "fused", *methods)) == 2
    error = capsys.readouterr().err
    assert "no forward-mode derivative" in error
    assert f"set {setting}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("timed", {**TBCM, "jvp": "exact"}),
        ("timed", {**FREEFLOW, "derivative": "exact"}),
        ("fused", {**TBCM, "jvp": "finite"}),
        ("fused", FREEFLOW),
    ],
    ids=["tbcm exact", "freeflow exact", "tbcm finite", "freeflow finite"],
)
def test_the_same_run_trains_with_forward_mode_or_without_need_of_it(kind, method, tmp_path):
    assert run(config=recipe(tmp_path, kind, method)) == 0


def test_a_method_that_splits_its_batch_is_refused_a_batch_of_one(tmp_path, capsys):
    assert run("training.batch_size=1", config=recipe(tmp_path, "timed", FREEFLOW)) == 2
    assert "freeflow splits every batch, got 1 sample; set training.batch_size=2 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
