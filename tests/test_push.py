"""A run's student written again by ``stepdistill export``, and what ``stepdistill push`` uploads."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file

from stepdistill import push as pushing
from stepdistill.__main__ import main
from stepdistill.report import PLACE
from stepdistill.sources import locate
from stepdistill.student import recipe

SMALL = ["training.batch_size=4", "training.preview_samples=4", "training.trackers=[]", "evaluate=null", "steps=2"]


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


@pytest.fixture(scope="module")
def finished(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert (
        command("distill", "--config", "digits_sid", *SMALL, f"teacher={teachers('ddpm')}", f"output_dir={folder}") == 0
    )
    return folder


class Hub:
    """What a hub was asked to do."""

    def __init__(self):
        self.made, self.files = {}, {}

    def create_repo(self, repo, **options):
        self.made[repo] = options

    def create_commit(self, repo, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def test_a_push_sends_every_file_once_and_the_card_names_the_repository(finished, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    assert command("push", finished, "me/digits", "--private") == 0
    assert hub.made == {"me/digits": {"private": True, "exist_ok": True}}
    student = finished / "student"
    assert set(hub.files) == {p.relative_to(student).as_posix() for p in student.rglob("*") if p.is_file()}
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("me/digits")' in card
    assert PLACE not in card
    assert str(finished.parent) not in card  # output_dir, and the teacher, have their names alone
    assert f"teacher: {recipe(student / 'README.md')['teacher'].rsplit('/')[-1]}\n" in card
    assert hub.files["model_index.json"] == (student / "model_index.json").read_bytes()
    assert PLACE in (student / "README.md").read_text()
    assert "uploaded to https://huggingface.co/me/digits" in capsys.readouterr().out


def test_a_dry_run_lists_the_files_and_asks_no_hub(finished, monkeypatch, capsys):
    monkeypatch.setattr(pushing, "HfApi", lambda: pytest.fail("the hub was asked"))
    assert command("push", finished, "me/digits", "--dry-run") == 0
    shown = capsys.readouterr().out
    weights = finished / "student/unet/diffusion_pytorch_model.safetensors"
    assert f"{weights.stat().st_size:,}  unet/{weights.name}" in shown
    assert "would be uploaded to" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "{run}", "digits"], "write owner/name"),
        (["push", "{run}", "me/ digits"], "is no repository id"),
        (["push", "{tmp}", "me/digits"], "holds no finished student"),
        (["push", "{run}", "me/digits", "--adapters"], "holds no finished student_lora"),
        (["export", "{tmp}"], "is no run: it has no config.yaml"),
    ],
)
def test_what_cannot_be_pushed_or_exported_is_refused(words, message, finished, tmp_path, capsys):
    assert command(*(word.format(run=finished, tmp=tmp_path) for word in words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            LocalTokenNotFoundError("Token is required, but no token found.\nlong story"),
            "Token is required, but no token found.",
        ),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_a_hub_that_refuses_is_told_in_one_line(error, reason, finished, monkeypatch, capsys):
    class Closed(Hub):
        def create_repo(self, repo, **options):
            raise error

    monkeypatch.setattr(pushing, "HfApi", Closed)
    assert command("push", finished, "me/digits") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == f"error: the hub did not take me/digits: {reason}"


def test_an_export_writes_the_student_of_the_newest_checkpoint_again(finished):
    weights = finished / "student/unet/diffusion_pytorch_model.safetensors"
    before = load_file(weights)
    weights.unlink()
    (manifest,) = finished.glob("checkpoints/step_*/manifest.json")
    written = json.loads(manifest.read_text())  # as if by eight processes, which one may export
    manifest.write_text(json.dumps({**written, "identity": {**written["identity"], "processes": 8}}))
    assert command("distill", "--config", finished / "config.yaml", "resume=true", f"output_dir={finished}") == 2
    assert command("export", finished) == 0
    after = load_file(weights)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_card_of_adapters_for_a_bundled_teacher_keeps_no_path_of_this_machine(tmp_path):
    card = tmp_path / "README.md"
    place = locate("builtin:digits_text").as_posix()
    card.write_text(f'from_pretrained("{place}")\n\n## Recipe\n\n```yaml\nteacher: builtin:digits_text\n```\n')
    assert 'from_pretrained("digits_text_teacher")' in pushing._public(card)
