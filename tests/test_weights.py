"""Weights of the networks behind the metrics: where they are looked for, and that none is run on trust alone."""

import hashlib
import io
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.metrics.extractors import EXTRACTORS, load_extractor
from stepdistill.metrics.weights import KNOWN, VARIABLE, Weights, fetch, find_weights, locate, sha256_of

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A home, a cache and a temporary folder of its own, all empty."""
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("DNNLIB_CACHE_DIR", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def known(monkeypatch):
    """The NVIDIA Inception, as if these few bytes were it."""
    file = replace(KNOWN["inception"], sha256=DIGEST, size=len(CONTENT))
    monkeypatch.setitem(KNOWN, "inception", file)
    return file


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Answer(io.BytesIO):
    """What ``urlopen`` gives."""


@pytest.fixture
def server(monkeypatch):
    """``server(content)`` answers every URL with it and keeps what was asked."""
    asked = []

    def answer(content):
        def urlopen(url, timeout):
            asked.append(url)
            if isinstance(content, Exception):
                raise content
            return Answer(content)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return answer


def test_every_known_file_has_a_full_checksum_and_every_extractor_a_known_file():
    for file in KNOWN.values():
        assert len(file.sha256) == 64
        assert int(file.sha256, 16) >= 0
        assert file.url.startswith("https://")
        assert file.size > 90e6
    assert len({file.sha256 for file in KNOWN.values()}) == len(KNOWN)
    assert {entry.weights for entry in EXTRACTORS.values()} <= KNOWN.keys()


def test_checksums_agree_with_what_names_and_urls_say():
    assert KNOWN["inception-pytorch"].name.endswith(f"-{KNOWN['inception-pytorch'].sha256[:8]}.pth")
    for name in ("clip-vit-b-32", "clip-vit-l-14", "clip-vit-l-14-336"):
        assert KNOWN[name].sha256 == KNOWN[name].url.split("/")[-2]


def test_openai_urls_are_those_of_open_clip():
    import open_clip

    for name, model in (("b-32", "ViT-B-32"), ("l-14", "ViT-L-14"), ("l-14-336", "ViT-L-14-336")):
        assert KNOWN[f"clip-vit-{name}"].url == open_clip.get_pretrained_url(model, "openai")


@pytest.mark.parametrize(
    "place",
    [
        "xdg_cache_home/stepdistill/inception-2015-12-05.pt",
        "torch_home/hub/checkpoints/inception-2015-12-05.pt",
        "home/.cache/clip/inception-2015-12-05.pt",
        "home/.cache/dnnlib/downloads/0123abcd_inception-2015-12-05.pt",
        "home/.cache/dnnlib/torch_hub/checkpoints/inception-2015-12-05.pt",
        "xdg_cache_home/k-diffusion/inception-2015-12-05.pt",
        "tmp/inception-2015-12-05.pt",
    ],
)
def test_the_caches_of_other_tools_are_looked_at(known, tmp_path, place):
    path = put(tmp_path / place)
    assert find_weights("inception") == Weights(path, DIGEST)


def test_other_names_of_the_same_bytes_are_known(monkeypatch, tmp_path):
    path = put(tmp_path / "torch_home/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setitem(KNOWN, "inception-pytorch", replace(KNOWN["inception-pytorch"], sha256=DIGEST))
    assert find_weights("inception-pytorch").path == path


def test_the_hub_cache_is_looked_at(monkeypatch, tmp_path):
    file = replace(KNOWN["clip-vit-g-14"], sha256=DIGEST)
    monkeypatch.setitem(KNOWN, "clip-vit-g-14", file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert file.hub is not None
    repository = tmp_path / "hub" / f"models--{file.hub[0].replace('/', '--')}"
    path = put(repository / "snapshots" / "abc" / file.hub[1])
    put(repository / "refs" / "main", b"abc")
    assert find_weights("clip-vit-g-14").path == path


def test_a_path_comes_before_the_variable_and_the_variable_before_the_caches(known, tmp_path, monkeypatch):
    cache = put(tmp_path / "xdg_cache_home/stepdistill" / known.name)
    assert find_weights("inception").path == cache
    told = put(tmp_path / "told" / known.name)
    monkeypatch.setenv(VARIABLE, str(told.parent))
    assert find_weights("inception").path == told
    monkeypatch.setenv(VARIABLE, str(told))
    assert find_weights("inception").path == told
    explicit = put(tmp_path / "any name")
    assert find_weights("inception", path=explicit).path == explicit
    assert find_weights("inception", path=tmp_path / "told").path == told


def test_a_file_in_the_variable_is_only_for_the_network_of_its_name(known, tmp_path, monkeypatch):
    cache = put(tmp_path / "xdg_cache_home/stepdistill" / known.name)
    monkeypatch.setenv(VARIABLE, str(put(tmp_path / "ViT-B-32.pt", b"other")))
    assert find_weights("inception").path == cache


def test_a_file_serves_the_network_whose_checksum_it_has_and_others_are_looked_for_as_usual(known, tmp_path):
    inception = put(tmp_path / "any name")
    with pytest.raises(UserError) as missing:
        find_weights("clip-vit-b-32", path=inception)
    assert f"the weights ViT-B-32.pt (354 MB) are not in {tmp_path}" in str(missing.value)
    assert str(missing.value).endswith(f"; {inception} is that of inception, and --weights FOLDER may hold both")
    clip = put(tmp_path / "home/.cache/clip/ViT-B-32.pt", b"clip")
    assert find_weights("clip-vit-b-32", path=inception, trust=True).path == clip
    assert find_weights("inception", path=inception).path == inception
    assert find_weights("clip-vit-b-32", path=put(tmp_path / "unknown", b"?"), trust=True).path == tmp_path / "unknown"


def test_a_wrong_checksum_is_refused_and_said(known, tmp_path):
    path = put(tmp_path / "evil.pt", b"evil")
    with pytest.raises(UserError) as refused:
        find_weights("inception", path=path)
    got = hashlib.sha256(b"evil").hexdigest()
    assert all(part in str(refused.value) for part in (str(path), got, DIGEST, "--trust"))
    assert find_weights("inception", path=path, trust=True) == Weights(path, got)


def test_nothing_is_executed_of_a_file_with_a_wrong_checksum(tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(torch.nn.Identity()).save(path)
    for loader in ("torch.jit.load", "torch.load"):
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("the file was opened as a program"))
    for name in EXTRACTORS:
        with pytest.raises(UserError, match="is not the published"):
            load_extractor(name, weights=path)


def test_a_foreign_file_in_the_shared_temporary_folder_counts_as_absent_even_for_the_trusting(known, tmp_path):
    put(tmp_path / "tmp" / known.name, b"somebody else's")
    assert locate(known) is None
    with pytest.raises(UserError, match="are not in"):
        find_weights("inception", trust=True)


def test_a_program_that_changes_between_check_and_use_is_not_run(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.script(torch.nn.ReLU()).save(path)
    weights = Weights(path, sha256_of(path))
    assert weights.program("cpu")(torch.tensor(-1.0)) == 0
    torch.jit.script(torch.nn.Sigmoid()).save(path)
    for use in (lambda: weights.program("cpu"), weights.state):
        with pytest.raises(UserError, match="changed while it was loaded"):
            use()


def test_missing_weights_name_url_places_and_the_way_without(known, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "told"))
    with pytest.raises(UserError) as missing:
        find_weights("inception")
    for part in (known.url, str(tmp_path / "told"), "stepdistill", "dnnlib", str(tmp_path / "tmp"), "--preset digits"):
        assert part in str(missing.value)
    with pytest.raises(UserError, match=r"are not in .*nothing here"):
        find_weights("inception", path=tmp_path / "nothing here")


def test_nothing_is_downloaded_unless_allowed(known, server):
    asked = server(CONTENT)
    with pytest.raises(UserError):
        find_weights("inception", trust=True)
    assert asked == []


@pytest.mark.parametrize("told", [True, False])
def test_a_download_lands_whole_in_the_folder_of_the_user(known, server, tmp_path, monkeypatch, told):
    folder = tmp_path / "told" if told else tmp_path / "xdg_cache_home" / "stepdistill"
    if told:
        monkeypatch.setenv(VARIABLE, str(folder))
    asked = server(CONTENT)
    weights = find_weights("inception", download=True)
    assert weights == Weights(folder / known.name, DIGEST)
    assert [file.name for file in folder.iterdir()] == [known.name]
    find_weights("inception", download=True)
    assert asked == [known.url]


@pytest.mark.parametrize("there", [True, False])
def test_a_download_lands_in_the_folder_that_is_named_and_is_found_there(known, server, tmp_path, there):
    folder = tmp_path / "named"
    if there:
        folder.mkdir()
    asked = server(CONTENT)
    assert find_weights("inception", path=folder, download=True).path == folder / known.name
    assert find_weights("inception", path=folder, download=True).path == folder / known.name
    assert asked == [known.url]


@pytest.mark.parametrize("content", [CONTENT[:-1], b"", b"<html>not found</html>"])
def test_a_truncated_or_foreign_download_leaves_nothing_and_trust_does_not_cover_it(known, server, tmp_path, content):
    server(content)
    with pytest.raises(UserError, match=f"{len(content)} bytes, expected {len(CONTENT)}"):
        find_weights("inception", download=True, trust=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("error", [OSError("no route to host"), TimeoutError("timed out")])
def test_a_failed_download_says_what_and_why(known, server, error):
    server(error)
    with pytest.raises(UserError, match=f"cannot download {known.url} .*: {error}"):
        find_weights("inception", download=True)


def test_a_failed_download_leaves_an_older_file_alone(known, server, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "told"))
    old = put(tmp_path / "told" / known.name, b"old")
    server(b"broken")
    with pytest.raises(UserError):
        fetch(known)
    assert old.read_bytes() == b"old"


def test_states_are_read_from_all_three_forms(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.ones(2)}
    save_file(state, tmp_path / "one.safetensors")
    torch.save({"state_dict": state}, tmp_path / "two.bin")
    program = torch.nn.Module()
    for name, tensor in state.items():
        program.register_buffer(name, tensor)
    torch.jit.script(program).save(tmp_path / "three.pt")
    for path, is_program in (("one.safetensors", False), ("two.bin", False), ("three.pt", True)):
        weights = Weights(tmp_path / path, sha256_of(tmp_path / path))
        assert weights.is_program() == is_program
        torch.testing.assert_close(weights.state(), state, rtol=0, atol=0)


def test_a_pickle_that_would_run_code_is_refused_even_when_trusted(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    torch.save({"x": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot read weights from"):
        find_weights("inception-pytorch", path=tmp_path / "evil.pth", trust=True).state()
    assert not (tmp_path / "was here").exists()


def test_unknown_extractors_list_the_known_ones():
    with pytest.raises(UserError, match=r"unknown extractor vgg; known are digits, inception, inception-clean, .*clip"):
        load_extractor("vgg")


def test_the_digits_need_no_weights_and_take_none(tmp_path):
    extractor = load_extractor("digits")
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    assert extractor(images).features.shape == (3, extractor.dimension)
    assert len(extractor.weights) == 64
    with pytest.raises(UserError, match="has its weights in the package"):
        load_extractor("digits", weights=tmp_path)
