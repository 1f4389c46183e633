"""What a user can get wrong when scoring: exit code 2, one clear line, no traceback, and nothing that is lost."""

import json
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from random_networks import save_nvidia_inception

from stepdistill import prompts
from stepdistill.__main__ import main
from stepdistill.errors import UserError
from stepdistill.evaluation import Evaluator
from stepdistill.images import load_digits
from stepdistill.metrics.frechet import Moments, Reference
from stepdistill.metrics.presets import PRESETS
from stepdistill.metrics.weights import KNOWN, VARIABLE
from stepdistill.scoring import Options, calc

DIGITS = load_digits()[0][:, 0].numpy()


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """An Inception of random weights where the variable says, and caches of nobody's."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv(VARIABLE, str(folder))
    return save_nvidia_inception(folder / KNOWN["inception"].name, width=6)


def run(capsys, *arguments):
    """Exit code, standard output and standard error of ``stepdistill fid``."""
    with pytest.raises(SystemExit) as stopped:
        main(["fid", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def refused(capsys, *arguments):
    """What is said of bad input, on one line."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    # A bar of progress that broke off has no end of line.
    [said] = [line for line in re.sub(r"\r[^\r\n]*?it/s\]", "", err).splitlines() if line]
    assert said.startswith("error: ")
    return said


