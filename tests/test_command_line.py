"""The command line: help at once, examples that parse, lists that are complete."""

import subprocess
import sys
import time
from typing import get_args

import pytest

from stepdistill.__main__ import main
from stepdistill.bundled import bundled_configs
from stepdistill.methods import AnyMethod

COMMANDS = ["distill", "teacher", "sample", "fid", "report", "configs", "methods"]


def output(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    return stopped.value.code, capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    code, printed = output(capsys, command, "--help")
    assert code == 0
    assert "example" in printed.out
    assert f"stepdistill {command}" in printed.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    script = f"import sys; sys.argv=['stepdistill', '{command}', '--help']\nimport stepdistill.__main__ as m\n"
    script += "try:\n    m.main()\nexcept SystemExit:\n    pass\n"
    script += "assert not {'torch', 'diffusers', 'matplotlib', 'pydantic'} & sys.modules.keys(), 'heavy import'"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.monotonic() - started < 5, "a second is the aim; five on a busy machine is certainly a heavy import"


def test_configs_lists_every_recipe_and_prints_one(capsys):
    code, printed = output(capsys, "configs")
    assert code == 0
    assert printed.out.split() == list(bundled_configs())
    code, printed = output(capsys, "configs", "digits_sid")
    assert printed.out == bundled_configs()["digits_sid"].read_text()
    code, printed = output(capsys, "configs", "nothing")
    assert code == 2
    assert "digits_sid" in printed.err


def test_methods_names_every_method_with_paper_and_teachers(capsys):
    code, printed = output(capsys, "methods")
    assert code == 0
    for method in get_args(AnyMethod):
        assert method.__name__ in printed.out
        assert method.paper in printed.out
    assert "eps, v, x0" in printed.out


def test_unknown_command_exits_with_2(capsys):
    code, printed = output(capsys, "destill")
    assert code == 2
    assert "distill" in printed.err


def test_a_reader_that_has_seen_enough_is_no_error():
    asked = f"{sys.executable} -m stepdistill methods | head -n 1"
    done = subprocess.run(asked, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BOOT")
    assert done.stderr == ""
