"""Prompts: files, lists, the encoded copy on disk, and what is refused."""

import gc
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from families import build
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file

from stepdistill import prompts, sources
from stepdistill.__main__ import main
from stepdistill.config import Column, Config, Data
from stepdistill.data import data_free
from stepdistill.decoder import Decoder
from stepdistill.distill import Run, distill
from stepdistill.errors import UserError
from stepdistill.prompts import encode, read_prompts
from stepdistill.streaming import write_rows
from stepdistill.styles import CAPTIONS, digits_of
from stepdistill.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("sd", tmp_path_factory.mktemp("sd") / "teacher")


@pytest.fixture
def teacher(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    return load_teacher(str(folder))


def written(tmp_path, content: bytes) -> str:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return str(path)


def test_a_file_gives_one_prompt_a_line_and_an_empty_one_where_it_says_so(tmp_path):
    file = written(tmp_path, '\ufeffa cat\r\n\n  two dogs  \n""\nein Fuchs im Gr\u00fcn\n'.encode())
    with pytest.warns(UserWarning, match=r"prompts.txt: 1 blank lines are skipped"):
        assert read_prompts(file) == ["a cat", "two dogs", "", "ein Fuchs im Gr\u00fcn"]
    with warnings.catch_warnings(action="error"):
        assert read_prompts(written(tmp_path, b"a cat\ntwo dogs\n")) == ["a cat", "two dogs"]
        assert read_prompts(written(tmp_path, b"a cat\ntwo dogs")) == ["a cat", "two dogs"]
    assert read_prompts(["a", "b", "a"]) == ["a", "b", "a"]
    assert read_prompts("builtin:digits_text") == list(CAPTIONS)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .nowhere\.txt."):
        read_prompts("nowhere.txt")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_prompts(written(tmp_path, b"a cat\n\xff\xfe dog\n"))
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(written(tmp_path, b"\n \n"))


def test_the_conditions_are_those_of_the_stock_pipeline(teacher, folder):
    made, null = encode(teacher, ["a cat", "", "two dogs"], "rain")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for row, prompt in enumerate(["a cat", "", "two dogs"]):
        positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, "rain")  # type: ignore[operator]
        torch.testing.assert_close(made["encoder_hidden_states"][row], positive[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(null["encoder_hidden_states"], negative, atol=1e-6, rtol=0)


def test_prompts_come_from_a_column_of_a_dataset(tmp_path):
    captions = (" a cat ", "", '""', "two dogs")
    rows = [{"caption": caption, "n": n} for n, caption in enumerate(captions, 1)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = str(tmp_path / "texts")
    with pytest.warns(UserWarning, match=r'1 blank rows are skipped; "" is the empty caption'):
        assert read_prompts(Column(dataset=folder, column="caption")) == ["a cat", "", "two dogs"]
    assert read_prompts(Column(dataset=folder, column="caption", split="train[:1]")) == ["a cat"]
    for column, message in ({"column": "text"}, "cannot read .*text"), ({"column": "n"}, "row 0 .* is no text"):
        with pytest.raises(UserError, match=message):
            read_prompts(Column(dataset=folder, **column))
    for wrong in ({"dataset": str(tmp_path / "none")}, {"dataset": folder, "split": "nothing"}):
        with pytest.raises(UserError, match="cannot read"):
            read_prompts(Column(**wrong))
    told = Data.model_validate({"prompts": {"dataset": folder, "column": "caption"}})
    assert told.prompts == Column(dataset=folder, column="caption")


def test_prompts_are_encoded_once(teacher, monkeypatch):
    first, null = encode(teacher, ["a cat", "two dogs"], None)
    (kept,) = prompts.CACHE.glob("*.safetensors")
    assert set(load_file(kept)) == {"encoder_hidden_states", "null.encoder_hidden_states"}
    monkeypatch.setattr(prompts, "_encode", lambda *_: pytest.fail("encoded again"))
    again, null_again = encode(teacher, ["a cat", "two dogs"], None)
    assert torch.equal(first["encoder_hidden_states"], again["encoder_hidden_states"])
    assert torch.equal(null["encoder_hidden_states"], null_again["encoder_hidden_states"])
    for other in ((["two dogs", "a cat"], None), (["a cat", "two dogs"], "rain")):
        with pytest.raises(pytest.fail.Exception):
            encode(teacher, *other)


def test_encoded_prompts_of_another_text_encoder_are_not_used(teacher, folder, tmp_path, monkeypatch):
    encode(teacher, ["a cat"], None)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = other / "text_encoder/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(prompts, "_encode", lambda *_: pytest.fail("encoded again"))
    with pytest.raises(pytest.fail.Exception):
        encode(load_teacher(str(other)), ["a cat"], None)


def test_a_broken_copy_is_named(teacher):
    encode(teacher, ["a cat"], None)
    (kept,) = prompts.CACHE.glob("*.safetensors")
    kept.write_bytes(b"cut")
    with pytest.raises(UserError, match="delete the file"):
        encode(teacher, ["a cat"], None)


def test_repeated_prompts_are_drawn_more_often_and_encoded_once(teacher):
    data = data_free(teacher, Data(prompts=("a", "b", "a", "a")), CPU)
    rows = data.table["encoder_hidden_states"]
    assert (len(rows), data.count, data.prompts) == (2, 4, ("a", "b"))
    assert data.rows(range(4)).tolist() == [0, 1, 0, 0]
    torch.manual_seed(0)
    drawn = data.batch(2000).cond["encoder_hidden_states"]
    assert (drawn == rows[0]).flatten(1).all(1).double().mean().item() == pytest.approx(0.75, abs=0.04)


def test_conditions_of_samples_are_balanced_and_no_jackknife_group_is_of_one_kind(teacher):
    data = data_free(teacher, Data(prompts=tuple("abcdefghij")), CPU)
    rows = data.rows(range(200))
    assert torch.bincount(rows).tolist() == [20] * 10
    assert len(rows[::10].unique()) == 10


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        ("text", {}, "reads prompts; set data.prompts"),
        ("text", {"prompts": ("a",), "class_labels": (1,)}, "reads prompts, not class labels"),
        ("pixels", {"prompts": ("a",)}, "reads no prompts"),
        ("pixels", {"negative_prompt": "a"}, "reads no prompts"),
    ],
)
def test_conditions_that_a_teacher_does_not_take_are_refused(source, data, message, teacher, teachers):
    loaded = teacher if source == "text" else load_teacher(str(teachers("ddpm")))
    with pytest.raises(UserError, match=message):
        data_free(loaded, Data(**data), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "sid", "input": "unit", "clip_sample": True}}, "set method.clip_sample=false"),
        ({"method": {"name": "sid"}}, "set method.input=unit"),
        ({"real_data": {"images": "builtin:digits"}}, "real_data"),
        ({"evaluate": {"reference": "builtin:digits", "samples": 20, "teacher_steps": [2000]}}, "at most the 1000"),
        ({"training": {"lora": {"student": {"targets": ["to_nothing"]}}}}, "to_nothing matches no layer"),
        ({"data": {"prompts": ["a"], "negative_prompt": "rain"}}, r"negative_prompt is for guidance, and every scale"),
        (
            {
                "data": {"prompts": ["a"], "guidance_interval": [0.2, 0.8]},
                "method": {"name": "tbcm", "start_ratio": 5.0, "input": "unit", "jvp": "finite"},
            },
            r"guidance_interval is for guidance, and every scale here is 1; set data\.guidance_scale",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_is_written(changes, message, teacher, folder, tmp_path):
    settings = {
        "teacher": str(folder),
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "method": {"name": "sid", "input": "unit"},
        "data": {"prompts": ["a cat"]},
        **changes,
    }
    with pytest.raises(UserError, match=message):
        distill(Config.model_validate(settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"prompts": "nowhere.txt"}}, "no file"),
        ({"training": {"lora": {"student": {"targets": ["to_nothing"]}}}}, "to_nothing matches no layer"),
        ({"method": {"name": "sid"}}, "set method.input=unit"),
    ],
)
def test_what_settings_alone_show_is_refused_before_any_weights_are_read(changes, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {
        "teacher": str(tmp_path / "teacher"),
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "method": {"name": "sid", "input": "unit"},
        "data": {"prompts": ["a cat"]},
    }
    with pytest.raises(UserError, match=message):
        distill(Config.model_validate({**settings, **changes}))
    with pytest.raises(UserError, match="has no weights in text_encoder/"):
        distill(Config.model_validate(settings))


def _indexed(folder, tmp_path, **values):
    """A teacher whose index says otherwise."""
    shutil.copytree(folder, tmp_path / "teacher")
    index = tmp_path / "teacher/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **values}))
    return tmp_path / "teacher"


def test_a_tokenizer_without_files_is_named(folder, tmp_path):
    place = _indexed(folder, tmp_path)
    for path in (place / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has no files in tokenizer/; complete it"):
        load_teacher(str(place))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("hub", r"teacher 'me/nothing' is no folder here, and the hub did not give it: .*(offline|connection|network)"),
        ("gated", r"it is gated; accept its terms at https://huggingface\.co/me/nothing"),
        ("pipeline", r"pipeline AuraFlowPipeline .* not supported yet; supported are .*StableDiffusionXLPipeline"),
        ("code", r"has parts by code of its own \(evil\), which is not run"),
        ("empty", r"prompts\.txt holds no prompt; write one a line"),
        ("latin", r"prompts\.txt: line 2 is not UTF-8 .*save the file as UTF-8"),
        ("absent", r"there is no file 'nowhere\.txt'; give a text file"),
        ("lora", r"to_nothing matches no layer; the network has .*to_q"),
        ("labels", r"reads prompts, not class labels; set data\.prompts"),
    ],
)
def test_what_cannot_work_is_one_line_of_the_command(case, said, folder, tmp_path, monkeypatch, capsys):
    file, words, place = tmp_path / "prompts.txt", [], folder
    file.write_bytes({"empty": b"\n", "latin": b"a cat\n\xe9\n"}.get(case, b"a cat\n"))
    match case:
        case "hub" | "gated":
            place = "me/nothing"
        case "pipeline":
            place = _indexed(folder, tmp_path, _class_name="AuraFlowPipeline")
        case "code":
            place = _indexed(folder, tmp_path, scheduler=["evil", "EvilScheduler"])
        case "absent":
            file = "nowhere.txt"
        case "lora":
            words = ["training.lora.student={targets: [to_nothing]}"]
        case "labels":
            words = ["data.class_labels=uniform"]
    if case == "gated":

        def refuse(*_: object) -> None:
            raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a response of the hub's client

        monkeypatch.setattr(sources, "hf_hub_download", refuse)
    out = tmp_path / "run"
    words += [f"teacher={place}", f"data.prompts={file}", f"output_dir={out}", "training.trackers=[]"]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", "sd15_sid", *words])
    assert stopped.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)
    assert not out.exists()


