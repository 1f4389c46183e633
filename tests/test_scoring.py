"""Scoring from end to end, on the bundled digits: sources, processes, continued and compared runs, generation."""

import ctypes
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes

from stepdistill import agreement, labels, prompts, scoring
from stepdistill.errors import UserError
from stepdistill.fid import main
from stepdistill.generating import gen, stored, summed_up
from stepdistill.images import load_digits, to_picture
from stepdistill.metrics.base import Extractor, Features, Value
from stepdistill.metrics.digits import DigitsExtractor
from stepdistill.metrics.kid import kid_subsets
from stepdistill.metrics.lock import held
from stepdistill.metrics.presets import protocol
from stepdistill.sample import tracing
from stepdistill.sampling import Sampling
from stepdistill.scoring import Options, calc

DIGITS = load_digits()[0][:, 0].numpy()
ALL = "fid,kid,prdc,vendi"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 300 digits as a folder, an archive and arrays; and 300 others."""
    place = tmp_path_factory.mktemp("sources")
    (place / "folder").mkdir()
    for k, image in enumerate(DIGITS[:300]):
        to_picture(torch.from_numpy(image)[None]).save(place / "folder" / f"{k:04d}.png")
    with zipfile.ZipFile(place / "archive.zip", "w") as archive:
        for file in sorted((place / "folder").iterdir()):
            archive.write(file, file.name)
    np.savez(place / "array.npz", DIGITS[:300])
    np.save(place / "shard.npy", DIGITS[:300, :, :, None])
    np.savez(place / "others.npz", DIGITS[300:600])
    return place


def scored(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def numbers(record):
    return {name: (found["value"], found["se"]) for name, found in record["metrics"].items()}


@pytest.mark.parametrize("name", ["archive.zip", "array.npz", "shard.npy"])
def test_every_source_gives_the_same_numbers(sources, name, capsys):
    told = ("builtin:digits", "--metrics", ALL)
    expected = numbers(scored(capsys, "calc", sources / "folder", *told))
    assert expected.keys() == {"fid", "kid", "precision", "recall", "density", "coverage", "vendi"}
    found = numbers(scored(capsys, "calc", sources / name, *told, "--batch-size", 7, "--workers", 0))
    assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == found


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 300), (2, 7), (3, 64)])
def test_neither_batches_nor_processes_change_a_number(sources, world, batch_size):
    def run(batch_size):
        told = Options(preset="digits", metrics=tuple(ALL.split(",")), batch_size=batch_size, workers=0)
        return numbers(calc(str(sources / "array.npz"), str(sources / "others.npz"), told))

    expected = run(64)
    for found in in_processes(world, lambda: run(batch_size)):
        assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == found


def test_the_order_of_images_changes_no_value(sources, tmp_path, capsys):
    np.savez(tmp_path / "shuffled.npz", DIGITS[:300][np.random.default_rng(0).permutation(300)])
    told = (sources / "others.npz", "--preset", "digits", "--metrics", ALL)
    expected, found = (
        {name: value for name, (value, _) in numbers(scored(capsys, "calc", images, *told)).items()}
        for images in (sources / "array.npz", tmp_path / "shuffled.npz")
    )
    assert found == {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_the_subsets_of_kid_are_those_of_the_library_on_the_same_features(tmp_path, world):
    images, others = DIGITS[:1200], 255 - DIGITS[-1100:]
    for name, content in (("images", images), ("others", others)):
        np.savez(tmp_path / f"{name}.npz", content)
    told = Options(preset="digits", metrics=("kid-subsets",), workers=0)
    extract = DigitsExtractor()
    expected = kid_subsets(*(extract(torch.from_numpy(content)[:, None]) for content in (images, others)))
    assert len(expected.repeats) == 100
    for found in in_processes(
        world, lambda: calc(str(tmp_path / "images.npz"), str(tmp_path / "others.npz"), told)["metrics"]["kid-subsets"]
    ):
        assert found["value"] == pytest.approx(expected.value, rel=1e-9)
        assert found["repeats"] == pytest.approx(expected.repeats, rel=1e-9)
        assert (found["se"], found["n"], found["n_ref"]) == (None, 1200, 1100)


def test_a_launcher_gives_two_processes_the_numbers_of_one(sources, capsys):
    told = ["calc", str(sources / "array.npz"), "builtin:digits", "--metrics", ALL, "--json"]
    expected = numbers(scored(capsys, *told[:-1]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "stepdistill", "fid", *told]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(answer.stdout)
    assert record["world_size"] == 2
    assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == numbers(record)


class Projection(Extractor):
    """Random features of 8x8 images, of little memory of its own."""

    name, dimension, weights = "digits", 256, "none"
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        return Features((images[:, 0].flatten(1).float() / 255 @ self.matrix).relu())


def peak_of(images, reference):
    """MB beyond the start while these are scored, in a process of its own."""

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def measure():
        ctypes.CDLL(None).mallopt(-3, 1 << 18)  # Larger blocks go back to the system as soon as they are freed.
        before = status("VmRSS")
        calc(str(images), str(reference), Options(preset="digits", metrics=("fid", "kid", "prdc", "vendi"), workers=0))
        return status("VmHWM") - before

    [peak] = in_processes(1, measure)
    return peak


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "load_extractor", lambda *_, **__: Projection())
    peaks = []
    for count in (2048, 3072):
        for name in ("images", "reference"):
            noise = np.random.default_rng(len(name)).integers(0, 256, (count, 8, 8), np.uint8)
            np.savez(tmp_path / f"{name}.npz", noise)
        peaks.append(peak_of(tmp_path / "images.npz", tmp_path / "reference.npz"))
    # In memory, the further features take 1 MB a side in float32, 2 MB in float64, and 1,024 rows of distances 8 MB.
    assert peaks[1] - peaks[0] < 2, peaks


def test_statistics_stand_for_the_images_they_are_of(sources, tmp_path, capsys):
    expected = scored(capsys, "calc", sources / "array.npz", "builtin:digits")
    assert main(["ref", "builtin:digits", "--preset", "digits", "--out", str(tmp_path / "ref.npz")]) == 0
    capsys.readouterr()
    found = scored(capsys, "calc", sources / "array.npz", tmp_path / "ref.npz", "--preset", "digits")
    assert numbers(found)["fid"] == pytest.approx(numbers(expected)["fid"], rel=1e-9)
    with pytest.raises(UserError, match="hold none; give the reference images"):
        main(["calc", str(sources / "array.npz"), str(tmp_path / "ref.npz"), "--preset", "digits", "--metrics", "kid"])
    assert main(["convert", str(tmp_path / "ref.npz"), str(tmp_path / "copy.npz")]) == 0
    assert "80 features of 1797 images" in capsys.readouterr().out
    again = scored(capsys, "calc", sources / "array.npz", tmp_path / "copy.npz", "--preset", "digits")
    assert numbers(again) == numbers(found)


def test_a_run_that_keeps_its_features_continues_and_makes_none_twice(sources, tmp_path, capsys):
    told = ("calc", sources / "array.npz", "builtin:digits", "--metrics", "fid,kid")
    expected = numbers(scored(capsys, *told))
    first = scored(capsys, *told, "--features", tmp_path / "kept")
    assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == numbers(first)
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.safetensors")}
    assert shards
    assert numbers(scored(capsys, *told, "--features", tmp_path / "kept")) == numbers(first)
    assert {file: file.stat().st_mtime_ns for file in shards} == shards
    with pytest.raises(UserError, match="name another folder"):
        main([*map(str, told[:-1]), "fid", "--features", str(tmp_path / "kept")])


def test_what_a_killed_run_of_two_processes_left_is_continued_by_one_and_no_two_runs_share_a_folder(
    sources, tmp_path, capsys
):
    told = ("calc", sources / "array.npz", "builtin:digits", "--features", tmp_path / "kept")
    assert in_processes(2, lambda: main([*map(str, told)])) == [0, 0]
    whole = numbers(json.loads((tmp_path / "kept" / "run.json").read_text()))
    one, two = sorted((tmp_path / "kept" / "digits").glob("*.safetensors"))
    assert [one.stem, two.stem] == ["000000000-000000150", "000000150-000000300"], "processes make as many each"
    two.rename(two.with_name(f"{two.name}.tmp"))
    (tmp_path / "kept" / "run.json").unlink()
    before = one.stat().st_mtime_ns
    with held(tmp_path / "kept"), pytest.raises(UserError, match="another run keeps its features"):
        main([*map(str, told)])
    capsys.readouterr()
    assert numbers(scored(capsys, *told))["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert one.stat().st_mtime_ns == before
    assert sorted(one.parent.glob("*")) == [one, two, one.parent / "manifest.json"]


def test_two_runs_compare_on_their_common_ids_and_only_under_one_protocol(sources, tmp_path, capsys):
    alone = {}
    for name in ("array.npz", "others.npz"):
        told = ("calc", sources / name, "builtin:digits", "--features", tmp_path / name)
        alone[name] = scored(capsys, *told)["metrics"]["fid"]["value"]
    record = scored(capsys, "compare", tmp_path / "array.npz", tmp_path / "others.npz")
    assert record["metrics"]["fid"]["value"] == pytest.approx(alone["array.npz"] - alone["others.npz"], abs=1e-6)
    assert record["metrics"]["fid"]["se"] > 0
    scored(capsys, "calc", sources / "array.npz", "builtin:digits", "--num", 200, "--features", tmp_path / "fewer")
    with pytest.raises(UserError, match="differ in their protocol"):
        main(["compare", str(tmp_path / "array.npz"), str(tmp_path / "fewer")])
    with pytest.raises(UserError, match="holds no finished run"):
        main(["compare", str(tmp_path / "array.npz"), str(tmp_path)])


def test_what_is_not_compared_is_said_and_an_equal_reference_may_lie_elsewhere(sources, tmp_path, capsys):
    for name, reference in (("array.npz", "others.npz"), ("shard.npy", "copy.npz")):
        if reference == "copy.npz":
            shutil.copy(sources / "others.npz", tmp_path / reference)
        place = (sources if reference == "others.npz" else tmp_path) / reference
        told = ("--preset", "digits", "--metrics", "fid,kid", "--features", tmp_path / name)
        scored(capsys, "calc", sources / name, place, *told)
    told = ["compare", str(tmp_path / "array.npz"), str(tmp_path / "shard.npy")]
    record = scored(capsys, *told)
    assert (record["metrics"].keys(), record["not_compared"]) == ({"fid"}, ["kid"])
    main(told)
    assert "kid: not compared" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"kid: .* has fid to compare"):
        main([*told, "--metrics", "kid"])
    np.savez(tmp_path / "copy.npz", DIGITS[:300])
    with pytest.raises(UserError, match="has changed since"):
        main(["compare", *told[:0:-1]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record.pop("reference_digest"), "it lacks reference_digest"),
        (lambda record: record["protocol"]["fields"].update(gamma=2), "unexpected keyword argument 'gamma'"),
        (lambda record: record["protocol"]["fields"].pop("extractor"), "'extractor'"),
    ],
)
def test_runs_that_another_version_kept_are_refused_until_repeated(sources, tmp_path, capsys, change, reason):
    for name in ("array.npz", "others.npz"):
        told = ("calc", sources / name, "builtin:digits", "--features", tmp_path / name)
        scored(capsys, *told)
        record = json.loads((tmp_path / name / "run.json").read_text())
        change(record)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    compare = ("compare", tmp_path / "array.npz", tmp_path / "others.npz")
    with pytest.raises(UserError, match=rf"run\.json was written by another version .*{reason}.*; repeat"):
        main([*map(str, compare)])
    for name in ("array.npz", "others.npz"):
        scored(capsys, "calc", sources / name, "builtin:digits", "--features", tmp_path / name)
    assert scored(capsys, *compare)["metrics"].keys() == {"fid"}


@pytest.mark.parametrize(
    ("pipeline", "flag", "first", "other"),
    [
        ("classes", "--labels", (0, 1), (0, 2)),
        ("builtin:digits_text", "--prompts", "a white digit three\n", "a red digit four\n"),
    ],
)
def test_images_of_other_labels_or_prompts_do_not_compare(
    teachers, tmp_path, capsys, pipeline, flag, first, other, monkeypatch
):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    source = str(teachers("consistency")) if pipeline == "classes" else pipeline
    for name, told in (("one", first), ("same", first), ("two", other)):
        if isinstance(told, str):
            (tmp_path / f"{name}.txt").write_text(told)
            told = (tmp_path / f"{name}.txt",)
        kept = ("--num", 20, "--steps", 1, "--features", tmp_path / name)
        record = scored(capsys, "gen", source, "builtin:digits", flag, *told, *kept)
        assert record["inputs"].keys() == {flag.removeprefix("--")}
    assert scored(capsys, "compare", tmp_path / "one", tmp_path / "same")["metrics"]["fid"]["value"] == 0
    with pytest.raises(UserError, match=f"are images of different {flag.removeprefix('--')}"):
        main(["compare", str(tmp_path / "one"), str(tmp_path / "two")])


def test_prompts_of_images_are_told_whatever_is_measured_and_have_one_checksum(sources, tmp_path, capsys):
    for name, lines in (("one", 300), ("other", 299)):
        (tmp_path / f"{name}.txt").write_text("a digit\n" * lines)
    told = ("calc", sources / "array.npz", "builtin:digits", "--prompts")
    assert scored(capsys, *told, tmp_path / "one.txt")["inputs"] == labels.inputs("prompts", ["a digit"], 300)
    with pytest.raises(UserError, match="299 prompts for 300 images"):
        main([*map(str, told), str(tmp_path / "other.txt")])


def test_two_runs_are_drawn_where_they_agree_best_and_worst(sources, tmp_path, capsys):
    images = DIGITS[300:340].copy()
    np.savez(tmp_path / "one.npz", images)
    images[7], images[11] = 255 - images[7], 0
    np.savez(tmp_path / "two.npz", images)
    for name in ("one", "two"):
        scored(capsys, "calc", tmp_path / f"{name}.npz", "builtin:digits", "--features", tmp_path / name)
    told = ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--plot"]
    assert main([*told, str(tmp_path / "agreement.png")]) == 0
    with Image.open(tmp_path / "agreement.png") as picture:
        assert picture.size == (990, 660)
    with pytest.raises(UserError, match="cannot write"):
        main([*told, str(tmp_path / "nowhere" / "agreement.png")])
    (tmp_path / "two.npz").unlink()
    with pytest.raises(UserError, match=r"those of .*two were not kept \(gen --save-images does\)"):
        main([*told, str(tmp_path / "agreement.png")])


def test_a_picture_of_agreement_has_the_nearest_pairs_first_and_the_farthest_below(sources, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(agreement, "_tiles", lambda source, ids: drawn.append(ids) or torch.zeros(len(ids), 3, 8, 8))
    runs = {"student": str(sources / "array.npz"), "teacher": str(sources / "folder")}
    agreement.draw(tmp_path / "x.png", runs, torch.tensor([0.3, 0.1, 0.2, 0.9, 0.5]), pairs=2)
    assert drawn == [[1, 2], [1, 2], [3, 4], [3, 4]]
    with pytest.raises(UserError, match="holds 300 images, and teacher has features of 301"):
        agreement.draw(tmp_path / "x.png", {"teacher": runs["teacher"]}, torch.zeros(301))


def test_a_pipeline_is_scored_in_memory_as_its_saved_images_are(tmp_path, capsys):
    told = ("gen", "builtin:digits", "builtin:digits", "--steps", 2, "--num", 60, "--batch-size", 32)
    record = scored(capsys, *told, "--save-images", tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 60
    again = scored(capsys, "calc", tmp_path / "images", "builtin:digits")
    assert numbers(record)["fid"] == pytest.approx(numbers(again)["fid"], rel=1e-9)
    assert record["cost"]["images_per_second"] > 0
    twice = scored(capsys, *told, "--repeats", 2)["metrics"]["fid"]
    assert twice["repeats"][0] == pytest.approx(numbers(record)["fid"][0], rel=1e-9)
    assert twice["value"] == pytest.approx(sum(twice["repeats"]) / 2)


GEN = ("gen", "builtin:digits", "builtin:digits", "--num", 20, "--steps", 2)


def test_a_finished_run_is_repeated_and_generates_nothing(tmp_path, capsys):
    told = (*GEN, "--features", tmp_path / "kept")
    first, again = scored(capsys, *told), scored(capsys, *told)
    assert numbers(again) == numbers(first)
    assert (first["cost"]["images_generated"], again["cost"]["images_generated"]) == (20, 0)
    assert (first["cost"]["network_calls"], again["cost"]["network_calls"]) == (2, 2)
    assert first["cost"]["images_per_second"] > 0
    assert again["cost"]["images_per_second"] is None
    assert again["cost"]["latency_seconds"] > 0
    assert again["seconds"]["generation"] == 0 < first["seconds"]["generation"]
    main([*map(str, told)])
    assert "2 network calls an image" in capsys.readouterr().out


def test_a_continued_run_keeps_every_image_and_those_of_another_are_refused(tmp_path, capsys):
    told = (*GEN, "--features", tmp_path / "kept")
    scored(capsys, *told)
    record = scored(capsys, *told, "--save-images", tmp_path / "images")
    whole = {file.name: file.read_bytes() for file in (tmp_path / "images").glob("*.png")}
    assert (len(whole), record["cost"]["images_generated"]) == (20, 20)
    again = scored(capsys, "calc", tmp_path / "images", "builtin:digits", "--preset", "digits")
    assert numbers(again)["fid"] == pytest.approx(numbers(record)["fid"], rel=1e-9)
    (tmp_path / "images" / "000007.png").unlink()
    assert scored(capsys, *told, "--save-images", tmp_path / "images")["cost"]["images_generated"] == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "images").glob("*.png")} == whole
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "cat.png").touch()
    for folder, steps in (("images", 3), ("foreign", 2)):
        with pytest.raises(UserError, match=f"{folder} holds images of another run"):
            main([*map(str, GEN[:-1]), str(steps), "--save-images", str(tmp_path / folder)])


def test_several_numbers_of_steps_are_scored_and_drawn_at_once(tmp_path, capsys):
    kept = ("--features", tmp_path / "kept", "--save-images", tmp_path / "images")
    record = scored(capsys, *GEN, 1, *kept, "--plot", tmp_path / "steps.png")
    two, one = record["runs"]
    assert [run["cost"]["network_calls"] for run in (two, one)] == [2, 1]
    assert numbers(two) == numbers(scored(capsys, *GEN))
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"steps_1", "steps_2"}
    assert len(list((tmp_path / "images" / "steps_1").glob("*.png"))) == 20
    assert scored(capsys, "compare", *(tmp_path / "kept" / f"steps_{n}" for n in (1, 2)))["metrics"]["fid"]["n"] == 20
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.size == (660, 440)
    for wrong, said in ((["2"], "names a number twice"), (["1", "--plot", "nowhere/x.png"], "a folder that exists")):
        with pytest.raises(UserError, match=said):
            main([*map(str, GEN), *wrong])


def test_a_process_without_a_shard_does_no_harm(tmp_path):
    def run():
        told = Options(count=20, features=tmp_path / "kept")
        return gen(Sampling(source="builtin:digits", steps=1), "builtin:digits", told)

    one, other = in_processes(2, run)
    assert numbers(one) == numbers(other)
    assert one["cost"]["images_generated"] == 20


def test_features_of_another_setting_or_of_new_weights_are_not_continued(teachers, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(teachers("consistency"), student)
    told = ["gen", str(student), "builtin:digits", "--num", "20", "--features", str(tmp_path / "kept"), "--steps", "1"]
    first = scored(capsys, *told)
    with pytest.raises(UserError, match=r"made_by '.*steps=1, .*this run makes '.*steps=2, "):
        main([*told[:-1], "2"])
    weights = student / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="made_by"):
        main(told)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert numbers(scored(capsys, *told)) == numbers(first)


def test_features_of_images_that_were_replaced_are_not_continued(sources, tmp_path, capsys):
    images = tmp_path / "images.npz"
    np.savez(images, DIGITS[:40])
    told = ["calc", str(images), "builtin:digits", "--features", str(tmp_path / "kept")]
    scored(capsys, *told)
    np.savez(images, DIGITS[40:80])
    with pytest.raises(UserError, match="made_by"):
        main(told)


def test_images_are_generated_and_judged_without_a_reference(capsys):
    record = scored(capsys, *GEN[:2], *GEN[3:], "--preset", "digits", "--metrics", "vendi")
    assert (record["metrics"].keys(), record["reference"]) == ({"vendi"}, None)
    with pytest.raises(UserError, match="fid need a REFERENCE"):
        main(["gen", "builtin:digits", "--preset", "digits"])


def test_a_sample_of_any_repeat_is_asked_for_what_it_is_scored_by():
    def first(prompts, period):
        asked = Sampling(source="builtin:digits_text", prompts=prompts, steps=1, period=period)
        return tracing(asked).traces([4])

    prompts = ("a bold handwritten seven", "a thin handwritten one", "a handwritten nine", "a handwritten two")
    assert torch.equal(first(prompts, 4), first(prompts[:1], None))
    assert not torch.equal(first(prompts, 4), first(prompts[1:2], None))


def test_pixels_are_rounded_truncated_or_compressed_as_the_protocol_says():
    x = torch.linspace(-1.2, 1.2, 8 * 8 * 3).reshape(1, 3, 8, 8)
    level = (x + 1) * 127.5
    digits = protocol("digits")
    assert torch.equal(stored(x, digits), (level + 0.5).floor().clamp(0, 255).to(torch.uint8))
    truncated = stored(x, digits.changed({"quantisation": "truncate"}))
    assert torch.equal(truncated, level.clamp(0, 255).floor().to(torch.uint8))
    lossy = stored(x, digits.changed({"file_form": "jpeg 50"}))
    assert lossy.shape == (1, 3, 8, 8)
    assert not torch.equal(lossy, stored(x, digits))


def test_repeats_are_summed_up_as_the_protocol_reports_them():
    repeats = [Value(3.0, 0.3, 10, 2.9), Value(1.0, 0.4, 10, None)]
    least = summed_up(repeats, protocol("edm-cifar10"))
    assert (least.value, least.se, least.repeats) == (1.0, 0.4, [3.0, 1.0])
    mean = summed_up(repeats, protocol("sid-cifar10"))
    assert (mean.value, mean.se, mean.n, mean.debiased) == (2.0, 0.25, 20, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calc", "builtin:digits", "builtin:digits", "--preset", "digit"], "did you mean digits"),
        (["calc", "builtin:digits", "builtin:digits", "--num", "9999"], "more than the 1797 images"),
        (["calc", "builtin:digits", "builtin:digits", "--metrics", "fd"], "metric is one of"),
        (["calc", "builtin:digits", "builtin:digits", "--metrics", "clip"], "needs --prompts"),
        (["calc", "builtin:digits", "builtin:digits", "--metrics", "is"], "needs a classifier"),
        (["calc", "builtin:digits", "builtin:digits", "--preset", "clean"], "inception-2015-12-05"),
        (["gen", "builtin:nothing", "builtin:digits"], "no bundled teacher"),
    ],
)
def test_a_choice_that_cannot_work_is_one_clear_message(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_presets_are_listed_and_spelled_out(capsys):
    main(["presets"])
    assert "coco30k-gigagan" in capsys.readouterr().out
    main(["presets", "edm-cifar10"])
    assert capsys.readouterr().out.rstrip("\n") == protocol("edm-cifar10").text()


def test_the_doctor_finds_the_arithmetic_in_order(capsys):
    assert main(["doctor"]) == 0
    assert "ok       test     distance of two Gaussians" in capsys.readouterr().out


def test_metrics_of_the_images_alone_need_no_reference(sources, capsys):
    told = ("calc", sources / "array.npz", "--preset", "digits", "--metrics", "vendi")
    alone = scored(capsys, *told)
    assert numbers(alone) == numbers(scored(capsys, *told[:2], "builtin:digits", *told[2:]))
    assert alone["reference"] is None
    with pytest.raises(UserError, match="fid, kid need a REFERENCE; without one there are is, vendi, diversity, clip"):
        main(["calc", str(sources / "array.npz"), "--preset", "digits", "--metrics", "fid,vendi,kid"])