def scored(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def save(folder, images):
    folder.mkdir()
    for k, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    return folder


@pytest.fixture
def thousands(tmp_path):
    """2,000 digits, of which number 1234 is unreadable."""
    folder = tmp_path / "thousands"
    first = save(folder, DIGITS[:200])
    for k in range(200, 2000):
        (folder / f"{k:04d}.png").write_bytes((first / f"{k % 200:04d}.png").read_bytes())
    (folder / "1234.png").write_bytes(b"\x89PNG\r\n")
    return folder


def test_one_unreadable_image_among_thousands_is_named_or_left_out_and_counted(thousands, capsys):
    assert f"cannot read the image {thousands / '1234.png'}" in refused(capsys, "calc", thousands, "builtin:digits")
    told = ("calc", thousands, "builtin:digits", "--skip-broken")
    record = scored(capsys, *told)
    assert record["metrics"]["fid"]["n"] == 1999
    assert record["skipped"] == [str(thousands / "1234.png")]
    _, table, _ = run(capsys, *told)
    assert f"1 images could not be read, the first {thousands / '1234.png'}" in table


def test_an_unreadable_image_is_the_error_of_every_process_and_left_out_by_all(thousands):
    broken = str(thousands / "1234.png")
    (thousands / "0011.png").write_bytes(b"")
    errors = in_processes(3, lambda: calc(str(thousands), "builtin:digits", Options(workers=0)))
    assert {type(error) for error in errors} == {UserError}
    assert len({str(error) for error in errors}) == 1
    skipping = Options(workers=0, skip_broken=True)
    for record in in_processes(3, lambda: calc(str(thousands), "builtin:digits", skipping)):
        assert record["skipped"] == [str(thousands / "0011.png"), broken]
        assert record["metrics"]["fid"]["n"] == 1998


def test_an_unreadable_image_of_the_reference_is_left_out_and_counted_too(thousands, tmp_path, capsys):
    told = ("calc", "builtin:digits", thousands, "--preset", "digits")
    assert f"cannot read the image {thousands / '1234.png'}" in refused(capsys, *told)
    record = scored(capsys, *told, "--skip-broken")
    assert record["skipped"] == [str(thousands / "1234.png")]
    assert record["metrics"]["fid"]["n_ref"] == 1999
    code, out, _ = run(
        capsys, "ref", thousands, "--preset", "digits", "--skip-broken", "--out", tmp_path / "reference.npz"
    )
    assert (code, "1 images could not be read" in out) == (0, True)
    with np.load(tmp_path / "reference.npz") as written:
        assert written["n"] == 1999


def test_prompts_stay_with_their_images_where_one_is_left_out(tmp_path, inception, capsys):
    images = save(tmp_path / "images", np.repeat(DIGITS[:12], 2, 0))
    (tmp_path / "prompts.txt").write_text("".join(f"digit {k // 2}\n" for k in range(24)))
    told = ("--preset", "clean", "--metrics", "diversity", "--trust", "--skip-broken")
    told = (*told, "--prompts", tmp_path / "prompts.txt")
    assert scored(capsys, "calc", images, images, *told)["metrics"]["diversity"]["value"] == pytest.approx(0, abs=1e-9)
    (images / "0005.png").write_bytes(b"")
    assert "diversity needs 2 images or more of each prompt" in refused(capsys, "calc", images, images, *told)
    (images / "0004.png").write_bytes(b"")  # The whole pair.
    found = scored(capsys, "calc", images, images, *told)["metrics"]["diversity"]
    assert (found["value"], found["n"]) == (pytest.approx(0, abs=1e-9), 22)


def test_sizes_may_differ_only_where_the_protocol_makes_them_one(tmp_path, inception, capsys):
    rng = np.random.default_rng(0)
    images = save(tmp_path / "images", [rng.integers(0, 256, (30 + k % 2, 32, 3), np.uint8) for k in range(24)])
    message = refused(capsys, "calc", images, images, "--preset", "edm-cifar10", "--trust")
    assert "images must have one width x height x channels" in message
    assert "32x30x3, 32x31x3" in message
    told = ("--preset", "clean", "--metrics", "fid", "--trust")
    assert scored(capsys, "calc", images, images, *told)["metrics"]["fid"]["n"] == 24


def test_statistics_of_another_extractor_dimension_or_kind_are_refused(tmp_path, inception, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", rng.integers(0, 256, (24, 32, 32, 3), np.uint8))
    images = tmp_path / "images.npz"
    assert run(capsys, "ref", images, "--preset", "edm-cifar10", "--trust", "--out", tmp_path / "edm.npz")[0] == 0
    assert run(capsys, "ref", "builtin:digits", "--preset", "digits", "--out", tmp_path / "digits.npz")[0] == 0
    told = ("--preset", "clean", "--metrics", "fid", "--trust")
    message = refused(capsys, "calc", images, tmp_path / "edm.npz", *told)
    assert "statistics of extractor inception, expected inception-clean" in message
    other = ("--preset", "sidlsg-train", "--trust")  # The same network after another resize.
    message = refused(capsys, "calc", images, tmp_path / "edm.npz", *other)
    assert "statistics of stored image > inception, expected stored image > center-crop > lanczos 256" in message
    message = refused(capsys, "calc", images, tmp_path / "digits.npz", *told)
    assert "statistics of 80 features, expected 6; they are of another extractor" in message
    np.savez(tmp_path / "spatial.npz", mu_s=np.zeros(6), sigma_s=np.eye(6))
    message = refused(capsys, "calc", images, tmp_path / "spatial.npz", *told)
    assert "holds no statistics for fid; it holds mu_s, sigma_s" in message
    message = refused(capsys, "calc", images, tmp_path / "edm.npz", "--trust", "--metrics", "kid", *told[:2])
    assert "statistics of extractor inception, expected inception-clean" in message


@pytest.mark.parametrize(
    ("metric", "count", "said"),
    [("fid", 19, "got 19"), ("prdc", 19, "got 19"), ("vendi", 19, "got 19"), ("kid", 1, "got 1"), ("is", 9, "got 0")],
)
def test_too_few_samples_for_a_metric_are_counted(tmp_path, inception, metric, count, said, capsys):
    np.savez(tmp_path / "few.npz", DIGITS[:count])
    np.savez(tmp_path / "enough.npz", DIGITS[:30])
    told = ("--preset", "adm-256", "--trust", "--metrics", metric)  # Ten parts for the inception score, one is empty.
    message = refused(capsys, "calc", tmp_path / "few.npz", tmp_path / "enough.npz", *told)
    assert "needed" in message
    assert said in message


def test_an_unknown_preset_is_answered_with_all_of_them(capsys):
    for arguments in (("calc", "builtin:digits", "builtin:digits", "--preset", "xyzzy"), ("presets", "xyzzy")):
        message = refused(capsys, *arguments)
        assert all(name in message for name in PRESETS)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a digit"] * 23, "holds 23 prompts for 24 images"),
        (["a digit"] * 25, "holds 25 prompts for 24 images"),
        (
            ["a digit"] * 3 + [""] + ["a digit"] * 20,
            "23 prompts for 24 images; give one an image; line 4 is blank",
        ),
        ([], "holds no prompt"),
        (["a digit"] * 3 + ["\xff"] + ["a digit"] * 20, "line 4"),
    ],
)
def test_prompts_must_be_one_an_image(tmp_path, inception, lines, said, capsys):
    np.savez(tmp_path / "images.npz", DIGITS[:24])
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="latin-1")
    told = ("--preset", "clean", "--metrics", "diversity", "--trust", "--prompts", tmp_path / "prompts.txt")
    assert said in refused(capsys, "calc", tmp_path / "images.npz", tmp_path / "images.npz", *told)


