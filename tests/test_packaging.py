"""The wheel: what it carries, and that it works from an empty folder, where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent
CARRIED = {"stepdistill": "stepdistill", "configs": "stepdistill/_configs", "pipelines": "stepdistill/_pipelines"}
"""Folders of the checkout, and where the wheel puts them."""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the package; the environment provides what it depends on."""
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_carries_the_library_its_recipes_and_pipelines_and_nothing_else(wheel):
    expected = {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in CARRIED.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"stepdistill/py.typed", "stepdistill/_configs/digits_sid.yaml"} <= expected
    assert any(name.startswith("stepdistill/assets/") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_wheel_carries_its_licence_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"stepdistill = stepdistill.__main__:main" in archive.read(f"{info}/entry_points.txt")


def test_the_installed_command_finds_its_recipes_without_a_checkout(installed, tmp_path):
    def stepdistill(*arguments: str) -> str:
        return run("-m", "stepdistill", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    places = "print(b.__file__, *map(b.bundled, ('configs', 'pipelines', 'assets')), sep='\\n')"
    ask = f"import stepdistill.bundled as b; {places}"
    for place in run("-c", ask, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines():
        assert Path(place).is_relative_to(installed)
        assert Path(place).exists()
    assert "usage: stepdistill" in stepdistill("--help")
    assert "digits_sid" in {line.split()[0] for line in stepdistill("configs").splitlines() if line.strip()}
    assert stepdistill("configs", "digits_sid").strip() == (ROOT / "configs/digits_sid.yaml").read_text().strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", sorted((ROOT / "training/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_launch_files(file):
    load_config_from_file(str(file))