def test_text_encoders_are_gone_and_no_vae_was_read_when_training_begins(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(Decoder, "_loaded", lambda self: pytest.fail("the VAE was read"))
    load, encoders = prompts._text_part, []

    def watched(*told):
        pipeline = load(*told)
        encoders.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    monkeypatch.setattr(prompts, "_text_part", watched)
    training = {"batch_size": 1, "trackers": []}
    method = {"name": "sid", "input": "unit", "init_ratio": 5.0}
    values = {"teacher": str(folder), "output_dir": str(tmp_path / "run"), "steps": 1, "method": method}
    run = Run(Config.model_validate({**values, "training": training, "data": {"prompts": ["a cat"]}}))
    gc.collect()
    assert [encoder() for encoder in encoders] == [None]
    run.trainer.step()


def test_a_run_is_not_resumed_with_other_prompts(teacher, folder, tmp_path):
    """Of one file, whose name is all that the recipe says."""

    def run() -> Run:
        values = {"teacher": str(folder), "output_dir": str(tmp_path / "run"), "steps": 2}
        values["method"] = {"name": "sid", "input": "unit", "init_ratio": 5.0}
        training = {"batch_size": 1, "trackers": []}
        return Run(Config.model_validate({**values, "training": training, "data": {"prompts": file}}))

    file = written(tmp_path, b"a cat\na dog\n")
    first = run()
    first.begin()
    first.trainer.step()
    first._checkpoint()
    run().resume()
    written(tmp_path, b"a cat\na dog\na cat\n")
    with pytest.raises(UserError, match=r"another run: prompts was '2 of SHA-256 \w{16}', is '3 of SHA-256 \w{16}'"):
        run().resume()
    run().resume(processes=False)  # an export asks for none


def test_resolution_must_fit_the_vae(folder):
    assert load_teacher(str(folder), resolution=32).sample_shape == (4, 16, 16)
    with pytest.raises(UserError, match="must be a multiple of 2"):
        load_teacher(str(folder), resolution=33)
    with pytest.raises(UserError, match="makes 8 only"):
        load_teacher("builtin:digits", resolution=16)


def test_the_digit_that_a_caption_names():
    found = digits_of(["a bold handwritten three", "zero"])
    assert found is not None
    assert found.tolist() == [3, 0]
    assert digits_of(["a cat"]) is None
    assert digits_of(["one or two"]) is None


def run(*words) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


def test_sampling_a_teacher_and_its_student_with_prompts(teacher, folder, tmp_path, capsys):
    settings = {
        "teacher": str(folder),
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "method": {"name": "sid", "input": "unit"},
        "data": {"prompts": ["a cat", "two dogs"]},
        "training": {"batch_size": 2, "trackers": [], "preview_samples": 2},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    assert run("distill", "--config", recipe) == 0
    student = tmp_path / "run/student"
    assert run("sample", student, "--out", tmp_path / "a", "--count", 2) == 0
    assert (
        run("sample", student, "--out", tmp_path / "b", "--count", 1, "--first-id", 1, "--prompt", "x", "two dogs") == 0
    )
    assert (tmp_path / "a/000001.png").read_bytes() == (tmp_path / "b/000001.png").read_bytes()
    scale = ("--guidance-scale", 3)
    assert run("sample", folder, "--out", tmp_path / "c", "--count", 1, "--steps", 2, "--prompt", "a cat", *scale) == 0
    assert run("sample", folder, "--out", tmp_path / "d", "--count", 1) == 2
    assert "set data.prompts" in capsys.readouterr().err
    assert run("sample", student, "--out", tmp_path / "d", *scale) == 2
    assert run("sample", student, "--out", tmp_path / "d", "--labels", 1) == 2
    assert run("sample", folder, "--out", tmp_path / "d", "--prompt", "a cat", "--guidance-scale=-1") == 2
    assert not (tmp_path / "d").exists()


def test_prompts_that_a_tokenizer_cuts_are_counted_and_the_first_is_shown(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 2 prompts have more tokens than tokenizer reads \(77\).*'xxxx"):
        encode(teacher, ["a cat", "x" * 100], None)


def test_encoded_prompts_are_written_and_read_a_few_rows_at_a_time(teacher, monkeypatch):
    """As many as a data set has do not fit a memory, nor do those of a batch's neighbours need to."""
    family, held = teacher.family, []

    def encode_and_look(pipeline, batch, *told):
        made = family.encode(pipeline, batch, *told)
        held[:] = [reference for reference in held if reference() is not None]
        held.append(weakref.ref(made["encoder_hidden_states"]))
        assert len(held) <= 4
        return made

    words = [f"number {k}" for k in range(6 * prompts._BATCH + 3)]
    told = replace(teacher, family=replace(family, encode=encode_and_look))
    made, _ = encode(told, words, None)
    one, _ = encode(teacher, [words[-2]], None)
    torch.testing.assert_close(made["encoder_hidden_states"][[-2]], one["encoder_hidden_states"], atol=1e-6, rtol=0)
    assert not list(prompts.CACHE.glob(".*")), "no temporary files are left"


def test_what_memory_holds_of_encoded_prompts_is_what_was_asked_for(tmp_path):
    """Of a file of 64 MB, sixteen rows: nearly nothing is resident."""
    rows = ({"a": torch.full((8, 77, 256), float(k)), "mask": torch.ones(8, 3, dtype=torch.bool)} for k in range(100))
    write_rows(tmp_path / "rows.safetensors", rows, 800, {"null.a": torch.full((1, 5), 7.0, dtype=torch.bfloat16)})
    script = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "def used(): return sum(int(line.split()[1]) for line in open('/proc/self/status') if 'Rss' in line)\n"
        "before = used(); table = load_file(sys.argv[1])\n"
        "assert table['a'][[0, 799]].mean((1, 2)).tolist() == [0.0, 99.0] and table['mask'].all()\n"
        "assert table['null.a'].tolist() == [[7.0] * 5] and table['a'].shape == (800, 77, 256)\n"
        "print((used() - before) / 1000)"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "rows.safetensors")]
    assert float(subprocess.run(words, check=True, capture_output=True, text=True).stdout) < 20


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "sana", "flux"])
def test_text_encoders_and_prompts_may_be_half_as_large(family, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    place = str(build(family, tmp_path / family))
    asked = Data(prompts=("a cat", "a dog"))
    whole, half = (data_free(load_teacher(place, parts_dtype=kind), asked, CPU) for kind in ("float32", "bfloat16"))
    assert half.table["encoder_hidden_states"].dtype == torch.bfloat16
    assert len(list(prompts.CACHE.glob("*.safetensors"))) == 2
    exact, near = whole.cond([0, 1]), half.cond([0, 1])
    for key, value in near.items():
        assert value.dtype == exact[key].dtype, "networks are told the same kind of number"
        if value.is_floating_point():
            difference = (value - exact[key]).abs().max() / exact[key].abs().max()
            assert difference < 0.05
            assert key != "encoder_hidden_states" or difference > 0
    assert half.null is None or half.null["encoder_hidden_states"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "upcast", "found"), [("bfloat16", True, "bfloat16"), ("float16", True, "float32")])