def test_the_first_images_take_the_first_prompts_of_all_or_their_own(tmp_path, inception, capsys):
    np.savez(tmp_path / "images.npz", DIGITS[:24])
    told = ("--preset", "clean", "--metrics", "diversity", "--trust", "--num", 20, "--prompts")
    for count in (20, 24):
        (tmp_path / f"{count}.txt").write_text("a digit\n" * count)
        record = scored(
            capsys, "calc", tmp_path / "images.npz", tmp_path / "images.npz", *told, tmp_path / f"{count}.txt"
        )
        assert record["metrics"]["diversity"]["n"] == 20


def test_weights_with_a_wrong_checksum_are_not_run(inception, capsys, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the file was run"))
    message = refused(capsys, "calc", "builtin:digits", "builtin:digits", "--preset", "clean")
    assert all(part in message for part in (str(inception), KNOWN["inception"].sha256, "--trust"))


def test_a_reference_that_would_run_code_is_refused_and_not_run(tmp_path, inception, capsys):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    fit = {"mu": np.zeros(6), "sigma": np.eye(6), "more": Attack()}
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps({"num_images": 100, "fid": fit}))
    torch.save(fit, tmp_path / "stats.pt")
    np.savez(tmp_path / "stats.npz", **{**fit, "mu": np.array([Attack()])})
    for name in ("img64.pkl", "stats.pt", "stats.npz"):
        told = ("calc", "builtin:digits", tmp_path / name, "--preset", "edm-cifar10", "--trust")
        assert str(tmp_path / name) in refused(capsys, *told)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"neither"])
def test_a_damaged_reference_is_refused_by_its_name_here_and_in_a_recipe(tmp_path, content, capsys):
    (tmp_path / "ref.npz").write_bytes(content)
    said = f"{tmp_path / 'ref.npz'} is truncated or not an .npz"
    assert said in refused(capsys, "calc", "builtin:digits", tmp_path / "ref.npz", "--preset", "digits")
    with pytest.raises(UserError, match=re.escape(said)):
        Evaluator(str(tmp_path / "ref.npz"))


def test_a_sigma_of_negative_eigenvalues_is_no_covariance(tmp_path, capsys):
    sigma = np.eye(80)
    sigma[0, 1] = sigma[1, 0] = 3
    np.savez(tmp_path / "ref.npz", mu=np.zeros(80), sigma=sigma)
    told = ("calc", "builtin:digits", tmp_path / "ref.npz", "--preset", "digits")
    assert "eigenvalues from -2 to 4, so it is not a covariance" in refused(capsys, *told)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(80), sigma=1e308 * np.eye(80))
    assert "entries up to 1e+308, which no features have" in refused(capsys, *told)


def test_a_sigma_that_float32_sums_have_rounded_is_one():
    rows = (torch.randn(60, 200, generator=torch.Generator().manual_seed(0)) + 3).relu()
    sigma = rows.T @ rows / 60 - torch.outer(rows.mean(0), rows.mean(0))
    assert torch.linalg.eigvalsh(sigma.double())[0] < -1e-7
    Reference(Moments(60, rows.mean(0).double(), sigma.double()))


def test_numbers_of_images_that_are_none_are_refused(tmp_path, capsys):
    for count in ("many", -3):
        fit = {"mu": np.zeros(80), "sigma": np.eye(80)}
        (tmp_path / "img64.pkl").write_bytes(pickle.dumps({"num_images": count, "fid": fit}))
        said = refused(capsys, "convert", tmp_path / "img64.pkl", tmp_path / "ref.npz")
        assert f"statistics of {count!r} images" in said


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", '{"protocol": 3}', '{"protocol": {"digest": 1}}', '{"protocol": {"digest": 1, "fields": []}}'],
)
def test_other_json_than_a_record_is_not_compared(tmp_path, content, capsys):
    beside = {"reference": 1, "reference_digest": 1, "inputs": {}, "images": 1}
    told = json.loads(content)
    (tmp_path / "run.json").write_text(json.dumps({**beside, **told} if isinstance(told, dict) else told))
    assert "was written by another version" in refused(capsys, "compare", tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["a.NPZ", "a.pth", "a.PT", "a.PKL"])
