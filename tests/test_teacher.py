"""Teachers: what loads, how it is read, and how the rest is refused."""

import json
import re
import shutil

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from families import build
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

from stepdistill import sources
from stepdistill.__main__ import main
from stepdistill.config import Data
from stepdistill.data import data_free, repeated
from stepdistill.errors import UserError
from stepdistill.hosting import plan
from stepdistill.methods import SiD
from stepdistill.parts import check_files, check_whole
from stepdistill.process import VE, VP, Flow
from stepdistill.samplers import SampleNoise, sample_ode
from stepdistill.teacher import load_teacher


@pytest.mark.parametrize(
    ("kind", "process", "target", "classes"),
    [
        ("ddpm", VP, "eps", None),
        ("ddim", VP, "eps", None),
        ("v", VP, "v", None),
        ("x0", VP, "x0", None),
        ("consistency", VP, "eps", 4),
        ("flow", Flow, "flow", None),
        ("edm", VE, "edm", None),
    ],
)
def test_teacher_is_read_from_its_folder(kind, process, target, classes, teachers):
    teacher = load_teacher(str(teachers(kind)))
    assert isinstance(teacher.denoiser.process, process)
    assert (teacher.denoiser.target, teacher.classes, teacher.sample_shape) == (target, classes, (1, 8, 8))
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_loaded_teacher_samples_like_its_pipeline(teachers):
    folder = teachers("ddpm")
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = SampleNoise(range(3), (1, 8, 8))
    expected = pipeline(
        batch_size=3, num_inference_steps=10, generator=noise.generators, output_type="np", return_dict=False
    )[0]
    with torch.no_grad():
        images = sample_ode(load_teacher(str(folder)).denoiser, SampleNoise(range(3), (1, 8, 8))(), 10)
    # DDIM's default set_alpha_to_one=True ends clean, as sample_ode does
    torch.testing.assert_close(
        (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


def test_the_first_pipelines_of_the_hub_keep_everything_in_one_folder(teachers, tmp_path):
    folder = teachers("ddpm")
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.sample_size == 8
    flat, nested = load_teacher(str(tmp_path)), load_teacher(str(folder))
    for mine, theirs in zip(flat.network.parameters(), nested.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert type(flat.denoiser.process) is type(nested.denoiser.process)


def broken(source, target, file, **changes):
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(target)


def test_bad_teachers_are_refused_with_what_is_supported(teachers, tmp_path):
    good = teachers("ddpm")
    with pytest.raises(UserError, match=r"folder '.*nowhere' does not exist"):
        load_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_teacher(str(tmp_path))
    with pytest.raises(UserError, match="no bundled teacher"):
        load_teacher("builtin:nothing")
    with pytest.raises(UserError, match=r"pipeline AuraFlowPipeline .* not supported yet; supported are DDPMPipeline"):
        load_teacher(broken(good, tmp_path / "a", "model_index.json", _class_name="AuraFlowPipeline"))
    scheduler = ["diffusers", "UnCLIPScheduler"]
    with pytest.raises(UserError, match=r"scheduler UnCLIPScheduler .* not supported; supported are .*DDIMScheduler"):
        load_teacher(broken(good, tmp_path / "b", "model_index.json", scheduler=scheduler))
    with pytest.raises(UserError, match="network UNet2DConditionModel"):
        load_teacher(broken(good, tmp_path / "c", "model_index.json", unet=["diffusers", "UNet2DConditionModel"]))
    with pytest.raises(UserError, match="1 to 2 channels"):
        load_teacher(broken(good, tmp_path / "d", "unet/config.json", out_channels=2))
    lacking = tmp_path / "g"
    shutil.copytree(good, lacking)
    (lacking / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.safetensors is damaged \(.*copy or download"):
        load_teacher(str(lacking))
    shutil.rmtree(lacking / "scheduler")
    with pytest.raises(UserError, match=r"cannot read scheduler/scheduler_config\.json"):
        load_teacher(str(lacking))
    with pytest.raises(UserError, match="positional time"):
        load_teacher(broken(good, tmp_path / "e", "unet/config.json", time_embedding_type="fourier"))


def test_hub_id_that_the_hub_does_not_give_is_said_so():
    message = r"'somebody/nothing' is no folder here, and the hub did not give it: .*check your connection"
    with pytest.raises(UserError, match=message):
        load_teacher("somebody/nothing")


def test_refusal_comes_before_the_weights_are_read(teachers, tmp_path):
    folder = broken(teachers("ddpm"), tmp_path / "f", "model_index.json", _class_name="AuraFlowPipeline")
    (tmp_path / "f/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="not supported yet"):
        load_teacher(folder)


def test_labels_are_drawn_as_asked(teachers):
    teacher = load_teacher(str(teachers("consistency")))
    device = torch.device("cpu")
    uniform = data_free(teacher, Data(class_labels="uniform", null_label=3), device)
    assert set(uniform.batch(200).cond["class_labels"].tolist()) == {0, 1, 2}
    assert uniform.cond(range(1, 7))["class_labels"].tolist() == [1, 2, 1, 2, 0, 2]
    weighted = data_free(teacher, Data(class_labels=(2, 2, 2, 0)), device)
    share = (weighted.batch(2000).cond["class_labels"] == 2).float().mean().item()
    assert share == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 2000) ** 0.5)


def test_labels_follow_the_law_that_weighs_them(teachers):
    teacher = load_teacher(str(teachers("consistency")))
    law = Data.model_validate({"class_labels": {"0": 1, 2: 3, 3: 5}, "null_label": 3})
    assert Data.model_validate(law.model_dump(mode="json")) == law
    told = data_free(teacher, law, torch.device("cpu"))
    assert told.table["class_labels"].tolist() == [2, 0, 2, 2]
    share = (told.batch(2000).cond["class_labels"] == 2).float().mean().item()
    assert share == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 2000) ** 0.5)
    labels = repeated({0: 0.5, 7: 0.25, 9: 0.25})
    assert len(labels) == 10_000
    assert [labels[:1000].count(label) for label in (0, 7, 9)] == [500, 250, 250]
    with pytest.raises(UserError, match=r"must lie in 0\.\.3, got \[1, 4\]"):
        data_free(teacher, Data(class_labels={1: 1.0, 4: 1.0}), torch.device("cpu"))
    with pytest.raises(ValueError, match="greater than 0"):
        Data.model_validate({"class_labels": {1: 0}})


def test_labels_that_do_not_fit_are_refused(teachers):
    device = torch.device("cpu")
    classed, plain = load_teacher(str(teachers("consistency"))), load_teacher(str(teachers("ddpm")))
    with pytest.raises(UserError, match=r"has 4 classes; set data\.class_labels"):
        data_free(classed, Data(), device)
    with pytest.raises(UserError, match=r"must lie in 0\.\.3"):
        data_free(classed, Data(class_labels=(4,)), device)
    with pytest.raises(UserError, match="is unconditional"):
        data_free(plain, Data(class_labels="uniform"), device)
    with pytest.raises(UserError, match=r"needs a class-conditional teacher and data\.null_label"):
        classed.guided(Data(class_labels="uniform", guidance_scale=2.0))


def test_guided_teacher_is_one_doubled_batch_with_the_null_label(teachers):
    teacher = load_teacher(str(teachers("consistency")))
    guided = teacher.guided(Data(class_labels="uniform", null_label=3, guidance_scale=2.0))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        found = guided(x, t, {"class_labels": labels}).eps
        cond = teacher.denoiser(x, t, {"class_labels": labels}).eps
        uncond = teacher.denoiser(x, t, {"class_labels": torch.full_like(labels, 3)}).eps
    torch.testing.assert_close(found, uncond + 2 * (cond - uncond))


def test_dtype_of_noise_and_shape_follow_the_teacher(tmp_path):
    DDPMPipeline(tiny_unet(sample_size=(8, 16), in_channels=3, out_channels=3), DDPMScheduler()).save_pretrained(
        tmp_path
    )
    teacher = load_teacher(str(tmp_path))
    batch = data_free(teacher, Data(), torch.device("cpu")).batch(2)
    assert batch.noise.shape == (2, 3, 8, 16)
    assert batch.noise.dtype == torch.float32
    with pytest.raises(UserError, match=r"sample_size=\[8, 16\]; ConsistencyModelPipeline takes one number"):
        plan(teacher.denoiser, SiD().sampler(teacher.denoiser.process), classes=None)


def test_a_component_that_the_folder_lacks_is_named_before_anything_is_trained(tmp_path):
    folder = build("sd", tmp_path / "sd")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="names text_encoder, which the folder lacks; complete it, or write"):
        load_teacher(str(folder))


def _renamed(folder, part, suffix):
    """The weights of a part under another kind of name."""
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(suffix))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vae", None, "has no vae in its model_index.json, which StableDiffusionPipeline needs"),
        ("text_encoder", None, "has no text_encoder in its model_index.json"),
        ("scheduler", None, "has no scheduler in its model_index.json"),
        ("vae", "", r"has no weights in vae/"),
        ("text_encoder", ".bin", r"has its text_encoder as pickles alone.*from_pretrained\(\".*\"\)\.save_pretrained"),
        ("unet", ".fp16.safetensors", r"has its unet as the variant fp16 alone.*variant=\"fp16\""),
    ],
)
def test_a_part_that_cannot_be_used_is_named_in_one_line_before_anything_is_trained(
    part, change, said, tmp_path, capsys
):
    folder = build("sd", tmp_path / "sd")
    if change is None:
        index = json.loads((folder / "model_index.json").read_text())
        index[part] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index))
    elif change:
        _renamed(folder, part, change)
    else:
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    words = [f"teacher={folder}", f"output_dir={tmp_path / 'run'}", "data.prompts=[a cat]", "training.trackers=[]"]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config", "sd15_sid", *words])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert re.search(said, line)
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named_and_files_of_the_hub_are_judged_by_name(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, of 2 shards"):
        check_whole(tmp_path, "me/model")
    check_files(["unet"], ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/x.bin"], "me/model")
    check_files(["unet", "scheduler"], ["diffusion_pytorch_model.safetensors"], "me/ddpm")  # of one folder
    with pytest.raises(UserError, match="the variant fp16 alone"):
        check_files(["unet"], ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "me/model")


def test_weights_of_the_hub_that_are_not_read_are_refused_before_they_are_downloaded(tmp_path, monkeypatch):
    folder = build("sd", tmp_path / "sd")
    index, _ = sources.read_index(folder / "model_index.json", "me/model")
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.*")]
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: pytest.fail("something was downloaded"))
    listed = [name.replace(".safetensors", ".bin") if name.startswith("vae") else name for name in files]
    monkeypatch.setattr(sources, "list_repo_files", lambda _: listed)
    with pytest.raises(UserError, match="me/model has its vae as pickles alone"):
        sources.whole("me/model", folder, index)

    def no_network(_: str) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(sources, "list_repo_files", no_network)
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(folder))
    assert sources.whole("me/model", folder, index) == folder  # a copy that is here
    next((folder / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="me/model has no weights in vae/"):
        sources.whole("me/model", folder, index)


def test_a_gated_model_is_said_to_be_gated(monkeypatch):
    def refuse(*_: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a response of the hub's client

    monkeypatch.setattr(sources, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"it is gated; accept its terms at https://.*, then `hf auth"):
        load_teacher("me/model")


@pytest.mark.parametrize("kind", ["EvilScheduler", "DDPMScheduler"])
def test_a_component_with_code_of_its_own_is_never_run(kind, teachers, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teachers(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["evil", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/evil.py").write_text("raise SystemExit(1)")
    with pytest.raises(UserError, match=r"has parts by code of its own \(evil\), which is not run"):
        load_teacher(str(folder))