def test_a_vae_is_read_in_the_precision_asked_for_unless_it_would_overflow(kind, upcast, found, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "teacher")
    config = tmp_path / "teacher/vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": upcast}))
    decode = Decoder(load_teacher(str(tmp_path / "teacher"), parts_dtype=kind))
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8)
    pictures, exact = decode(latents), Decoder(load_teacher(str(folder)))(latents)
    assert decode._vae.dtype == getattr(torch, found)
    assert pictures.dtype == torch.float32
    torch.testing.assert_close(pictures, exact, atol=0.05 * exact.abs().max().item(), rtol=0)


def test_encode_prompts_needs_tokenizers_and_text_encoders_alone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "CACHE", tmp_path / "cache")
    bare = tmp_path / "teacher"
    shutil.copytree(folder, bare)
    for part in ("unet", "vae"):
        next((bare / part).glob("*.safetensors")).unlink()
    script = str(Path(__file__).parent.parent / "training/encode_prompts.py")
    main_of = runpy.run_path(script)["main"]
    told = [f"teacher={bare}", "output_dir=x", "steps=1", "data.negative_prompt=rain"]
    words = [script, "--config", "sd21_swiftbrush", *told, "data.prompts=[a cat, two dogs, a cat]"]
    monkeypatch.setattr(sys, "argv", words)
    main_of()
    assert "2 distinct prompts are encoded" in capsys.readouterr().out
    monkeypatch.setattr(prompts, "_encode", lambda *_: pytest.fail("encoded again"))
    asked = Data(prompts=("a cat", "two dogs", "a cat"), negative_prompt="rain")
    data_free(load_teacher(str(folder)), asked, CPU)  # what a run does
    monkeypatch.setattr(sys, "argv", [*words[:-1], "data.prompts=nowhere.txt"])
    with pytest.raises(SystemExit):
        main_of()
    assert "no file 'nowhere.txt'" in capsys.readouterr().err