def test_a_suffix_in_capitals_is_that_suffix(tmp_path, name, capsys):
    assert run(capsys, "ref", "builtin:digits", "--preset", "digits", "--out", tmp_path / "ref.NPZ")[0] == 0
    form = ("--form", "sid") if name == "a.PKL" else ()
    written = tmp_path / name.replace("pth", "pt")
    assert run(capsys, "convert", tmp_path / "ref.NPZ", written, *form)[0] == 0
    written.rename(tmp_path / name)
    told = ("calc", "builtin:digits", tmp_path / name, "--preset", "digits")
    assert scored(capsys, *told)["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-4)


@pytest.fixture
def full_disk():
    """Files cannot grow beyond so many bytes, which fails writes as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_full_disk_keeps_every_shard_written_before_and_the_run_goes_on(tmp_path, full_disk, capsys):
    told = ("calc", "builtin:digits", "builtin:digits", "--features", tmp_path / "kept")
    expected = scored(capsys, *told)["metrics"]
    first, last = sorted((tmp_path / "kept").rglob("*.safetensors"))
    first.unlink()
    (tmp_path / "kept" / "run.json").unlink()
    before = last.read_bytes()
    full_disk(300_000)  # The first shard holds 1,000 features of 640 bytes.
    assert f"cannot write {first}: File too large; what was written before is kept" in refused(capsys, *told)
    full_disk(None)
    assert sorted((tmp_path / "kept").rglob("*.*")) == sorted([last, last.parent / "manifest.json"])
    assert last.read_bytes() == before
    assert scored(capsys, *told)["metrics"] == expected
    full_disk(1000)
    assert f"cannot write {tmp_path / 'kept' / 'run.json'}" in refused(capsys, *told)
    full_disk(None)
    assert json.loads((tmp_path / "kept" / "run.json").read_text())["metrics"] == expected


def test_a_full_disk_keeps_the_images_written_before(tmp_path, full_disk, capsys):
    told = ("gen", "builtin:digits", "builtin:digits", "--num", 20, "--steps", 1, "--save-images")
    scored(capsys, *told, tmp_path / "images")
    images = {file.name: file.read_bytes() for file in (tmp_path / "images").glob("*.png")}
    largest = max(sorted(images), key=lambda name: len(images[name]))
    full_disk(len(images[largest]) - 1)
    assert f"cannot write images to {tmp_path / 'again'}: File too large" in refused(capsys, *told, tmp_path / "again")
    full_disk(None)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "again").glob("*.png")}
    assert kept == {name: content for name, content in images.items() if name < largest}
    (tmp_path / "file").touch()
    assert "cannot write images to" in refused(capsys, *told, tmp_path / "file")


@pytest.mark.parametrize("name", ["ref.pt", "ref.pkl", "ref.npz"])
def test_a_full_disk_keeps_the_statistics_that_were_there_before(tmp_path, full_disk, name, capsys):
    whole = tmp_path / "whole.npz"
    np.savez(whole, mu=np.zeros(80), sigma=np.eye(80))
    (tmp_path / name).write_bytes(b"old")
    full_disk(10_000)
    assert f"cannot write {tmp_path / name}: " in refused(capsys, "convert", whole, tmp_path / name)
    full_disk(None)
    assert (tmp_path / name).read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {whole.name, name}


def test_encoded_prompts_that_cannot_be_kept_are_an_error_that_names_the_file(tmp_path, full_disk, capsys, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    told = ("gen", "builtin:digits_text", "builtin:digits_text", "--prompts", "builtin:digits_text", "--num", 20)
    full_disk(1000)
    assert f"cannot write the encoded prompts to {tmp_path / 'cache'}" in refused(capsys, *told)
    full_disk(None)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("calc", "builtin:digits", "builtin:digits", "--metrics", "fid,"), "metric is one of"),
        (("ref", "builtin:digits", "--preset", "digits", "--out", "nowhere/ref.npz"), "in a folder that exists"),
        (("ref", "builtin:digits", "--preset", "digits", "--out", "ref.pkl"), "`convert` makes others of it"),
        (("ref", "builtin:digits", "--preset", "digits", "--metrics", "vendi", "--out", "r.npz"), "images alone"),
        (("ref", "builtin:digits", "--num", 1798, "--out", "r.npz"), "more than the 1797 images"),
        (("ref", "builtin:digits", "--preset", "digits", "--num", 19, "--out", "r.npz"), "needed, got 19"),
        (("convert", "nowhere.npz", "copy.npz"), "nowhere.npz is not a file"),
        (("calc", "a" * 300, "builtin:digits"), "File name too long"),
        (("compare", "nowhere", "nowhere"), "holds no finished run"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--batch-size", 0, "be at least 1"), ("--workers", -1, "not be negative"), ("--num", 0, "be at least 1")],
)
def test_impossible_numbers_are_wrong_usage(flag, value, said, capsys):
    code, out, err = run(capsys, "calc", "builtin:digits", "builtin:digits", flag, value)
    assert (code, out) == (2, "")
    assert re.search(rf"argument .*{flag}: must {said}", err.splitlines()[-1])
