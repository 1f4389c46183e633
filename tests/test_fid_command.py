"""``stepdistill fid`` end to end."""

import json
import math
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill import results
from stepdistill.errors import UserError
from stepdistill.evaluation import Evaluator
from stepdistill.fid import main
from stepdistill.images import load_digits
from stepdistill.metrics.sources import load_images

COMMANDS = ("calc", "gen", "ref", "compare", "convert", "presets", "doctor")
SCRIPT = Path(__file__).parents[1] / "eval" / "fid.py"


@pytest.fixture
def half(tmp_path):
    path = tmp_path / "half.npz"
    np.savez(path, load_digits()[0][::2, 0].numpy())
    return str(path)


def run_script(monkeypatch, *arguments, script=SCRIPT):
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code


def test_json_is_one_object_with_the_evaluators_numbers(half, capsys):
    assert main(["calc", half, "builtin:digits", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    expected = Evaluator("builtin:digits").score(load_images(half))["fid"]
    assert result["metrics"].keys() == {"fid"}
    found = result["metrics"]["fid"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-9)
    assert found["se"] == pytest.approx(expected.se, rel=1e-7)
    assert found["debiased"] == pytest.approx(expected.debiased, rel=1e-7)
    assert found["n"] == 899
    assert (result["images"], result["reference"]) == (half, "builtin:digits")
    assert result["protocol"]["name"] == "digits, samples=899"
    assert len(result["weights"]["digits"]) == 64
    assert found["n_ref"] == 1797
    assert result["precision"] == {"images": "uint8", "features": {"dtype": "float64", "tf32": False}}
    assert result["seconds"].keys() == {"reference", "generation", "features", "distance"}
    assert result["versions"]["torch"] == version("torch")
    assert result["versions"].keys() == {"python", "stepdistill", "torch", "numpy", "pillow"}
    assert err == ""


def test_the_table_is_short_and_has_the_same_numbers(half, capsys):
    main(["calc", half, "builtin:digits"])
    head, row, protocol = capsys.readouterr().out.splitlines()
    expected = Evaluator("builtin:digits").score(load_images(half))["fid"]
    assert head.split() == ["metric", "value", "+-", "se", "debiased", "n"]
    assert expected.se
    places = 1 - math.floor(math.log10(expected.se))
    numbers = [f"{expected.value:.{places}f}", "+-", f"{expected.se:.{places}f}", f"{expected.debiased:.{places}f}"]
    assert row.split() == ["fd-digits-v1", *numbers, "899"]
    assert protocol.startswith("protocol digits, samples=899 (")


@pytest.mark.parametrize(
    ("value", "se", "said"),
    [
        (1.23456, 0.00214, "1.2346 +- 0.0021"),
        (123.4, 17.2, "123 +- 17"),
        (0.000123456, 0.0000021, "0.0001235 +- 0.0000021"),
        (0.31415926, None, "0.3142"),
        (-1e-13, 1e-13, "0.0000 +- 0.0000"),
    ],
)
def test_a_value_is_shown_to_two_digits_of_its_error(value, se, said):
    assert results.shown(value, se) == said


def test_every_command_prints_one_object_where_it_is_asked_to(half, tmp_path, capsys):
    def told(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = told("ref", half, "--preset", "digits", "--metrics", "kid", "--count", 500, "--out", tmp_path / "ref.npz")
    assert (made["kinds"]["fid"]["n"], made["metrics"], made["left_out"]) == (500, ["kid"], [])
    found = told("calc", half, tmp_path / "ref.npz", "--preset", "digits", "--metrics", "kid,prdc,fid")["metrics"]
    assert {each["n_ref"] for each in found.values()} == {500}
    assert told("convert", tmp_path / "ref.npz", tmp_path / "ref.pt")["kinds"]["fid"]["dimension"] == 80
    assert told("presets")["presets"][0]["name"] == "edm-cifar10"
    assert told("presets", "digits")["fields"]["extractor"] == "digits"
    assert {row["kind"] for row in told("doctor")["rows"]} == {"weights", "version", "test"}


def test_few_samples_have_no_debiased_value(tmp_path, capsys):
    np.savez(tmp_path / "few.npz", load_digits()[0][:399, 0].numpy())  # The metric has 80 dimensions; 5 d is 400.
    main(["calc", str(tmp_path / "few.npz"), "builtin:digits"])
    assert "n/a" in capsys.readouterr().out
    main(["calc", str(tmp_path / "few.npz"), "builtin:digits", "--json"])
    assert json.loads(capsys.readouterr().out)["metrics"]["fid"]["debiased"] is None


def test_a_set_is_at_zero_from_itself_without_a_minus_sign(half, capsys):
    main(["calc", half, half, "--preset", "digits"])
    assert re.fullmatch(r"0\.0+", capsys.readouterr().out.splitlines()[1].split()[1])


def test_the_script_is_the_command(half, monkeypatch, capsys):
    assert run_script(monkeypatch, "calc", half, "builtin:digits", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fid"]["n"] == 899


def test_the_other_scripts_make_a_reference_and_sample(half, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "ref.npz")
    told = (half, "--preset", "digits", "--out", out)
    assert run_script(monkeypatch, *told, script=SCRIPT.with_name("reference.py")) == 0
    assert capsys.readouterr().out.strip() == out
    told = ("builtin:digits", out, "--preset", "digits", "--steps", "1", "--num", "20", "--json")
    assert run_script(monkeypatch, *told, script=SCRIPT.with_name("sample.py")) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fid"]["n"] == 20


TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")


# accelerate starts one process on a CPU, whatever it is told.
@pytest.mark.parametrize(("launcher", "world"), [(TORCHRUN, 2), (ACCELERATE, 1)])
def test_launchers_run_the_scripts_and_find_what_one_process_does(half, tmp_path, launcher, world, capsys):
    def launched(script, *arguments):
        command = [sys.executable, "-m", *launcher, str(SCRIPT.with_name(script)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    reference, one = str(tmp_path / "ref.npz"), str(tmp_path / "one.npz")
    told = ("--preset", "digits", "--metrics", "fid,kid,prdc")
    launched("reference.py", half, *told, "--out", reference)
    record = json.loads(launched("fid.py", "calc", "builtin:digits", reference, *told, "--json"))
    assert record["world_size"] == world
    main(["ref", half, *told, "--out", one])
    capsys.readouterr()
    main(["calc", "builtin:digits", one, *told, "--json"])
    for name, expected in json.loads(capsys.readouterr().out)["metrics"].items():
        found = record["metrics"][name]
        assert (found["n"], found["n_ref"]) == (expected["n"], expected["n_ref"])
        for key in ("value", "se"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9)


def test_references_are_converted_to_the_form_of_the_suffix_or_the_one_that_is_named(half, tmp_path, capsys):
    reference = str(tmp_path / "ref.npz")
    main(["ref", half, "--preset", "digits", "--out", reference])
    capsys.readouterr()

    def converted(source, name, *form):
        assert main(["convert", source, str(tmp_path / name), *form]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}: fid, 80 features of 899 images\n"
        return str(tmp_path / name)

    def distance(to):
        main(["calc", "builtin:digits", to, "--preset", "digits", "--json"])
        return json.loads(capsys.readouterr().out)["metrics"]["fid"]["value"]

    there_and_back = converted(converted(reference, "a.pkl", "--form", "sid"), "a.npz")
    assert distance(there_and_back) == pytest.approx(distance(reference), rel=1e-9)
    assert distance(converted(reference, "a.pt")) == pytest.approx(distance(reference), rel=1e-6)


def _folder(path, *shapes):
    path.mkdir()
    for index, shape in enumerate(shapes):
        Image.fromarray(np.zeros(shape, np.uint8)).save(path / f"{index:03d}.png")
    return path


def _bad_sources(tmp_path):
    np.savez(tmp_path / "named.npz", images=np.zeros((30, 8, 8), np.uint8))
    broken = _folder(tmp_path / "broken", *[(8, 8)] * 30)
    (broken / "017.png").write_bytes(b"\x89PNG")
    return {
        "missing folder": (tmp_path / "nowhere", "nowhere"),
        "empty folder": (_folder(tmp_path / "empty"), "holds no images"),
        "too few": (_folder(tmp_path / "few", *[(8, 8)] * 19), "images are needed, got 19"),
        "different sizes": (_folder(tmp_path / "sizes", *[(8, 8)] * 20, (8, 9)), "one width x height"),
        "unreadable": (broken, "017.png"),
        "another size": (_folder(tmp_path / "large", *[(12, 12)] * 20), "8x8 digits, .* got images of 12x12"),
        "npz without arr_0": (tmp_path / "named.npz", "expected arr_0"),
    }


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "case",
    ["missing folder", "empty folder", "too few", "different sizes", "unreadable", "another size", "npz without arr_0"],
)
def test_bad_input_on_either_side_is_one_clear_message(tmp_path, case, side, capsys):
    source, message = _bad_sources(tmp_path)[case]
    sources = ["builtin:digits", "builtin:digits"]
    sources[side] = str(source)
    with pytest.raises(UserError, match=message):
        main(["calc", *sources, "--preset", "digits", "--json"])
    assert capsys.readouterr().out == ""


def test_bad_input_ends_the_script_with_exit_code_2_and_one_line(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "calc", str(tmp_path / "nowhere"), "builtin:digits") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / 'nowhere'}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["calc"], ["ref", "one"], ["measure", "a", "b"]])
def test_wrong_usage_ends_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: stepdistill fid" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_shows_an_example_and_imports_nothing_heavy(arguments):
    program = (
        "import sys; from stepdistill.fid import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'PIL', 'sklearn'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"  stepdistill fid {arguments[0] if len(arguments) > 1 else 'calc'}" in answer
    assert answer.splitlines()[-1] == "[]"
